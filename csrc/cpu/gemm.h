// Matrix products C = A B of row-major fp32 or bf16 operands, accumulated in fp32, for one core.
//
// B is packed once, for tensors of T, into panels of NR columns:
//     Packed<T>* b, of packed_size<T>(depth, columns) elements;
//     pack_rows(w, ldw, columns, depth, b)      B[k][n] = w[n * ldw + k]: a weight, or keys
//     pack_columns(v, ldv, depth, columns, b)   B[k][n] = v[k * ldv + n]: values
// Panels lie one after the other, so a part of B that begins at a multiple of NR columns can be
// packed or multiplied alone: it starts at panel<T>(b, depth, column).
//     gemm<T>(a, lda, rows, b, depth, columns, epilogue)
//     gemm_rows<T>(a, lda, rows, w, ldw, depth, columns, epilogue), gemm_columns<T>: not packed yet
// then call epilogue(row, column, vf) once for every W columns of every row, with `column` a
// multiple of W; columns past the last are zero there (store_up_to drops them). A needs no packing:
// it is of T or of Packed<T>, any row stride. Elements past `depth` or `columns` are never read.
// An element of C has the same bits whatever else is multiplied with it.
//
// Packed<bf16> is bf16 in pairs along the depth where the processor multiplies them, else float:
// A is widened then, 6 rows at a time.
#pragma once
#include "vec.h"

