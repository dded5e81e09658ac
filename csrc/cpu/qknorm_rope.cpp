#include "qknorm_rope.h"

#include "rotate.h"

namespace univigu::cpu::UNIVIGU_ISA {

// -> 1 / sqrt(mean(x^2) + eps)
template <class T>
UNIVIGU_ROW float forward_row(const Angles& angles, const T* x, const float* weight, T* out,
                              int64_t D, int64_t K, float eps) {
  Sum squares;
  columns(D, [&](int64_t i, int k, auto lanes) {
    const vf value = lanes.load(x + i);
    squares.parts[k] += value * value;
  });
  const float rstd = 1 / __builtin_sqrtf(squares.total() / D + eps);
  for (int64_t c = 0; c < D; c += K) {
    rotate(
        angles, K,
        [&](int64_t i, auto lanes) {
          return lanes.load(x + c + i) * rstd * lanes.load(weight + c + i);
        },
        [&](int64_t i, int, auto lanes, vf turned) { lanes.store(out + c + i, turned); });
  }
  return rstd;
}

template <class T>
static void forward(const QknormRopeArgs& a, T*) {
  const Joint& j = a.joint;
  parallel(j.run, 0, j.B * j.L, grain_of(2 * j.D), [&](int64_t first, int64_t last) {
    Angles angles;
    for (int64_t at = first; at < last; at++) {
      const int64_t b = at / j.L, l = at % j.L;
      angles.take(a.rotary, l, 1);
      for (int i = 0; i < 2; i++) {
        const float rstd = forward_row(angles, row_of<T>(a.x[i], b, l), a.weight[i],
                                       row_of<T>(a.out[i], b, l), j.D, a.rotary.K, a.eps);
        if (a.rstd) a.rstd[2 * at + i] = rstd;
      }
      if (a.v.data) {
        __builtin_memcpy(row_of<T>(a.v_out, b, l), row_of<T>(a.v, b, l), j.D * sizeof(T));
      }
    }
  });
}

// n = x * rstd, u = dout turned back, g = u * weight: dx = rstd * (g - n * mean(g * n)),
// dweight += u * n. `angles` turn back; `gradient` holds g.
template <class T>
UNIVIGU_ROW void backward_row(const Angles& angles, const T* x, const T* dout, const float* weight,
                              float rstd, T* dx, float* dweight, float* gradient, int64_t D,
                              int64_t K) {
  Sum dot;
  for (int64_t c = 0; c < D; c += K) {
    rotate(
        angles, K, [&](int64_t i, auto lanes) { return lanes.load(dout + c + i); },
        [&](int64_t i, int k, auto lanes, vf u) {
          const vf n = lanes.load(x + c + i) * rstd, g = u * lanes.load(weight + c + i);
          dot.parts[k] += g * n;
          lanes.store(gradient + c + i, g);
          lanes.store(dweight + c + i, lanes.load(dweight + c + i) + u * n);
        });
  }
  const float mean = dot.total() / D;
  columns(D, [&](int64_t i, int, auto lanes) {
    const vf n = lanes.load(x + i) * rstd;
    lanes.store(dx + i, rstd * (lanes.load(gradient + i) - n * mean));
  });
}

template <class T>
static void backward(const QknormRopeBackwardArgs& a, T*) {
  const Joint& j = a.joint;
  over_chunks(j, [&](int64_t chunk, int64_t b, int64_t, int64_t first, int64_t last) {
    float* partial = a.partial + chunk * 3 * j.D;
    clear(partial, 2 * j.D);
    Angles angles;
    for (int64_t l = first; l < last; l++) {
      angles.take(a.rotary, l, -1);
      for (int i = 0; i < 2; i++) {
        backward_row(angles, row_of<T>(a.x[i], b, l), row_of<T>(a.dout[i], b, l), a.weight[i],
                     a.rstd[2 * (b * j.L + l) + i], row_of<T>(a.dx[i], b, l), partial + i * j.D,
                     partial + 2 * j.D, j.D, a.rotary.K);
      }
    }
  });
  for (int i = 0; i < 2; i++) reduce_chunks(j, a.partial, 3 * j.D, a.dweight[i], i * j.D);
}

void qknorm_rope(const QknormRopeArgs& a) {
  typed(a.x[0], [&](auto* x) { forward(a, x); });
}

void qknorm_rope_backward(const QknormRopeBackwardArgs& a) {
  typed(a.x[0], [&](auto* x) { backward(a, x); });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
