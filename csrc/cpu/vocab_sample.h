// Text head and a categorical draw; kernels/univigu_kernels/vocab_sample.py has the formulas.
#pragma once
#include "isa.h"

namespace univigu::cpu {

struct VocabSampleArgs {
  ParallelFor run;
  int64_t B, T, D, N;
  bool low;  // h, weight and bias in bf16, else fp32
  const void* h;
  int64_t h_row;  // between the B * T rows of h
  const void *weight, *bias;  // [N, D] with rows weight_row apart; [N] or null
  int64_t weight_row;
  const int64_t* seeds;
  uint32_t step;
  double temperature;
  float* parts;          // [3, B * T, vocabulary_splits(N)]: of each split what a row has found
  int32_t* part_tokens;  // [B * T, vocabulary_splits(N)]
  int64_t* tokens;
  float* confidence;
};

// Vocabulary rows of a task. Not a matter of threads or rows: sums are joined over splits.
constexpr int64_t SPLIT = 512;
static inline int64_t vocabulary_splits(int64_t N) {
  return ((N + SPLIT - 1) / SPLIT + 15) & -16;  // whole vectors
}

UNIVIGU_KERNEL(vocab_sample, VocabSampleArgs)

}  // namespace univigu::cpu
