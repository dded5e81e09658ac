// What the kernels over rows take: tensors [B, L, D] whose channels are contiguous.
#pragma once
#include "isa.h"

namespace univigu::cpu {

// fp32 or bf16; strides in elements.
struct Rows {
  void* data;
  bool low;  // bf16
  int64_t b, l;
};

// A modulation [1|B, 1|2, D] in fp32; a stride is 0 where it is shared. No data: no modulation.
struct Mod {
  const float* data;
  int64_t b, s;
};

// The gradient of a modulation, contiguous [B, S, D].
struct ModGradient {
  float* data;
  int64_t B, S;
};

// The rows [0, video_rows) of a sample are video, the rest are text.
struct Joint {
  ParallelFor run;
  int64_t B, L, D, video_rows;
};

// Gradients of what many rows share are summed over chunks of at most CHUNK rows of one sample and
// one modality, then over the chunks in order: the same bits from any number of threads.
constexpr int64_t CHUNK = 64;

static inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK - 1) / CHUNK; }
static inline int64_t chunks_of(const Joint& j) {
  return j.B * (chunks_of(j.video_rows) + chunks_of(j.L - j.video_rows));
}

// With few rows a weight that does not stay in L2 is packed where it is used: writing it packed and
// reading it again would take longer than the product.
constexpr int64_t FEW_ROWS = 192, LARGE = 1 << 18;  // elements of the weight

// Items that one thread takes at least: fewer cost less than waking a second one.
static inline int64_t grain_of(int64_t elements) {
  const int64_t grain = 32768 / (elements > 0 ? elements : 1);
  return grain > 0 ? grain : 1;
}

}  // namespace univigu::cpu
