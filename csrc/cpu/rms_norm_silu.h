// y = n * sigmoid(n), n = x / max(|x|, 1e-12) * sqrt(C) * gamma, |x| over the channels of a pixel.
#pragma once
#include "isa.h"

namespace univigu::cpu {

struct RmsNormSiluArgs {
  ParallelFor run;
  int64_t B, C, pixels;
  const void* x;  // [B, C, pixels], contiguous, as y
  void* y;
  bool low;  // bf16
  const float* gamma;
};

UNIVIGU_KERNEL(rms_norm_silu, RmsNormSiluArgs)

}  // namespace univigu::cpu
