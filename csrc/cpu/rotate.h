// The rotation of a head, with the angles of its row.
#pragma once
#include "rope3d.h"
#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

static inline void copy(const float* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i++) to[i] = from[i];
}

// Of one row, for all its heads. Video: by channel, the sine negated in the first of a pair, so
// that a pair turns into x * cosine + (x with the two swapped) * sine. Text: by pair.
struct Angles {
  float cosine[MAX_HEAD_DIM], sine[MAX_HEAD_DIM];
  bool text;

  // direction: 1, or -1 to turn back.
  void take(const Rotary& r, int64_t l, float direction) {
    text = l >= r.video_rows;
    text ? take_text(r.text + (l - r.video_rows) * r.K, r.K / 2, direction)
         : take_video(r, l, direction);
  }

  void take_text(const float* table, int64_t pairs, float direction) {
    for (int64_t i = 0; i < pairs; i++) {
      cosine[i] = table[2 * i];
      sine[i] = direction * table[2 * i + 1];
    }
  }

  __attribute__((flatten)) void take_video(const Rotary& r, int64_t l, float direction) {
    const int64_t line = l / r.width, across_t = 2 * r.pairs_t, across_h = 2 * r.pairs_h;
    const int64_t across_w = r.K - across_t - across_h;
    copy(r.t + line / r.height * across_t, across_t, cosine);
    copy(r.h + line % r.height * across_h, across_h, cosine + across_t);
    copy(r.w + l % r.width * across_w, across_w, cosine + across_t + across_h);
    const vf signs = __builtin_convertvector((lane() & 1) * 2 - 1, vf) * direction;
    columns(r.K, [&](int64_t i, int, auto lanes) {
      const vf pairs = lanes.load(cosine + i);
      lanes.store(cosine + i, __builtin_shuffle(pairs, lane() & ~1));
      lanes.store(sine + i, __builtin_shuffle(pairs, lane() | 1) * signs);
    });
  }
};

// out(channel, k, lanes, turned) for every vector of channels in(channel, lanes) of a head; k as in
// `columns`.
template <class In, class Out>
static inline void rotate(const Angles& angles, int64_t K, In&& in, Out&& out) {
  if (angles.text) {
    const int64_t half = K / 2;
    columns(half, [&](int64_t i, int k, auto lanes) {
      const vf x0 = in(i, lanes), x1 = in(i + half, lanes);
      const vf cosine = lanes.load(angles.cosine + i), sine = lanes.load(angles.sine + i);
      out(i, k, lanes, x0 * cosine - x1 * sine);
      out(i + half, k, lanes, x0 * sine + x1 * cosine);
    });
  } else {
    columns(K, [&](int64_t i, int k, auto lanes) {
      const vf x = in(i, lanes), swapped = __builtin_shuffle(x, lane() ^ 1);
      const vf cosine = lanes.load(angles.cosine + i), sine = lanes.load(angles.sine + i);
      out(i, k, lanes, x * cosine + swapped * sine);
    });
  }
}

}  // namespace univigu::cpu::UNIVIGU_ISA
