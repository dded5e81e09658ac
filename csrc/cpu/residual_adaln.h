// x' = x + gate * y and h = LN(x') * weight + shift, and their gradient;
// kernels/univigu_kernels/residual_adaln.py has the formulas.
#pragma once
#include "rows.h"

namespace univigu::cpu {

struct ResidualAdalnArgs {
  Joint joint;
  Rows x, y, sum, h;  // sum: x'
  Mod gate, weight, shift, constant;
  float eps[2];  // of video and of text
  float* stats;  // [B, L, 2]: mean and 1 / sqrt(variance + eps) of x'
};

struct ResidualAdalnBackwardArgs {
  Joint joint;
  Rows sum, y, dsum, dh, dx, dy;  // without a gate y is not read
  Mod gate, weight;
  const float* stats;
  float* partial;  // [chunks, 3, D]; [chunks, 2, D] without a gate
  ModGradient dgate, dweight, dshift;
};

UNIVIGU_KERNEL(residual_adaln, ResidualAdalnArgs)
UNIVIGU_KERNEL(residual_adaln_backward, ResidualAdalnBackwardArgs)

}  // namespace univigu::cpu