namespace univigu::cpu::UNIVIGU_ISA {

// The tile of C that is held in registers: MR rows of NV vectors.
#if defined(__AVX512F__)
constexpr int MR = 6, NV = 4;  // 24 accumulators, 4 of B and 1 of A, of 32
#elif defined(__AVX2__)
constexpr int MR = 6, NV = 2;  // 12 + 2 + 1 of 16
#else
constexpr int MR = 4, NV = 2;  // 8 + 2 + 1 of 16
#endif
constexpr int NR = NV * W;
constexpr int64_t DEPTH = 512;  // a panel of this depth stays in L2: 64 KiB in bf16
constexpr int64_t ROWS = 32 * MR;
// Products that one accumulator sums before it is added to the sum of the others: one after the
// other, 1030 in fp32 lose four times what torch loses, in parts of 256 less than twice that.
constexpr int64_t STEPS = 256;

template <class T>
struct Operand {
  using type = float;
  static constexpr int pair = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Operand<bf16> {
  using type = bf16;
  static constexpr int pair = 2;
};
#endif
template <class T>
using Packed = typename Operand<T>::type;
template <class T>
constexpr int64_t PART = STEPS * Operand<T>::pair;  // of the depth, in one accumulator

template <class T>
static inline int64_t padded_depth(int64_t depth) {
  return (depth + Operand<T>::pair - 1) & -Operand<T>::pair;
}
static inline int64_t padded_columns(int64_t columns) { return (columns + W - 1) & -W; }

template <class T>
static inline int64_t packed_size(int64_t depth, int64_t columns) {
  return padded_depth<T>(depth) * padded_columns(columns);
}
template <class T, class P>
static inline P* panel(P* b, int64_t depth, int64_t column) {
  return b + padded_depth<T>(depth) * column;
}

// W steps of the depth at p, of which `depth` elements are left: floats, or pairs as bits.
template <class P, class T>
static inline vf load_steps(const T* p, int64_t depth) {
  if constexpr (sizeof(P) == sizeof(float)) {
    return load_up_to(p, depth);
  } else {
    vf x{};
    if (depth >= 2 * W) {
      __builtin_memcpy(&x, p, sizeof x);
    } else {
      T part[2 * W] = {};
      for (int64_t i = 0; i < depth; i++) part[i] = p[i];
      __builtin_memcpy(&x, part, sizeof x);
    }
    return x;
  }
}

static inline void transpose(vf (&x)[W]) {
  vi low, high;
  for (int i = 0; i < W; i++) {
    low[i] = i / 2 + i % 2 * W;
    high[i] = low[i] + W / 2;
  }
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    vf y[W];
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; i++) {
      y[2 * i] = __builtin_shuffle(x[i], x[i + W / 2], low);
      y[2 * i + 1] = __builtin_shuffle(x[i], x[i + W / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; i++) x[i] = y[i];
  }
}

// One panel of `width` (a multiple of W) columns from n <= width rows of w.
template <class P, class T>
static inline void pack_panel_rows(
    const T* w, int64_t ldw, int64_t n, int64_t depth, int64_t width, P* b) {
  constexpr int64_t step = sizeof(float) / sizeof(P);
  for (int64_t j = 0; j < width; j += W)
    for (int64_t k = 0; k < depth; k += W * step) {
      vf x[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; i++)
        x[i] = j + i < n ? load_steps<P>(w + (j + i) * ldw + k, depth - k) : vf{};
      transpose(x);
      for (int i = 0; i < W && k + i * step < depth; i++)
        __builtin_memcpy(b + (k + i * step) * width + j * step, &x[i], sizeof x[i]);
    }
}

template <class T>
static inline void pack_panel_columns(
    const T* v, int64_t ldv, int64_t depth, int64_t n, int64_t width, float* b) {
  for (int64_t k = 0; k < depth; k++)
    for (int64_t j = 0; j < width; j += W)
      store(b + k * width + j, j < n ? load_up_to(v + k * ldv + j, n - j) : vf{});
}

#if defined(__AVX512BF16__)
static inline vu halves(const bf16* p, int64_t n) {
  return bits_of<vu>(load_up_to(p, n)) >> 16;
}
static inline void pack_panel_columns(
    const bf16* v, int64_t ldv, int64_t depth, int64_t n, int64_t width, bf16* b) {
  for (int64_t k = 0; k < depth; k += 2)
    for (int64_t j = 0; j < width; j += W) {
      const bf16* at = v + k * ldv + j;
      vu pairs = halves(at, n - j);
      if (k + 1 < depth) pairs |= bits_of<vu>(load_up_to(at + ldv, n - j));
      __builtin_memcpy(b + k * width + 2 * j, &pairs, sizeof pairs);
    }
}
#endif

template <class T>
static inline void pack_rows(
    const T* w, int64_t ldw, int64_t columns, int64_t depth, Packed<T>* b) {
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t n = columns - j < NR ? columns - j : NR;
    pack_panel_rows(w + j * ldw, ldw, n, depth, padded_columns(n), panel<T>(b, depth, j));
  }
}
template <class T>
static inline void pack_columns(
    const T* v, int64_t ldv, int64_t depth, int64_t columns, Packed<T>* b) {
  for (int64_t j = 0; j < columns; j += NR) {
    const int64_t n = columns - j < NR ? columns - j : NR;
    pack_panel_columns(v + j, ldv, depth, n, padded_columns(n), panel<T>(b, depth, j));
  }
}

// c += a b for R rows and V vectors of one panel, V * W wide.
template <int R, int V>
__attribute__((always_inline)) static inline void multiply(
    const float* a, int64_t lda, const float* b, int64_t depth, vf (&c)[R][V]) {
  for (int64_t k = 0; k < depth; k++, b += V * W) {
    vf row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) row[v] = load(b + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const vf x = bits_of<vf>(vi{} + bits_of<int32_t>(a[r * lda + k]));
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) c[r][v] += x * row[v];
    }
  }
}

#if defined(__AVX512BF16__)
template <int R, int V, class Pair>
__attribute__((always_inline)) static inline void multiply_pairs(
    const bf16* b, vf (&c)[R][V], Pair pair) {
  __m512bh row[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) __builtin_memcpy(&row[v], b + 2 * v * W, sizeof row[v]);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const __m512bh x = bits_of<__m512bh>(vu{} + pair(r));
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) c[r][v] = bits_of<vf>(_mm512_dpbf16_ps(c[r][v], x, row[v]));
  }
}
template <int R, int V>
__attribute__((always_inline)) static inline void multiply(
    const bf16* a, int64_t lda, const bf16* b, int64_t depth, vf (&c)[R][V]) {
  for (int64_t k = 0; k + 1 < depth; k += 2, b += 2 * V * W)
    multiply_pairs(b, c, [&](int r) __attribute__((always_inline)) {
      uint32_t x;
      __builtin_memcpy(&x, a + r * lda + k, 4);
      return x;
    });
  if (depth % 2)
    multiply_pairs(b, c, [&](int r) -> uint32_t { return a[r * lda + depth - 1].bits; });
}
#endif

