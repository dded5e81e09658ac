// One step of both flows; kernels/univigu_kernels/flow_step.py has the formulas.
#pragma once
#include "isa.h"

namespace univigu::cpu {

struct SolverRow {
  float sigma, c_x, c_corrected, c_m0, c_m1, c_m2, p_x, p_m0, p_m1;
};

struct VideoStepArgs {
  ParallelFor run;
  int64_t size;
  const float *x, *corrected, *m1, *m2;
  const void *velocity, *null;  // null may be missing
  bool low;                     // velocity and null in bf16
  float guidance;
  SolverRow row;
  float *x_next, *corrected_next, *m0;
};

struct TextStepArgs {
  ParallelFor run;
  int64_t B, T;
  const int64_t *tokens, *proposal, *seeds;
  double probability;
  uint32_t step;
  int64_t* tokens_next;
};

UNIVIGU_KERNEL(video_step, VideoStepArgs)
UNIVIGU_KERNEL(text_step, TextStepArgs)

}  // namespace univigu::cpu
