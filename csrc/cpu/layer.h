// Layers over rows: a weight packed by all threads, its product with a block of rows.
#pragma once
#include "gemm.h"

namespace univigu::cpu::UNIVIGU_ISA {

// weight [N, D] -> packed, shared out by panels.
template <class T>
static inline void pack_weight(ParallelFor run, const T* weight, int64_t ld, int64_t N, int64_t D,
                               Packed<T>* packed) {
  const int64_t panels = (N + NR - 1) / NR;
  parallel(run, 0, panels, 65536 / (NR * (D + 1)) + 1, [&](int64_t first, int64_t last) {
    const int64_t from = first * NR, to = last * NR < N ? last * NR : N;
    pack_rows(weight + from * ld, ld, to - from, D, panel<T>(packed, D, from));
  });
}

// bias or zeros for W columns, of which there are N.
template <class T>
static inline vf bias_at(const T* bias, int64_t column, int64_t N) {
  return bias ? load_up_to(bias + column, N - column) : vf{};
}

}  // namespace univigu::cpu::UNIVIGU_ISA