// The same for a tile at the edge, through memory: C[MR][V] += A[rows] b.
template <int V, class P>
__attribute__((noinline)) static void multiply_edge(
    const P* a, int64_t lda, int rows, const P* b, int64_t depth, float* tile) {
  const auto part = [&](auto& c, int first, int count) {
    for (int r = 0; r < count; r++)
      for (int v = 0; v < V; v++) c[r][v] = load(tile + ((first + r) * V + v) * W);
    multiply(a + first * lda, lda, b, depth, c);
    for (int r = 0; r < count; r++)
      for (int v = 0; v < V; v++) store(tile + ((first + r) * V + v) * W, c[r][v]);
  };
  int first = 0;
  for (vf c[MR][V]; first + MR <= rows; first += MR) part(c, first, MR);
  for (vf c[4][V]; first + 4 <= rows; first += 4) part(c, first, 4);
  for (vf c[2][V]; first + 2 <= rows; first += 2) part(c, first, 2);
  for (vf c[1][V]; first < rows; first++) part(c, first, 1);
}
template <class P>
static inline void multiply_edge(
    const P* a, int64_t lda, int rows, const P* b, int64_t depth, int vectors, float* tile) {
  switch (vectors) {
#if defined(__AVX512F__)
    case 4: return multiply_edge<4>(a, lda, rows, b, depth, tile);
    case 3: return multiply_edge<3>(a, lda, rows, b, depth, tile);
#endif
    case 2: return multiply_edge<2>(a, lda, rows, b, depth, tile);
    default: return multiply_edge<1>(a, lda, rows, b, depth, tile);
  }
}

// One tile of at most MR rows and one panel. `sums` [rows][vectors * W] carries C from one part of
// the depth to the next: added unless `begins`, written unless `ends`, when the epilogue is called.
template <class P, class F>
__attribute__((always_inline)) static inline void tile_product(
    const P* a, int64_t lda, int rows, const P* b, int64_t depth, int vectors, float* sums,
    bool begins, bool ends, int64_t row, int64_t column, F& epilogue) {
  if (rows == MR && vectors == NV) {
    vf c[MR][NV];
#pragma GCC unroll 24
    for (int i = 0; i < MR * NV; i++) c[i / NV][i % NV] = vf{};
    multiply(a, lda, b, depth, c);
    if (!begins) {
#pragma GCC unroll 24
      for (int i = 0; i < MR * NV; i++) c[i / NV][i % NV] += load(sums + i * W);
    }
    if (!ends) {
#pragma GCC unroll 24
      for (int i = 0; i < MR * NV; i++) store(sums + i * W, c[i / NV][i % NV]);
      return;
    }
#pragma GCC unroll 24
    for (int i = 0; i < MR * NV; i++)
      epilogue(row + i / NV, column + i % NV * W, c[i / NV][i % NV]);
    return;
  }
  alignas(64) float part[MR * NR];
  for (int i = 0; i < rows * vectors; i++) store(part + i * W, vf{});
  multiply_edge(a, lda, rows, b, depth, vectors, part);
  for (int i = 0; i < rows * vectors; i++) {
    const vf c = begins ? load(part + i * W) : load(part + i * W) + load(sums + i * W);
    if (ends) epilogue(row + i / vectors, column + i % vectors * W, c);
    else store(sums + i * W, c);
  }
}

static inline const float* operand_rows(const float* a, int64_t&, int, int64_t, float*) {
  return a;
}
// Rows of A as the processor multiplies them.
template <class P>
static inline const P* operand_rows(const bf16* a, int64_t& lda, int rows, int64_t depth, P* wide) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(P) == 2) return a;
#endif
  for (int r = 0; r < rows; r++)
    for (int64_t k = 0; k < depth; k += W)
      store_up_to(wide + r * DEPTH + k, load_up_to(a + r * lda + k, depth - k), depth - k);
  lda = DEPTH;
  return wide;
}

