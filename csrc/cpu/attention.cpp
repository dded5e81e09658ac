// Flash attention, forward. K and V of a head are packed once, for all its queries; of few queries,
// where they are used. A tile of queries then walks the keys in blocks: scores, online softmax, and
// the product with the values.
#include "flash.h"

namespace univigu::cpu::UNIVIGU_ISA {
namespace {

constexpr int64_t BLOCK = DEPTH;
constexpr int64_t STRIDE = BLOCK + 16;  // a power of two would put a column into one cache set
constexpr float LOWEST = -3.0e38f;

// The state of one tile of queries.
template <int64_t TILE>
struct State {
  alignas(64) float scores[TILE * STRIDE];
  float o[TILE * WIDEST_HEAD];  // not yet divided by the sum
  float top[TILE], total[TILE], shrink[TILE];  // top in units of log2
};

// Scores of one query against n keys -> probabilities relative to the new maximum, in place, as
// operands of the next product.
template <class P, class S>
static void softmax_row(S& state, int64_t row, int64_t n, float scale) {
  float* s = state.scores + row * STRIDE;
  P* p = reinterpret_cast<P*>(s);
  for (int64_t i = n; i % W; i++) s[i] = LOWEST;
  vf tops[4] = {load(s), load(s), load(s), load(s)};
  int64_t i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) tops[j] = above(load(s + i + j * W), tops[j]);
  for (; i < n; i += W) tops[0] = above(load(s + i), tops[0]);
  const float before = state.top[row];
  float top = max_of(max(max(tops[0], tops[1]), max(tops[2], tops[3]))) * scale;
  top = before > top ? before : top;
  vf sums[4] = {};
  for (i = 0; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; j++) {
      const vf y = exp2<P>(load(s + i + j * W) * scale - top);
      sums[j] += y;
      store_operand(p + i + j * W, y);
    }
  for (; i < n; i += W) {
    const vf y = exp2<P>(load(s + i) * scale - top);
    sums[0] += y;
    store_operand(p + i, y);
  }
  const float shrink = exp2<P>(splat(before - top))[0];
  state.top[row] = top;
  state.shrink[row] = shrink;
  state.total[row] = state.total[row] * shrink + sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T, bool FEW>
struct Forward {
  static constexpr int64_t TILE = FEW ? FEW_QUERIES : 8 * MR;
  const AttentionArgs& args;
  const Attention& a;
  const Tiles tiles, blocks;
  const int64_t keys_size, values_size;  // of one head
  Packed<T>*const keys, *const values;

  explicit Forward(const AttentionArgs& args)
      : args(args), a(args.a), tiles(query_tiles(a, TILE)), blocks(key_tiles(a, BLOCK)),
        keys_size(packed_size<T>(a.D, blocks.places())),
        values_size(packed_size<T>(blocks.places(), a.D)),
        keys(reinterpret_cast<Packed<T>*>(args.room)), values(keys + a.B * a.H * keys_size) {}

  Packed<T>* keys_of(int64_t head, int64_t block) const {
    return keys + head * keys_size + padded_depth<T>(a.D) * blocks.place(block);
  }
  Packed<T>* values_of(int64_t head, int64_t block) const {
    return values + head * values_size + padded_columns(a.D) * blocks.place(block);
  }

  void pack(int64_t head, int64_t block) const {
    const int64_t b = head / a.H, h = head % a.H, first = blocks.first(block);
    const int64_t n = least(blocks.end(block), key_limit(a, b)) - first;
    if (n <= 0) return;
    const T* k = head_of<T>(a.k, b, h) + first * a.k.row;
    const T* v = head_of<T>(a.v, b, h) + first * a.v.row;
    pack_rows(k, a.k.row, n, a.D, keys_of(head, block));
    pack_columns(v, a.v.row, n, a.D, values_of(head, block));
  }

