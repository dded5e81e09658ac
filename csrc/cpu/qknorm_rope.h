// RMSNorm of q and of k over the full width, then the rotation of every head, and their gradient;
// kernels/univigu_kernels/qknorm_rope.py has the formulas.
#pragma once
#include "rope3d.h"

namespace univigu::cpu {

struct QknormRopeArgs {
  Joint joint;
  Rotary rotary;
  Rows x[2], out[2];       // of q and of k
  const float* weight[2];  // [D]
  float eps;
  float* rstd;    // [B, L, 2]; null: not wanted
  Rows v, v_out;  // rows that are copied; no data: none
};

struct QknormRopeBackwardArgs {
  Joint joint;
  Rotary rotary;
  Rows x[2], dout[2], dx[2];
  const float* weight[2];
  const float* rstd;
  float* partial;  // [chunks, 3, D]; the third is scratch
  ModGradient dweight[2];
};

UNIVIGU_KERNEL(qknorm_rope, QknormRopeArgs)
UNIVIGU_KERNEL(qknorm_rope_backward, QknormRopeBackwardArgs)

}  // namespace univigu::cpu
