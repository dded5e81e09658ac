#include "adaln.h"

#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

template <class X>
UNIVIGU_ROW float mean_of(const X* x, int64_t D) {
  Sum sum;
  columns(D, [&](int64_t i, int k, auto lanes) { sum.parts[k] += lanes.load(x + i); });
  return sum.total() / D;
}

template <class X, class H>
static void forward(const AdalnArgs& a, X*, H*) {
  const Joint& j = a.joint;
  parallel(j.run, 0, j.B * j.L, grain_of(j.D), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) {
      const int64_t b = at / j.L, l = at % j.L, text = l >= j.video_rows;
      const X* x = row_of<X>(a.x, b, l);
      const float mean = mean_of(x, j.D), rstd = rstd_of(x, j.D, mean, a.eps[text]);
      a.stats[2 * at] = mean;
      a.stats[2 * at + 1] = rstd;
      modulate(x, row_of<H>(a.h, b, l), j.D, mean, rstd, row_of(a.weight, b, text),
               row_of(a.shift, b, text));
    }
  });
}

template <class X, class H>
UNIVIGU_ROW void gradient_row(const NormRow<X, H>& row, Means means, X* dx, int64_t D) {
  columns(D, [&](int64_t i, int, auto lanes) {
    lanes.store(dx + i, input_gradient(row, means, i, lanes));
  });
}

template <class X, class H>
static void backward(const AdalnBackwardArgs& a, X*, H*) {
  const Joint& j = a.joint;
  over_chunks(j, [&](int64_t chunk, int64_t b, int64_t text, int64_t first, int64_t last) {
    float *dweight = a.partial + chunk * 2 * j.D, *dshift = dweight + j.D;
    clear(dweight, 2 * j.D);
    const float* weight = row_of(a.weight, b, text);
    for (int64_t l = first; l < last; l++) {
      const float* stats = a.stats + 2 * (b * j.L + l);
      const NormRow<X, H> row{row_of<X>(a.x, b, l), row_of<H>(a.dh, b, l), weight, stats[0],
                              stats[1]};
      gradient_row(row, add_row(row, j.D, dweight, dshift), row_of<X>(a.dx, b, l), j.D);
    }
  });
  reduce_chunks(j, a.partial, 2 * j.D, a.dweight);
  reduce_chunks(j, a.partial, 2 * j.D, a.dshift, j.D);
}

void adaln(const AdalnArgs& a) {
  typed(a.x, [&](auto* x) {
    typed(a.h, [&](auto* h) { forward(a, x, h); });
  });
}

void adaln_backward(const AdalnBackwardArgs& a) {
  typed(a.x, [&](auto* x) {
    typed(a.dh, [&](auto* h) { backward(a, x, h); });
  });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
