// Vectors of W floats in the language's own vector types, so that one text serves every
// instruction set; compiled once per set, in its namespace UNIVIGU_ISA.
#pragma once
#include "isa.h"

#if defined(__AVX512BF16__)
#define UNIVIGU_ISA avx512bf16
#elif defined(__AVX512F__)
#define UNIVIGU_ISA avx512
#elif defined(__AVX2__)
#define UNIVIGU_ISA avx2
#else
#define UNIVIGU_ISA portable
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace univigu::cpu::UNIVIGU_ISA {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

static inline vf splat(float x) { return vf{} + x; }

template <class To, class From>
static inline To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

static inline vf widen(vh x) { return bits_of<vf>(__builtin_convertvector(x, vu) << 16); }

// Rounds to nearest even; a NaN stays one. The instruction takes what is below 1e-38 for 0.
static inline vh narrow(vf x) {
#if defined(__AVX512BF16__)
  return bits_of<vh>(_mm512_cvtneps_pbh(bits_of<__m512>(x)));
#endif
  const vu u = bits_of<vu>(x);
  const vu rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : (u >> 16 | 0x40), vh);
}

static inline vf load(const float* p) {
  vf x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
static inline vf load(const bf16* p) {
  vh x;
  __builtin_memcpy(&x, p, sizeof x);
  return widen(x);
}
static inline void store(float* p, vf x) { __builtin_memcpy(p, &x, sizeof x); }
static inline void store(bf16* p, vf x) {
  const vh y = narrow(x);
  __builtin_memcpy(p, &y, sizeof y);
}

// The first n < W elements; zeros after them, which are not read.
template <class T>
static inline vf load_part(const T* p, int n) {
  T part[W] = {};
  for (int i = 0; i < n; i++) part[i] = p[i];
  return load(part);
}
template <class T>
static inline void store_part(T* p, vf x, int n) {
  T part[W];
  store(part, x);
  for (int i = 0; i < n; i++) p[i] = part[i];
}

// As load and store, of W elements or of the n that are left.
template <class T>
static inline vf load_up_to(const T* p, int64_t n) {
  return n >= W ? load(p) : load_part(p, static_cast<int>(n));
}
template <class T>
static inline void store_up_to(T* p, vf x, int64_t n) {
  n >= W ? store(p, x) : store_part(p, x, static_cast<int>(n));
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }
static inline vf min(vf a, vf b) { return a < b ? a : b; }

static inline float sum(vf x) {
  float parts[W], total = 0;
  store(parts, x);
  for (int i = 0; i < W; i++) total += parts[i];
  return total;
}
static inline float max_of(vf x) {
  float parts[W];
  store(parts, x);
  float top = parts[0];
  for (int i = 1; i < W; i++) top = parts[i] > top ? parts[i] : top;
  return top;
}

// (e^r - 1 - r) / r^2 for |r| <= log(2) / 2, from Cephes.
static inline vf exp_tail(vf r) {
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}

// e^x to 1 unit in the last place; 0 below -104 (elsewhere -87.3), inf above 88.7, NaN for NaN.
static inline vf exp(vf x) {
#if defined(__AVX512F__)
  // Of max and min the second operand is what a NaN gives.
  const __m512 low = _mm512_max_ps(_mm512_set1_ps(-104.0f), bits_of<__m512>(x));
  const vf inside = bits_of<vf>(_mm512_min_ps(_mm512_set1_ps(89.0f), low));
  const vf scaled = inside * 1.44269504f;
  const __m512 rounded = _mm512_roundscale_ps(bits_of<__m512>(scaled), _MM_FROUND_TO_NEAREST_INT);
  const vf n = bits_of<vf>(rounded);
  const vf r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  const vf p = exp_tail(r) * (r * r) + r + 1.0f;
  return bits_of<vf>(_mm512_scalef_ps(bits_of<__m512>(p), bits_of<__m512>(n)));
#else
  const vf low = splat(-87.33654f), high = splat(88.72283f);
  const vf inside = min(max(x, low), high);
  const vf shifted = inside * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum rounds to integers
  const vi n = bits_of<vi>(shifted) - 0x4B400000;
  const vf whole = shifted - 12582912.0f;
  const vf r = (inside - whole * 0.693359375f) + whole * 2.12194440e-4f;
  const vf p = exp_tail(r) * (r * r) + r + 1.0f;
  // 2^n in two factors: n = 128 alone has no float.
  const vi half = n >> 1;
  const vf y = p * bits_of<vf>((half + 127) << 23) * bits_of<vf>((n - half + 127) << 23);
  const vf limited = x > high ? splat(__builtin_inff()) : (x < low ? splat(0) : y);
  return x == x ? limited : x;
#endif
}

// 1 / x of a positive, finite x, to 1 unit in the last place.
static inline vf reciprocal(vf x) {
#if defined(__AVX512F__)
  const vf r = bits_of<vf>(_mm512_rcp14_ps(bits_of<__m512>(x)));
  return r * (2.0f - x * r);
#else
  return 1.0f / x;
#endif
}

}  // namespace univigu::cpu::UNIVIGU_ISA
