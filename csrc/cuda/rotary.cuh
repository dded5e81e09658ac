// Where everything of a rotation lies: the position of a joint row, the angle of a pair, the
// channels of a thread. Functions of integers alone, so a host program checks all of them; it
// defines __host__, __device__ and __forceinline__ away.
//
// A vector is 16 bytes, E elements. A unit is two vectors, `half` = K/2 channels apart in one head:
// a text row pairs their elements with each other, a video row pairs neighbours within each. So
// both kinds of rows are read and written alike, in whole runs of consecutive bytes. A thread holds
// the same unit of several heads, which share its E angles.
#pragma once

namespace univigu::cuda {

struct alignas(8) Angle {
  float cos, sin;
};

// Divides 0 <= n < 2^31 by a constant: 32-bit division takes some 20 instructions of every thread.
struct Divider {
  unsigned multiplier;
  int shift, divisor;
};

__host__ inline Divider divider(int divisor) {
  int bits = 0;
  while ((1ll << bits) < divisor) bits++;
  const int d = divisor > 0 ? divisor : 1;  // an empty axis has no rows to divide
  return {static_cast<unsigned>(((1ull << (31 + bits)) + d - 1) / d), 31 + bits, divisor};
}

__host__ __device__ __forceinline__ int divide(int n, const Divider& d) {
  return static_cast<int>(static_cast<unsigned long long>(n) * d.multiplier >> d.shift);
}

// Tables of the axes [length, pairs] and of text [rows, half]; video row (i, j, k) of the grid is
// row (i * height + j) * width + k.
struct Rotary {
  const Angle *t, *h, *w, *text;
  int pairs_t, pairs_h, half;
  Divider height, width;
  int video_rows;
};

// The table rows of a joint row. Each pointer is shifted so that the pair's number among the K/2 of
// a head indexes it; a text row has one table.
struct Place {
  bool text;
  const Angle *t, *h, *w;
};

__host__ __device__ __forceinline__ Place place_of(const Rotary& r, int row) {
  if (row >= r.video_rows) {
    const Angle* text = r.text + static_cast<long long>(row - r.video_rows) * r.half;
    return {true, text, text, text};
  }
  const int line = divide(row, r.width), frame = divide(line, r.height);
  const int y = line - frame * r.height.divisor, x = row - line * r.width.divisor;
  const int before_w = r.pairs_t + r.pairs_h, pairs_w = r.half - before_w;
  return {false, r.t + frame * r.pairs_t, r.h + y * r.pairs_h - r.pairs_t,
          r.w + x * pairs_w - before_w};
}

// The angle of a pair: of the axes t, h, w in turn, or of text.
__host__ __device__ __forceinline__ const Angle* angle_of(
    const Rotary& r, const Place& p, int pair) {
  const Angle* table = pair < r.pairs_t ? p.t : pair < r.pairs_t + r.pairs_h ? p.h : p.w;
  return table + pair;
}

// The pair that angle i < E of unit `unit` of a head belongs to.
template <int E>
__host__ __device__ __forceinline__ int pair_of(const Rotary& r, bool text, int unit, int i) {
  const int low = text ? unit * E : unit * (E / 2);
  const int high = text ? low + E / 2 : low + r.half / 2;
  return i < E / 2 ? low + i : high + i - E / 2;
}

__host__ __device__ __forceinline__ void rotate_pair(float& x0, float& x1, Angle a) {
  const float turned = x0 * a.cos - x1 * a.sin;
  x1 = x0 * a.sin + x1 * a.cos;
  x0 = turned;
}

// Rotates a unit: x[0][E] are its low channels, x[1][E] those `half` further on.
template <int E>
__host__ __device__ __forceinline__ void rotate_unit(
    float (&x)[2][E], const Angle (&angles)[E], bool text) {
  for (int i = 0; i < E; i++) {
    const int v = i / (E / 2), at = 2 * (i % (E / 2));
    if (text) {
      rotate_pair(x[0][i], x[1][i], angles[i]);
    } else {
      rotate_pair(x[v][at], x[v][at + 1], angles[i]);
    }
  }
}

// How a row is spread over `warps` warps: `lanes` of their threads work, each on `units` units,
// one in every `heads_at_once`-th head. warps 0: the row does not fit a block.
struct Spread {
  int warps, units, units_per_head, heads_at_once;
};

constexpr int MAX_WARPS = 20;  // a backward row of 5120 channels in fp32

// At most `max_units` units a thread; the fewest idle places, then the fewest warps.
__host__ inline Spread spread(int heads, int half, int elements, int max_units) {
  Spread best{0, 0, half / elements, 0};
  for (int warps = 1; warps <= MAX_WARPS; warps++) {
    int at_once = 32 * warps / best.units_per_head;
    at_once = at_once < heads ? at_once : heads;
    if (at_once == 0) continue;
    const int units = (heads + at_once - 1) / at_once;
    if (units > max_units) continue;
    if (best.warps == 0 || warps * units < best.warps * best.units)
      best = {warps, units, best.units_per_head, at_once};
  }
  return best;
}

// What a thread works on: `unit` of the heads `head`, `head` + step, ...; head >= heads: nothing.
struct Share {
  int unit, head, step;
};

__host__ __device__ __forceinline__ Share share_of(const Spread& s, int heads, int thread) {
  const int head = thread / s.units_per_head;
  return {thread - head * s.units_per_head, head < s.heads_at_once ? head : heads,
          s.heads_at_once};
}

// Tiles of rows that fill the GPU once, for `samples` blocks side by side of `groups` rows at once
// on SMs that hold `resident` warps of the kernel.
__host__ inline int tiles_of(int rows, int samples, int groups, int warps, int resident, int sms) {
  const int blocks = sms * (resident / (warps * groups) > 0 ? resident / (warps * groups) : 1);
  const int most = (rows + groups - 1) / groups, share = blocks / (samples > 0 ? samples : 1);
  const int tiles = share < most ? share : most;
  return tiles > 1 ? tiles : 1;
}

// First row of a tile.
__host__ __device__ __forceinline__ int tile_start(int rows, int tile, int tiles) {
  return static_cast<int>(static_cast<long long>(rows) * tile / tiles);
}

}  // namespace univigu::cuda
