// Flash attention, backward, in 5 products. With P the softmax, recomputed from the log-sum-exp,
// and D = rowsum(do * o): dv = P^T do; dS = P * (do v^T - D); dk = dS^T q / sqrt(K);
// dq = dS k / sqrt(K). A task walks the keys of one part of a head and, for each tile of them, the
// queries in blocks; all is transposed (rows are keys), so that P and dS leave one product as the
// operand of the next. dq is gathered transposed, one sum for each part of the keys.
#include "flash.h"

namespace univigu::cpu::UNIVIGU_ISA {
namespace {

constexpr int64_t TILE = 16 * MR, BLOCK = 192;  // keys, queries
constexpr int64_t STRIDE = BLOCK + 16;

// What a task holds between two products, and the gradients of its tile of keys.
template <class P>
struct State {
  alignas(64) float p[TILE * STRIDE];
  P p_operand[TILE * STRIDE], ds[TILE * STRIDE], ds_packed[(TILE + 1) * STRIDE];
  float dk[TILE * WIDEST_HEAD], dv[TILE * WIDEST_HEAD];
};

template <class T>
struct Backward {
  using P = Packed<T>;
  const AttentionBackwardArgs& args;
  const Attention& a;
  const Tiles tiles, blocks;
  const int64_t splits, heads, places, D, rows_size, columns_size, dq_size, k_stride;
  float* const dq;  // [heads, splits, D, places]
  float *const lse, *const lse_rest, *const delta;  // [heads, places]; lse in log2, in two floats
  P *const q_rows, *const do_rows, *const q_columns, *const do_columns;
  P* const k_turned;  // [heads, D, k_stride]

  explicit Backward(const AttentionBackwardArgs& args)
      : args(args), a(args.a), tiles(key_tiles(a, TILE)), blocks(query_tiles(a, BLOCK)),
        splits(key_splits(a)), heads(a.B * a.H), places(blocks.places()), D(padded_columns(a.D)),
        rows_size(packed_size<T>(a.D, places)), columns_size(packed_size<T>(places, a.D)),
        dq_size(D * places), k_stride(padded_columns(a.L)), dq(args.room),
        lse(dq + heads * splits * dq_size), lse_rest(lse + heads * places),
        delta(lse_rest + heads * places),
        q_rows(reinterpret_cast<P*>(delta + heads * places)), do_rows(q_rows + heads * rows_size),
        q_columns(do_rows + heads * rows_size), do_columns(q_columns + heads * columns_size),
        k_turned(do_columns + heads * columns_size) {}

  int64_t rows_at(int64_t head, int64_t block) const {
    return head * rows_size + padded_depth<T>(a.D) * blocks.place(block);
  }
  int64_t columns_at(int64_t head, int64_t block) const {
    return head * columns_size + D * blocks.place(block);
  }

  void pack_queries(int64_t head, int64_t block) const {
    const int64_t b = head / a.H, h = head % a.H, first = blocks.first(block);
    const int64_t n = least(blocks.end(block), live_queries(a, b)) - first;
    if (n <= 0) return;
    const T* q = head_of<T>(a.q, b, h) + first * a.q.row;
    const T* g = head_of<T>(args.out_gradient, b, h) + first * args.out_gradient.row;
    const T* o = head_of<T>(args.o, b, h) + first * args.o.row;
    pack_rows(q, a.q.row, n, a.D, q_rows + rows_at(head, block));
    pack_rows(g, args.out_gradient.row, n, a.D, do_rows + rows_at(head, block));
    pack_columns(q, a.q.row, n, a.D, q_columns + columns_at(head, block));
    pack_columns(g, args.out_gradient.row, n, a.D, do_columns + columns_at(head, block));
    const int64_t at = head * places + blocks.place(block);
    for (int64_t i = 0; i < padded_columns(n); i++) {
      vf products{};
      for (int64_t j = 0; i < n && j < a.D; j += W)
        products += load_up_to(g + i * args.out_gradient.row + j, a.D - j) *
                    load_up_to(o + i * args.o.row + j, a.D - j);
      delta[at + i] = sum(products);
      const double log2_sum = i < n ? args.lse[head * a.Q + first + i] * LOG2E : 0;
      lse[at + i] = static_cast<float>(log2_sum);
      lse_rest[at + i] = static_cast<float>(log2_sum - lse[at + i]);
    }
  }

  // W keys of k, transposed.
  void turn_keys(int64_t head, int64_t key) const {
    const int64_t b = head / a.H, h = head % a.H, limit = key_limit(a, b);
    const T* k = head_of<T>(a.k, b, h);
    for (int64_t j = 0; j < a.D; j += W) {
      vf x[W];
      for (int i = 0; i < W; i++)
        x[i] = key + i < limit ? load_up_to(k + (key + i) * a.k.row + j, a.D - j) : vf{};
      transpose(x);
      for (int i = 0; i < W && j + i < a.D; i++)
        store_operand(k_turned + (head * a.D + j + i) * k_stride + key, x[i]);
    }
  }

