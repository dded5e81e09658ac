// y = x weight^T + bias.
#pragma once
#include "rows.h"

namespace univigu::cpu {

struct LinearArgs {
  ParallelFor run;
  int64_t rows, D, N;
  bool low;  // all are bf16, else fp32
  const void* x;
  int64_t x_row;
  const void *weight, *bias;  // [N, D] with rows weight_row apart; [N] or null
  int64_t weight_row;
  void* y;        // [rows, N]
  float* packed;  // room for the weight: N + 64 rows of D + 1, contiguous; null where `few`
};

// Fewer than for routed_ffn: 64 rows by a weight of 1536 x 1536 took 1.4 times as long.
static inline bool few(int64_t rows, int64_t weight) { return rows <= 8 && weight >= LARGE; }

UNIVIGU_KERNEL(linear, LinearArgs)

}  // namespace univigu::cpu
