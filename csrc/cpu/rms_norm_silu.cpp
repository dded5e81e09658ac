#include "rms_norm_silu.h"

#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

constexpr int VECTORS = 4;  // of neighbouring pixels, whose sums are in registers

static inline vf root(vf x) {
  for (int i = 0; i < W; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// The limit keeps e^-n finite, as the reciprocal wants it; n * e^-80 is 0 beside any other number.
static inline vf silu(vf n) { return n * reciprocal(1.0f + exp(min(-n, splat(80)))); }

// N vectors of pixels; of the last one `left` pixels.
template <int N, class X>
UNIVIGU_ROW void norm_pixels(const X* x, X* y, const RmsNormSiluArgs& a, int64_t left) {
  const auto each = [&](auto&& f) {
    for (int64_t c = 0; c < a.C; c++) {
      for (int k = 0; k < N; k++) f(c, k, c * a.pixels + k * W);
    }
  };
  vf scale[N] = {};
  each([&](int64_t, int k, int64_t at) {
    const vf value = load_up_to(x + at, left - k * W);
    scale[k] += value * value;
  });
  const float sqrt_channels = __builtin_sqrtf(static_cast<float>(a.C));
  for (vf& s : scale) s = sqrt_channels / max(root(s), splat(1e-12f));
  each([&](int64_t c, int k, int64_t at) {
    const vf n = load_up_to(x + at, left - k * W) * scale[k] * a.gamma[c];
    store_up_to(y + at, silu(n), left - k * W);
  });
}

template <class X>
static void over_pixels(const RmsNormSiluArgs& a, X*) {
  constexpr int64_t block = VECTORS * W;
  const int64_t blocks = (a.pixels + block - 1) / block;
  parallel(a.run, 0, a.B * blocks, grain_of(a.C * block), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at++) {
      const int64_t b = at / blocks, first = at % blocks * block, left = a.pixels - first;
      const int64_t start = b * a.C * a.pixels + first;
      const X* x = static_cast<const X*>(a.x) + start;
      X* y = static_cast<X*>(a.y) + start;
      if (left >= block) {
        norm_pixels<VECTORS>(x, y, a, block);
      } else {
        for (int64_t i = 0; i < left; i += W) norm_pixels<1>(x + i, y + i, a, left - i);
      }
    }
  });
}

void rms_norm_silu(const RmsNormSiluArgs& a) {
  a.low ? over_pixels(a, static_cast<bf16*>(nullptr))
        : over_pixels(a, static_cast<float*>(nullptr));
}

}  // namespace univigu::cpu::UNIVIGU_ISA
