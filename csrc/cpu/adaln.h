// h = LN(x) * weight + shift, and its gradient; kernels/univigu_kernels/adaln.py has the formulas.
#pragma once
#include "rows.h"

namespace univigu::cpu {

struct AdalnArgs {
  Joint joint;
  Rows x, h;
  Mod weight, shift;
  float eps[2];  // of video and of text
  float* stats;  // [B, L, 2]: mean and 1 / sqrt(variance + eps)
};

struct AdalnBackwardArgs {
  Joint joint;
  Rows x, dh, dx;
  Mod weight;
  const float* stats;
  float* partial;  // [chunks, 2, D]
  ModGradient dweight, dshift;
};

UNIVIGU_KERNEL(adaln, AdalnArgs)
UNIVIGU_KERNEL(adaln_backward, AdalnBackwardArgs)

}  // namespace univigu::cpu
