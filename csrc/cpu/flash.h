// What the forward and the backward of flash attention share.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace univigu::cpu::UNIVIGU_ISA {

constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t parts(int64_t n, int64_t part) { return (n + part - 1) / part; }

template <class T>
static inline T* head_of(const Heads& x, int64_t b, int64_t h) {
  return static_cast<T*>(x.data) + b * x.batch + h * x.head;
}

// What turns a product of q and k into a power of 2.
static inline float softmax_scale(const Attention& a) {
  return static_cast<float>(LOG2E / __builtin_sqrt(static_cast<double>(a.D)));
}

// Keys of sample b before its padding.
static inline int64_t key_limit(const Attention& a, int64_t b) {
  if (!a.lengths) return a.L;
  return a.video_rows + most(0, least(a.lengths[b], a.L - a.video_rows));
}

// Queries of sample b before its padding; a video query is never padding.
static inline int64_t live_queries(const Attention& a, int64_t b) {
  return most(a.video_queries, a.Q - (a.L - key_limit(a, b)));
}

// Rows in tiles of `size` (a multiple of W), cut at `split` too.
struct Tiles {
  int64_t size, split, rows, before, count;
  Tiles(int64_t size, int64_t split, int64_t rows)
      : size(size), split(split), rows(rows), before(parts(split, size)),
        count(before + parts(rows - split, size)) {}
  int64_t first(int64_t i) const { return i < before ? i * size : split + (i - before) * size; }
  int64_t end(int64_t i) const { return least(first(i) + size, i < before ? split : rows); }
  // Where a tile of whole vectors lies, and where the last ends.
  int64_t place(int64_t i) const {
    return i < before ? i * size : padded_columns(split) + (i - before) * size;
  }
  int64_t places() const { return padded_columns(split) + padded_columns(rows - split); }
};

// No tile of queries sees part of a tile of keys: both are cut where video ends, if it is blind.
static inline Tiles query_tiles(const Attention& a, int64_t size) {
  return {size, a.video_keys < a.L ? a.video_queries : 0, a.Q};
}
static inline Tiles key_tiles(const Attention& a, int64_t size) {
  return {size, a.video_keys < a.L ? a.video_keys : 0, a.L};
}

// a > b ? a : b, in one instruction: b where one is a NaN.
static inline vf above(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return max(a, b);
#endif
}

// 2^x for x <= 0, at least 2^-125; NaN for NaN. Relative error 9e-8, or 3e-6 where the result is
// rounded to bf16.
template <class P>
static inline vf exp2(vf x) {
  const vf inside = above(splat(-125.0f), x);
#if defined(__AVX512F__)
  const vf whole = _mm512_roundscale_ps(inside, 0);
#else
  const vf shifted = inside + 12582912.0f;  // 1.5 * 2^23: the sum rounds to integers
  const vf whole = shifted - 12582912.0f;
#endif
  const vf r = inside - whole;
  vf p;
  if constexpr (sizeof(P) == sizeof(float)) {
    p = r * 0.0013264591f + 0.0096716192f;
    p = p * r + 0.055507351f;
    p = p * r + 0.24022241f;
    p = p * r + 0.69314700f;
  } else {
    p = r * 0.0095827766f + 0.055907212f;
    p = p * r + 0.24024105f;
    p = p * r + 0.69312412f;
  }
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, whole);
#else
  const vf y = bits_of<vf>(bits_of<vi>(p) + (bits_of<vi>(shifted) << 23));
  return x == x ? y : x;
#endif
}

static inline void store_operand(float* p, vf x) { store(p, x); }
static inline void store_operand(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh y = _mm512_cvtneps_pbh(x);
  __builtin_memcpy(p, &y, sizeof y);
#else
  store(p, x);
#endif
}

}  // namespace univigu::cpu::UNIVIGU_ISA