  // All queries that see the keys key .. key + n.
  void walk(State<P>& state, int64_t head, int64_t key, int64_t n, float* dq_part) const {
    const int64_t b = head / a.H, h = head % a.H, stop = live_queries(a, b);
    const bool blind = key >= a.video_keys;
    const T* k = head_of<T>(a.k, b, h) + key * a.k.row;
    const T* v = head_of<T>(a.v, b, h) + key * a.v.row;
    const float scale = softmax_scale(a);
    for (int64_t i = blind ? blocks.before : 0; i < blocks.count && blocks.first(i) < stop; i++) {
      const int64_t m = least(blocks.end(i), stop) - blocks.first(i), place = blocks.place(i);
      const float* row_lse = lse + head * places + place;
      const float* row_rest = lse_rest + head * places + place;
      const float* row_delta = delta + head * places + place;
      gemm<T>(k, a.k.row, n, q_rows + rows_at(head, i), a.D, m, [&](int64_t r, int64_t j, vf x) {
        vf log2_p = x * scale - load(row_lse + j);
        if constexpr (sizeof(P) == sizeof(float)) log2_p -= load(row_rest + j);
        const vf p = exp2<P>(log2_p);
        store(state.p + r * STRIDE + j, p);
        store_operand(state.p_operand + r * STRIDE + j, p);
      });
      gemm<T>(v, a.v.row, n, do_rows + rows_at(head, i), a.D, m, [&](int64_t r, int64_t j, vf x) {
        const vf p = load(state.p + r * STRIDE + j);
        store_operand(state.ds + r * STRIDE + j, p * (x - load(row_delta + j)));
      });
      const auto add_to = [](float* sums, int64_t stride) {
        return [=](int64_t r, int64_t j, vf x) {
          store(sums + r * stride + j, load(sums + r * stride + j) + x);
        };
      };
      gemm<T>(state.p_operand, STRIDE, n, do_columns + columns_at(head, i), m, a.D,
              add_to(state.dv, WIDEST_HEAD));
      gemm<T>(state.ds, STRIDE, n, q_columns + columns_at(head, i), m, a.D,
              add_to(state.dk, WIDEST_HEAD));
      pack_operand(state, n, m);
      gemm<T>(k_turned + head * a.D * k_stride + key, k_stride, a.D, state.ds_packed, n, m,
              add_to(dq_part + place, places));
    }
  }
  static void pack_operand(State<P>& state, int64_t n, int64_t m) {
    if constexpr (sizeof(P) == sizeof(T))
      pack_columns<T>(state.ds, STRIDE, n, m, state.ds_packed);
    else
      pack_columns<P>(state.ds, STRIDE, n, m, state.ds_packed);
  }

  void keys(int64_t head, int64_t split) const {
    const int64_t b = head / a.H, h = head % a.H, limit = key_limit(a, b);
    float* dq_part = dq + (head * splits + split) * dq_size;
    __builtin_memset(dq_part, 0, dq_size * sizeof(float));
    State<P> state;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(a.D));
    for (int64_t i = tiles.count * split / splits; i < tiles.count * (split + 1) / splits; i++) {
      const int64_t key = tiles.first(i), end = tiles.end(i);
      const int64_t n = most(0, least(end, limit) - key);
      __builtin_memset(state.dk, 0, sizeof state.dk);
      __builtin_memset(state.dv, 0, sizeof state.dv);
      if (n > 0) walk(state, head, key, n, dq_part);
      for (int64_t r = 0; r < end - key; r++)
        for (int64_t j = 0; j < a.D; j += W) {
          const float* at = state.dk + r * WIDEST_HEAD + j;
          T* dk = head_of<T>(args.dk, b, h) + (key + r) * args.dk.row + j;
          T* dv = head_of<T>(args.dv, b, h) + (key + r) * args.dv.row + j;
          store_up_to(dk, load(at) * scale, a.D - j);
          store_up_to(dv, load(state.dv + r * WIDEST_HEAD + j), a.D - j);
        }
    }
  }

  // W queries of dq.
  void finish(int64_t head, int64_t block, int64_t row) const {
    const int64_t b = head / a.H, h = head % a.H, first = blocks.first(block) + row;
    const int64_t n = least(W, blocks.end(block) - first), real = live_queries(a, b) - first;
    const float scale = 1 / __builtin_sqrtf(static_cast<float>(a.D));
    T* to = head_of<T>(args.dq, b, h) + first * args.dq.row;
    const float* from = dq + head * splits * dq_size + blocks.place(block) + row;
    for (int64_t j = 0; j < a.D; j += W) {
      vf x[W];
      for (int i = 0; i < W; i++) {
        x[i] = vf{};
        for (int64_t s = 0; s < splits && j + i < a.D; s++)
          x[i] += load(from + s * dq_size + (j + i) * places);
      }
      transpose(x);
      for (int64_t i = 0; i < n; i++)
        store_up_to(to + i * args.dq.row + j, i < real ? x[i] * scale : vf{}, a.D - j);
    }
  }
};

template <class T>
void backward(const AttentionBackwardArgs& args) {
  const Backward<T> f(args);
  const int64_t blocks = f.blocks.count, vectors = f.k_stride / W;
  parallel(f.a.run, 0, f.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f.pack_queries(i / blocks, i % blocks);
  });
  parallel(f.a.run, 0, f.heads * vectors, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f.turn_keys(i / vectors, i % vectors * W);
  });
  parallel(f.a.run, 0, f.heads * f.splits, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) f.keys(i / f.splits, i % f.splits);
  });
  parallel(f.a.run, 0, f.heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t block = i % blocks, rows = f.blocks.end(block) - f.blocks.first(block);
      for (int64_t row = 0; row < rows; row += W) f.finish(i / blocks, block, row);
    }
  });
}

}  // namespace

void attention_backward(const AttentionBackwardArgs& args) {
  args.a.low ? backward<bf16>(args) : backward<float>(args);
}

}  // namespace univigu::cpu::UNIVIGU_ISA
