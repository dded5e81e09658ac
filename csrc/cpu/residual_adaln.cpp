#include "residual_adaln.h"

#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

// sum = x + gate * y, rounded, then + constant, rounded -> its mean
template <class X, class Y>
UNIVIGU_ROW float add_gated(const X* x, const Y* y, const float* gate, const float* constant,
                            X* sum, int64_t D) {
  Sum total;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf branch = lanes.load(y + i);
    const vf gated = gate ? lanes.load(gate + i) * branch : branch;
    vf value = rounded(lanes.load(x + i) + gated, x);
    if (constant) value = rounded(value + lanes.load(constant + i), x);
    total.parts[k] += value;
    lanes.store(sum + i, value);
  });
  return total.total() / D;
}

template <class X, class Y, class H>
static void forward(const ResidualAdalnArgs& a, X*, Y*, H*) {
  const Joint& j = a.joint;
  parallel(j.run, 0, j.B * j.L, grain_of(j.D), [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at++) {
      const int64_t b = at / j.L, l = at % j.L, text = l >= j.video_rows;
      X* sum = row_of<X>(a.sum, b, l);
      const float mean = add_gated(row_of<X>(a.x, b, l), row_of<Y>(a.y, b, l),
                                   row_of(a.gate, b, text), row_of(a.constant, b, text), sum, j.D);
      const float rstd = rstd_of(sum, j.D, mean, a.eps[text]);
      a.stats[2 * at] = mean;
      a.stats[2 * at + 1] = rstd;
      modulate(sum, row_of<H>(a.h, b, l), j.D, mean, rstd, row_of(a.weight, b, text),
               row_of(a.shift, b, text));
    }
  });
}

// The rows that a chunk reads, writes and adds to, beside those of the norm.
template <class X, class Y>
struct Branch {
  const X* dsum;
  const Y* y;
  const float* gate;
  X* dx;
  Y* dy;
  float* dgate;
};

template <class X, class Y, class H>
UNIVIGU_ROW void gradient_row(const NormRow<X, H>& row, Means means, const Branch<X, Y>& branch,
                              int64_t D) {
  columns(D, [&](int64_t i, int, auto lanes) {
    const vf d = lanes.load(branch.dsum + i) + input_gradient(row, means, i, lanes);
    lanes.store(branch.dx + i, d);
    if (branch.gate) {
      lanes.store(branch.dy + i, d * lanes.load(branch.gate + i));
      lanes.store(branch.dgate + i, lanes.load(branch.dgate + i) + d * lanes.load(branch.y + i));
    } else {
      lanes.store(branch.dy + i, d);
    }
  });
}

template <class X, class Y, class H>
static void backward(const ResidualAdalnBackwardArgs& a, X*, Y*, H*) {
  const Joint& j = a.joint;
  const int64_t sums = a.gate.data ? 3 : 2;
  over_chunks(j, [&](int64_t chunk, int64_t b, int64_t text, int64_t first, int64_t last) {
    float *dweight = a.partial + chunk * sums * j.D, *dshift = dweight + j.D;
    clear(dweight, sums * j.D);
    const float *weight = row_of(a.weight, b, text), *gate = row_of(a.gate, b, text);
    for (int64_t l = first; l < last; l++) {
      const float* stats = a.stats + 2 * (b * j.L + l);
      const NormRow<X, H> row{row_of<X>(a.sum, b, l), row_of<H>(a.dh, b, l), weight, stats[0],
                              stats[1]};
      const Branch<X, Y> branch{row_of<X>(a.dsum, b, l), gate ? row_of<Y>(a.y, b, l) : nullptr,
                                gate, row_of<X>(a.dx, b, l), row_of<Y>(a.dy, b, l),
                                dshift + j.D};
      gradient_row(row, add_row(row, j.D, dweight, dshift), branch, j.D);
    }
  });
  reduce_chunks(j, a.partial, sums * j.D, a.dweight);
  reduce_chunks(j, a.partial, sums * j.D, a.dshift, j.D);
  if (a.gate.data) reduce_chunks(j, a.partial, sums * j.D, a.dgate, 2 * j.D);
}

void residual_adaln(const ResidualAdalnArgs& a) {
  typed(a.x, [&](auto* x) {
    typed(a.y, [&](auto* y) { typed(a.h, [&](auto* h) { forward(a, x, y, h); }); });
  });
}

void residual_adaln_backward(const ResidualAdalnBackwardArgs& a) {
  typed(a.sum, [&](auto* x) {
    typed(a.dy, [&](auto* y) { typed(a.dh, [&](auto* h) { backward(a, x, y, h); }); });
  });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
