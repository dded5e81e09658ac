#include "rope3d.h"

#include "rotate.h"

namespace univigu::cpu::UNIVIGU_ISA {

template <class T>
UNIVIGU_ROW void rotate_row(const Angles& angles, const T* x, T* out, const Rope3dArgs& a) {
  const int64_t K = a.rotary.K;
  for (int64_t head = 0; head < a.H; head++, x += a.x_h, out += K) {
    rotate(
        angles, K, [&](int64_t i, auto lanes) { return lanes.load(x + i); },
        [&](int64_t i, int, auto lanes, vf turned) { lanes.store(out + i, turned); });
  }
}

template <class T>
static void rotate_rows(const Rope3dArgs& a, T*) {
  const int64_t grain = grain_of(a.H * a.rotary.K);
  parallel(a.run, 0, a.B * a.L, grain, [&](int64_t first, int64_t last) {
    Angles angles;
    for (int64_t at = first; at < last; at++) {
      const int64_t b = at / a.L, l = at % a.L;
      angles.take(a.rotary, l, a.inverse ? -1 : 1);
      rotate_row(angles, row_of<T>(a.x, b, l), row_of<T>(a.out, b, l), a);
    }
  });
}

void rope3d(const Rope3dArgs& a) {
  typed(a.x, [&](auto* x) { rotate_rows(a, x); });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
