#include "rms_norm.h"

#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

template <class X>
UNIVIGU_ROW float norm_row(const X* x, X* y, const float* weight, int64_t D, float eps) {
  Sum squares;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf value = lanes.load(x + i);
    squares.parts[k] += value * value;
  });
  const float rstd = 1 / __builtin_sqrtf(squares.total() / D + eps);
  columns(D, [&](int64_t i, int, auto lanes) {
    lanes.store(y + i, lanes.load(x + i) * rstd * lanes.load(weight + i));
  });
  return rstd;
}

template <class X>
static void forward(const RmsNormArgs& a, X*) {
  const Joint& j = a.joint;
  parallel(j.run, 0, j.B * j.L, grain_of(j.D), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) {
      const int64_t b = at / j.L, l = at % j.L;
      a.rstd[at] = norm_row(row_of<X>(a.x, b, l), row_of<X>(a.y, b, l), a.weight, j.D, a.eps);
    }
  });
}

// With g = dy * weight: dx = rstd * (g - n * mean(g * n)), n = x * rstd; dweight += dy * n.
template <class X>
UNIVIGU_ROW void gradient_row(const X* x, const X* dy, X* dx, const float* weight, float rstd,
                              float* dweight, int64_t D) {
  Sum products;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf n = lanes.load(x + i) * rstd, d = lanes.load(dy + i);
    products.parts[k] += d * lanes.load(weight + i) * n;
    lanes.store(dweight + i, lanes.load(dweight + i) + d * n);
  });
  const float mean = products.total() / D;
  columns(D, [&](int64_t i, int, auto lanes) {
    const vf n = lanes.load(x + i) * rstd, g = lanes.load(dy + i) * lanes.load(weight + i);
    lanes.store(dx + i, rstd * (g - n * mean));
  });
}

template <class X>
static void backward(const RmsNormBackwardArgs& a, X*) {
  const Joint& j = a.joint;
  over_chunks(j, [&](int64_t chunk, int64_t b, int64_t, int64_t first, int64_t last) {
    float* dweight = a.partial + chunk * j.D;
    clear(dweight, j.D);
    for (int64_t l = first; l < last; l++) {
      gradient_row(row_of<X>(a.x, b, l), row_of<X>(a.dy, b, l), row_of<X>(a.dx, b, l), a.weight,
                   a.rstd[b * j.L + l], dweight, j.D);
    }
  });
  reduce_chunks(j, a.partial, j.D, {a.dweight, 1, 1});
}

void rms_norm(const RmsNormArgs& a) {
  typed(a.x, [&](auto* x) { forward(a, x); });
}

void rms_norm_backward(const RmsNormBackwardArgs& a) {
  typed(a.x, [&](auto* x) { backward(a, x); });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