  void tile(int64_t head, int64_t i) const {
    const int64_t b = head / a.H, h = head % a.H, first = tiles.first(i), end = tiles.end(i);
    const int64_t limit = key_limit(a, b), live = least(end, live_queries(a, b));
    const int64_t seen = i < tiles.before ? least(limit, a.video_keys) : limit;
    const int64_t rows = seen > 0 ? most(0, live - first) : 0;
    State<TILE> state;
    attend(state, head_of<T>(a.q, b, h) + first * a.q.row, rows, head, seen);
    T* o = head_of<T>(args.o, b, h) + first * args.o.row;
    float* lse = args.lse + head * a.Q + first;
    for (int64_t r = 0; r < end - first; r++, o += args.o.row) {
      const float inverse = r < rows ? 1 / state.total[r] : 0;
      const float* from = state.o + r * WIDEST_HEAD;
      for (int64_t j = 0; j < a.D; j += W)
        store_up_to(o + j, r < rows ? load(from + j) * inverse : vf{}, a.D - j);
      const double log2_sum = r < rows ? state.top[r] + __builtin_log2(state.total[r]) : 0;
      lse[r] = r < rows ? static_cast<float>(log2_sum * LN2) : -__builtin_inff();
    }
  }

  // Products with the n keys of a block, and with their values.
  template <class F>
  void scores(const T* q, int64_t rows, int64_t head, int64_t block, int64_t n, F&& put) const {
    if constexpr (FEW) {
      const T* k = head_of<T>(a.k, head / a.H, head % a.H) + blocks.first(block) * a.k.row;
      gemm_rows<T>(q, a.q.row, rows, k, a.k.row, a.D, n, put);
    } else {
      gemm<T>(q, a.q.row, rows, keys_of(head, block), a.D, n, put);
    }
  }
  template <class F>
  void outputs(const Packed<T>* p, int64_t p_stride, int64_t rows, int64_t head, int64_t block,
               int64_t n, F&& put) const {
    if constexpr (FEW) {
      const T* v = head_of<T>(a.v, head / a.H, head % a.H) + blocks.first(block) * a.v.row;
      gemm_columns<T>(p, p_stride, rows, v, a.v.row, n, a.D, put);
    } else {
      gemm<T>(p, p_stride, rows, values_of(head, block), n, a.D, put);
    }
  }

  void attend(State<TILE>& state, const T* q, int64_t rows, int64_t head, int64_t seen) const {
    const float scale = softmax_scale(a);
    const double log2_repeats = __builtin_log2(static_cast<double>(args.repeats));
    const float more = static_cast<float>(log2_repeats) / scale;
    for (int64_t r = 0; r < rows; r++) {
      state.top[r] = -__builtin_inff();
      state.total[r] = 0;
      for (int64_t j = 0; j < padded_columns(a.D); j++) state.o[r * WIDEST_HEAD + j] = 0;
    }
    const auto* p = reinterpret_cast<const Packed<T>*>(state.scores);
    constexpr int64_t p_stride = STRIDE * sizeof(float) / sizeof(Packed<T>);
    for (int64_t i = 0; rows > 0 && i < blocks.count && blocks.first(i) < seen; i++) {
      const int64_t n = least(blocks.end(i), seen) - blocks.first(i);
      scores(q, rows, head, i, n, [&](int64_t r, int64_t j, vf x) {
        store(state.scores + r * STRIDE + j, x);
      });
      if (args.repeats > 1 && blocks.end(i) == a.L)
        for (int64_t r = 0; r < rows; r++) state.scores[r * STRIDE + n - 1] += more;
      for (int64_t r = 0; r < rows; r++) softmax_row<Packed<T>>(state, r, n, scale);
      outputs(p, p_stride, rows, head, i, n, [&](int64_t r, int64_t j, vf x) {
        float* at = state.o + r * WIDEST_HEAD + j;
        store(at, load(at) * state.shrink[r] + x);
      });
    }
  }
};

template <class T, bool FEW>
void forward(const AttentionArgs& args) {
  const Forward<T, FEW> f(args);
  const int64_t heads = f.a.B * f.a.H, blocks = f.blocks.count, tiles = f.tiles.count;
  if constexpr (!FEW)
    parallel(f.a.run, 0, heads * blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f.pack(i / blocks, i % blocks);
    });
  parallel(f.a.run, 0, heads * tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f.tile(i / tiles, i % tiles);
  });
}

}  // namespace

void attention(const AttentionArgs& args) {
  const bool few = few_queries(args.a);
  if (args.a.low) few ? forward<bf16, true>(args) : forward<bf16, false>(args);
  else few ? forward<float, true>(args) : forward<float, false>(args);
}

}  // namespace univigu::cpu::UNIVIGU_ISA
