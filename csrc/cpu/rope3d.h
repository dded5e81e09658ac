// The rotation of kernels/univigu_kernels/rope3d.py.
#pragma once
#include "rows.h"

namespace univigu::cpu {

constexpr int64_t MAX_HEAD_DIM = 2048;

// (cos, sin) of every position and pair, fp32: t, h, w [axis length, pairs, 2], text [T, K/2, 2].
struct Rotary {
  const float *t, *h, *w, *text;
  int64_t pairs_t, pairs_h, K, height, width, video_rows;
};

struct Rope3dArgs {
  ParallelFor run;
  int64_t B, L, H;
  Rows x;
  int64_t x_h;  // stride of a head
  Rows out;     // [B, L, H, K], contiguous
  Rotary rotary;
  bool inverse;
};

UNIVIGU_KERNEL(rope3d, Rope3dArgs)

}  // namespace univigu::cpu
