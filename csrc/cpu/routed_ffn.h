// y = down(gelu(up(h))) with one expert for video rows and one for text rows, and what its gradient
// needs beside matrix products.
#pragma once
#include "rows.h"

namespace univigu::cpu {

struct ExpertArgs {
  const void *up_weight, *up_bias, *down_weight, *down_bias;  // contiguous
  int64_t F;
  float *up_packed, *down_packed;  // room for F + 64 rows of D + 1, and D + 64 of F + 1; or null
};

struct RoutedFfnArgs {
  ParallelFor run;
  int64_t B, L, D, video_rows;
  bool low;  // all are bf16, else fp32
  const void* h;
  int64_t h_b, h_l;
  void* y;  // [B, L, D]
  void* a;  // [B, L, F] of the wider expert: what goes into gelu; or null
  int64_t a_l;
  ExpertArgs experts[2];  // video, text. Without room, `few`: one has rows, and h is contiguous
};

static inline bool few(int64_t B, int64_t L, int64_t video_rows, int64_t weight) {
  return B * L <= FEW_ROWS && weight >= LARGE && (video_rows == 0 || video_rows == L);
}

struct GeluBackwardArgs {
  ParallelFor run;
  int64_t elements;
  bool low;
  const void *a, *dhidden;
  void *hidden, *da;  // gelu(a), dhidden * gelu'(a)
};

UNIVIGU_KERNEL(routed_ffn, RoutedFfnArgs)
UNIVIGU_KERNEL(gelu_backward, GeluBackwardArgs)

}  // namespace univigu::cpu
