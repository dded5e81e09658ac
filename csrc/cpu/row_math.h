// Loops over the channels of a row, and what adaln and residual_adaln share.
#pragma once
#include "rows.h"
#include "vec.h"

// On a function over a row: its loops are inlined into it, so its sums stay in registers.
#define UNIVIGU_ROW __attribute__((flatten)) static

namespace univigu::cpu::UNIVIGU_ISA {

struct Full {
  template <class T>
  vf load(const T* p) const { return cpu::UNIVIGU_ISA::load(p); }
  template <class T>
  void store(T* p, vf x) const { cpu::UNIVIGU_ISA::store(p, x); }
  vf only(vf x) const { return x; }
};

// The last n < W channels of a row.
struct Part {
  int n;
  template <class T>
  vf load(const T* p) const { return load_part(p, n); }
  template <class T>
  void store(T* p, vf x) const { store_part(p, x, n); }
  vf only(vf x) const {
    float part[W];
    UNIVIGU_ISA::store(part, x);
    return load_part(part, n);
  }
};

// f(first channel, k, Full or Part) over the channels; k < 4 is the sum that it may add to.
template <class F>
static inline void columns(int64_t D, F&& f) {
  int64_t i = 0;
  for (; i + 4 * W <= D; i += 4 * W) {
    f(i, 0, Full{});
    f(i + W, 1, Full{});
    f(i + 2 * W, 2, Full{});
    f(i + 3 * W, 3, Full{});
  }
  for (; i + W <= D; i += W) f(i, 0, Full{});
  if (i < D) f(i, 1, Part{static_cast<int>(D - i)});
}

static inline vi lane() {
  vi lane{};
  for (int i = 0; i < W; i++) lane[i] = i;
  return lane;
}

struct Sum {
  vf parts[4] = {};
  // In log2(W) dependent additions.
  float total() const {
    vf x = (parts[0] + parts[1]) + (parts[2] + parts[3]);
    for (int step = W / 2; step > 0; step /= 2) x += __builtin_shuffle(x, lane() ^ step);
    return x[0];
  }
};

template <class T>
static inline T* row_of(const Rows& t, int64_t b, int64_t l) {
  return static_cast<T*>(t.data) + b * t.b + l * t.l;
}
static inline const float* row_of(const Mod& mod, int64_t b, int64_t s) {
  return mod.data ? mod.data + b * mod.b + s * mod.s : nullptr;
}

// f(a null pointer, whose type is that of t's elements).
template <class F>
static inline void typed(const Rows& t, F&& f) {
  t.low ? f(static_cast<bf16*>(nullptr)) : f(static_cast<float*>(nullptr));
}

static inline vf rounded(vf x, const float*) { return x; }
static inline vf rounded(vf x, const bf16*) { return widen(narrow(x)); }

// 1 / sqrt(mean((x - mean)^2) + eps)
template <class X>
UNIVIGU_ROW float rstd_of(const X* x, int64_t D, float mean, float eps) {
  Sum squares;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf centred = lanes.only(lanes.load(x + i) - mean);
    squares.parts[k] += centred * centred;
  });
  return 1 / __builtin_sqrtf(squares.total() / D + eps);
}

// h = (x - mean) * rstd * weight + shift
template <class X, class H>
UNIVIGU_ROW void modulate(const X* x, H* h, int64_t D, float mean, float rstd,
                          const float* weight, const float* shift) {
  columns(D, [&](int64_t i, int, auto lanes) {
    const vf n = (lanes.load(x + i) - mean) * rstd;
    lanes.store(h + i, n * lanes.load(weight + i) + lanes.load(shift + i));
  });
}

// Norm of a row in the backward pass: n = (x - mean) * rstd, g = dh * weight.
template <class X, class H>
struct NormRow {
  const X* x;
  const H* dh;
  const float* weight;
  float mean, rstd;

  template <class Lanes>
  vf normed(int64_t i, Lanes lanes) const { return (lanes.load(x + i) - mean) * rstd; }
};

struct Means {
  float g, gn;
};

// Adds a row to dweight and dshift -> the means of g and of g * n.
template <class X, class H>
UNIVIGU_ROW Means add_row(const NormRow<X, H>& row, int64_t D, float* dweight, float* dshift) {
  Sum g_sum, gn_sum;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf n = row.normed(i, lanes), dh = lanes.load(row.dh + i);
    const vf g = dh * lanes.load(row.weight + i);
    g_sum.parts[k] += g;
    gn_sum.parts[k] += g * n;
    lanes.store(dweight + i, lanes.load(dweight + i) + dh * n);
    lanes.store(dshift + i, lanes.load(dshift + i) + dh);
  });
  return {g_sum.total() / D, gn_sum.total() / D};
}

// rstd * (g - mean(g) - n * mean(g * n)), the gradient of x
template <class X, class H, class Lanes>
static inline vf input_gradient(const NormRow<X, H>& row, Means means, int64_t i, Lanes lanes) {
  const vf g = lanes.load(row.dh + i) * lanes.load(row.weight + i);
  return row.rstd * (g - means.g - row.normed(i, lanes) * means.gn);
}

// f(chunk, sample, modality, first row, end) over the chunks of all samples.
template <class F>
static inline void over_chunks(const Joint& j, F&& f) {
  const int64_t video = chunks_of(j.video_rows), each = video + chunks_of(j.L - j.video_rows);
  parallel(j.run, 0, chunks_of(j), grain_of(CHUNK * j.D), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t k = chunk % each, text = k >= video;
      const int64_t first = text ? j.video_rows + (k - video) * CHUNK : k * CHUNK;
      const int64_t stop = text ? j.L : j.video_rows;
      f(chunk, chunk / each, text, first, first + CHUNK < stop ? first + CHUNK : stop);
    }
  });
}

static inline void clear(float* p, int64_t n) {
  for (int64_t i = 0; i < n; i++) p[i] = 0;
}

// Sums the partial sums [D] of the chunks into `gradient`, chunk after chunk. A chunk has `stride`
// numbers, those wanted are at `offset`.
static inline void reduce_chunks(const Joint& j, const float* partial, int64_t stride,
                                 const ModGradient& gradient, int64_t offset = 0) {
  constexpr int64_t BLOCK = 128;
  const int64_t video = chunks_of(j.video_rows), each = video + chunks_of(j.L - j.video_rows);
  const int64_t chunks = chunks_of(j), blocks = (j.D + BLOCK - 1) / BLOCK;
  parallel(j.run, 0, blocks, grain_of(chunks * BLOCK), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * BLOCK, stop = end * BLOCK < j.D ? end * BLOCK : j.D;
    for (int64_t row = 0; row < gradient.B * gradient.S; row++) {
      clear(gradient.data + row * j.D + first, stop - first);
    }
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t b = gradient.B > 1 ? chunk / each : 0;
      const int64_t s = gradient.S > 1 ? chunk % each >= video : 0;
      float* sum = gradient.data + (b * gradient.S + s) * j.D;
      const float* part = partial + chunk * stride + offset;
      for (int64_t i = first; i < stop; i++) sum[i] += part[i];
    }
  });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
