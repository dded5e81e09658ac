// y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) + eps), and its gradient.
#pragma once
#include "rows.h"

namespace univigu::cpu {

struct RmsNormArgs {
  Joint joint;  // all rows are of one modality
  Rows x, y;
  const float* weight;
  float eps;
  float* rstd;  // [B, L]
};

struct RmsNormBackwardArgs {
  Joint joint;
  Rows x, dy, dx;
  const float* weight;
  const float* rstd;
  float* partial;  // [chunks, D]
  float* dweight;  // [D]
};

UNIVIGU_KERNEL(rms_norm, RmsNormArgs)
UNIVIGU_KERNEL(rms_norm_backward, RmsNormBackwardArgs)

}  // namespace univigu::cpu