// `part_of(column, width, k, depth)` gives that part of a panel, packed: once for every ROWS rows.
// GROUP panels take the same part of A, which stays in L2, before the next part.
template <class T, int GROUP, class A, class B, class F>
static inline void gemm_by(
    const A* a, int64_t lda, int64_t rows, int64_t depth, int64_t columns, B&& part_of,
    F&& epilogue) {
  alignas(64) float sums[GROUP * ROWS * NR];
  Packed<T> wide[sizeof(A) < sizeof(Packed<T>) ? MR * DEPTH : 1];
  for (int64_t top = 0; top < rows; top += ROWS) {
    const int64_t bottom = top + ROWS < rows ? top + ROWS : rows;
    for (int64_t left = 0; left < columns; left += GROUP * NR) {
      const int64_t right = left + GROUP * NR < columns ? left + GROUP * NR : columns;
      int64_t k = 0;
      do {  // once even without any depth, when C is 0
        const int64_t part = depth - k < PART<T> ? depth - k : PART<T>;
        for (int64_t column = left; column < right; column += NR) {
          const int64_t width = padded_columns(right - column < NR ? right - column : NR);
          const Packed<T>* from = part_of(column, width, k, part);
          float* sum = sums + (column - left) * ROWS;
          for (int64_t row = top; row < bottom; row += MR) {
            const int count = static_cast<int>(bottom - row < MR ? bottom - row : MR);
            int64_t stride = lda;
            const Packed<T>* x = operand_rows(a + row * lda + k, stride, count, part, wide);
            tile_product(
                x, stride, count, from, part, static_cast<int>(width / W),
                sum + (row - top) * width, k == 0, k + part == depth, row, column, epilogue);
          }
        }
        k += part;
      } while (k < depth);
    }
  }
}

template <class T, class A, class F>
static inline void gemm(
    const A* a, int64_t lda, int64_t rows, const Packed<T>* b, int64_t depth, int64_t columns,
    F&& epilogue) {
  gemm_by<T, 1>(a, lda, rows, depth, columns,
                [&](int64_t column, int64_t width, int64_t k, int64_t) {
                  return panel<T>(b, depth, column) + k * width;
                },
                epilogue);
}

// Not inlined: beside a transposition GCC 12 holds the accumulators of a product in memory.
template <class T>
__attribute__((noinline)) static void pack_part_rows(
    const T* w, int64_t ldw, int64_t n, int64_t depth, int64_t width, Packed<T>* b) {
  pack_panel_rows(w, ldw, n, depth, width, b);
}
template <class T>
__attribute__((noinline)) static void pack_part_columns(
    const T* v, int64_t ldv, int64_t n, int64_t depth, int64_t width, Packed<T>* b) {
  pack_panel_columns(v, ldv, depth, n, width, b);
}

// The same, bit for bit, of an unpacked B: for few rows, with which memory would be written and
// read again for nothing. A part of a panel is packed in L1 and used there.
constexpr int GROUP = 64 / NR;
template <class T, class A, class B, class F>
static inline void gemm_packing(
    const A* a, int64_t lda, int64_t rows, int64_t depth, int64_t columns, B&& pack,
    F&& epilogue) {
  alignas(64) Packed<T> b[PART<T> * NR];
  gemm_by<T, GROUP>(a, lda, rows, depth, columns,
                    [&](int64_t column, int64_t width, int64_t k, int64_t part) {
                      const int64_t n = columns - column < NR ? columns - column : NR;
                      pack(column, n, k, part, width, b);
                      return b;
                    },
                    epilogue);
}
template <class T, class A, class F>
static inline void gemm_rows(
    const A* a, int64_t lda, int64_t rows, const T* w, int64_t ldw, int64_t depth, int64_t columns,
    F&& epilogue) {
  gemm_packing<T>(a, lda, rows, depth, columns,
                  [=](int64_t column, int64_t n, int64_t k, int64_t part, int64_t width, auto* b) {
                    pack_part_rows<T>(w + column * ldw + k, ldw, n, part, width, b);
                  },
                  epilogue);
}
template <class T, class A, class F>
static inline void gemm_columns(
    const A* a, int64_t lda, int64_t rows, const T* v, int64_t ldv, int64_t depth, int64_t columns,
    F&& epilogue) {
  gemm_packing<T>(a, lda, rows, depth, columns,
                  [=](int64_t column, int64_t n, int64_t k, int64_t part, int64_t width, auto* b) {
                    pack_part_columns<T>(v + k * ldv + column, ldv, n, part, width, b);
                  },
                  epilogue);
}

}  // namespace univigu::cpu::UNIVIGU_ISA
