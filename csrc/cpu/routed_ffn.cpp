#include "routed_ffn.h"

#include "layer.h"

namespace univigu::cpu::UNIVIGU_ISA {

// gelu(a) = a * s by tanh: s = sigmoid(2u), u = sqrt(2 / pi) * (a + 0.044715 a^3).
struct Sigmoid {
  vf s, rest;  // rest = 1 - s, not by subtraction: a^3 times its error would be in the gradient
};
static inline Sigmoid sigmoid_2u(vf a) {
  const vf t = a * (a * a * -0.071354816f - 1.595769122f);
  const vf e = exp(t > 88.0f ? splat(88.0f) : t), s = reciprocal(e + 1.0f);
  return {s, e * s};
}

// Rows first .. first + count of sample b, which are one expert's; or, of few rows, all samples'.
struct Block {
  const RoutedFfnArgs& a;
  const ExpertArgs& expert;
  int64_t b, first, count;

  int64_t at() const { return b * a.L + first; }
};

// Columns of the hidden rows that are made at a time.
template <bool FEW>
constexpr int64_t STRIP = (FEW ? GROUP : 1) * NR;

// tile [count, STRIP] = columns of h up_weight^T. Not inlined: beside a gelu, GCC 12 holds the
// accumulators in memory, at half the speed.
template <class T, bool FEW>
__attribute__((noinline)) static void up_strip(const Block& k, int64_t column, float* tile) {
  const RoutedFfnArgs& a = k.a;
  const int64_t left = k.expert.F - column, n = left < STRIP<FEW> ? left : STRIP<FEW>;
  const T* h = static_cast<const T*>(a.h) + k.b * a.h_b + k.first * a.h_l;
  const auto put = [&](int64_t row, int64_t n, vf value) {
    store(tile + row * STRIP<FEW> + n, value);
  };
  if constexpr (FEW) {
    const T* up = static_cast<const T*>(k.expert.up_weight) + column * a.D;
    gemm_rows<T>(h, a.h_l, k.count, up, a.D, a.D, n, put);
  } else {
    const Packed<T>* up = reinterpret_cast<Packed<T>*>(k.expert.up_packed);
    gemm<T>(h, a.h_l, k.count, panel<T>(up, a.D, column), a.D, n, put);
  }
}

// Columns from .. to of hidden [count, F] = gelu(h up_weight^T + up_bias)
template <class T, bool FEW>
static void up(const Block& k, int64_t from, int64_t to, T* hidden) {
  const RoutedFfnArgs& a = k.a;
  const int64_t F = k.expert.F;
  const T* bias = static_cast<const T*>(k.expert.up_bias);
  T* before = a.a ? static_cast<T*>(a.a) + k.at() * a.a_l : nullptr;
  constexpr int64_t strip = STRIP<FEW>;
  alignas(64) float tile[(FEW ? FEW_ROWS : BLOCK) * strip];
  for (int64_t column = from; column < to; column += strip) {
    up_strip<T, FEW>(k, column, tile);
    for (int64_t row = 0; row < k.count; row++) {
      for (int64_t n = column; n < column + strip && n < F; n += W) {
        const vf x = load(tile + row * strip + n - column) + bias_at(bias, n, F);
        if (before) store_up_to(before + row * a.a_l + n, x, F - n);
        store_up_to(hidden + row * F + n, x * sigmoid_2u(x).s, F - n);
      }
    }
  }
}

// Columns from .. to of y = hidden down_weight^T + down_bias
template <class T, bool FEW>
__attribute__((noinline)) static void down(
    const Block& k, int64_t from, int64_t to, const T* hidden) {
  const int64_t F = k.expert.F, D = k.a.D;
  const T* bias = static_cast<const T*>(k.expert.down_bias);
  T* y = static_cast<T*>(k.a.y) + k.at() * D;
  const auto put = [&](int64_t row, int64_t column, vf value) {
    const int64_t n = from + column;
    store_up_to(y + row * D + n, value + bias_at(bias, n, D), D - n);
  };
  if constexpr (FEW) {
    const T* weight = static_cast<const T*>(k.expert.down_weight) + from * F;
    gemm_rows<T>(hidden, F, k.count, weight, F, F, to - from, put);
  } else {
    const Packed<T>* weight = reinterpret_cast<Packed<T>*>(k.expert.down_packed);
    gemm<T>(hidden, F, k.count, panel<T>(weight, F, from), F, to - from, put);
  }
}

// part(from, to) for every strip of columns, by all threads.
template <class F>
static void columns_of(ParallelFor run, int64_t columns, F&& part) {
  constexpr int64_t width = STRIP<true>;
  Tasks tasks(run, (columns + width - 1) / width);
  tasks.share([&](auto next) {
    for (int64_t task; next(task);) {
      const int64_t from = task * width;
      part(from, from + width < columns ? from + width : columns);
    }
  });
}

// All rows are few and one expert's: the threads share the columns, so that each packs its own.
template <class T>
static void run_few(const RoutedFfnArgs& a, const ExpertArgs& expert) {
  const Block all{a, expert, 0, 0, a.B * a.L};
  T* hidden = static_cast<T*>(__builtin_malloc(all.count * expert.F * sizeof(T)));
  columns_of(a.run, expert.F, [&](int64_t from, int64_t to) {
    up<T, true>(all, from, to, hidden);
  });
  columns_of(a.run, a.D, [&](int64_t from, int64_t to) { down<T, true>(all, from, to, hidden); });
  __builtin_free(hidden);
}

template <class T>
static void run(const RoutedFfnArgs& a) {
  const int64_t rows[2] = {a.video_rows, a.L - a.video_rows};
  const int64_t size[2] = {task_rows(rows[0]), task_rows(rows[1])};
  int64_t blocks[2], widest = 0;
  for (int e = 0; e < 2; e++) {
    const ExpertArgs& expert = a.experts[e];
    blocks[e] = (rows[e] + size[e] - 1) / size[e];
    if (rows[e] == 0 || a.B == 0) continue;
    if (!expert.up_packed) return run_few<T>(a, expert);
    widest = expert.F > widest ? expert.F : widest;
    pack_weight(a.run, static_cast<const T*>(expert.up_weight), a.D, expert.F, a.D,
                reinterpret_cast<Packed<T>*>(expert.up_packed));
    pack_weight(a.run, static_cast<const T*>(expert.down_weight), expert.F, a.D, expert.F,
                reinterpret_cast<Packed<T>*>(expert.down_packed));
  }
  const int64_t each = blocks[0] + blocks[1];
  Tasks tasks(a.run, a.B * each);
  tasks.share([&](auto next) {
    T* hidden = static_cast<T*>(__builtin_malloc(BLOCK * widest * sizeof(T)));
    for (int64_t task; next(task);) {
      const int64_t k = task % each, e = k >= blocks[0];
      const int64_t from = (e ? k - blocks[0] : k) * size[e];
      const int64_t count = rows[e] - from < size[e] ? rows[e] - from : size[e];
      const Block block{a, a.experts[e], task / each, (e ? a.video_rows : 0) + from, count};
      up<T, false>(block, 0, block.expert.F, hidden);  // which stays in L2
      down<T, false>(block, 0, a.D, hidden);
    }
    __builtin_free(hidden);
  });
}

void routed_ffn(const RoutedFfnArgs& a) { a.low ? run<bf16>(a) : run<float>(a); }

template <class T>
static void backward(const GeluBackwardArgs& g) {
  const T *a = static_cast<const T*>(g.a), *dhidden = static_cast<const T*>(g.dhidden);
  T *hidden = static_cast<T*>(g.hidden), *da = static_cast<T*>(g.da);
  parallel(g.run, 0, (g.elements + W - 1) / W, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * W; i < end * W && i < g.elements; i += W) {
      const int64_t n = g.elements - i;
      const vf x = load_up_to(a + i, n);
      const auto [s, rest] = sigmoid_2u(x);
      const vf slope = s + x * s * rest * (x * x * 0.214064448f + 1.595769122f);
      store_up_to(hidden + i, x * s, n);
      store_up_to(da + i, load_up_to(dhidden + i, n) * slope, n);
    }
  });
}

void gelu_backward(const GeluBackwardArgs& g) { g.low ? backward<bf16>(g) : backward<float>(g); }

}  // namespace univigu::cpu::UNIVIGU_ISA
