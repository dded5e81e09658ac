// Flash attention over [B, rows, H, D], forward and backward, for joint and cross attention.
#pragma once
#include "isa.h"

namespace univigu::cpu {

constexpr int64_t WIDEST_HEAD = 256;

// A tensor [B, rows, H, D]: strides in elements, 1 along D.
struct Heads {
  void* data;
  int64_t batch, row, head;
};

// Who attends to whom. Keys are [video ; text], those of a sample end after lengths[b] text keys,
// and as many queries at its end are padding, of the text ones. The leading `video_queries` queries
// see the leading `video_keys` keys, the others, which are the last rows of the text, all. Padding
// is never read; its outputs are zero.
struct Attention {
  ParallelFor run;
  bool low;  // bf16, not fp32
  int64_t B, Q, L, H, D;
  int64_t video_queries, video_rows, video_keys;
  const int64_t* lengths;  // or null
  Heads q, k, v;
};

struct AttentionArgs {
  Attention a;
  int64_t repeats;  // how many times the last key counts
  Heads o;
  float* lse;   // [B, H, Q], -inf for padding
  float* room;  // attention_room floats
};

struct AttentionBackwardArgs {
  Attention a;
  Heads o, out_gradient;
  const float* lse;
  Heads dq, dk, dv;
  float* room;  // attention_backward_room floats
};

// So few queries are one tile, which packs the keys and values where it uses them.
constexpr int64_t FEW_QUERIES = 48;
static inline bool few_queries(const Attention& a) { return a.Q <= FEW_QUERIES; }

// What any instruction set needs at most.
static inline int64_t whole_vectors(int64_t n) { return (n + 15) & -16; }
static inline int64_t attention_room(const Attention& a) {
  return few_queries(a) ? 0 : a.B * a.H * (a.L + 32) * 2 * whole_vectors(a.D);
}

// Parts of the keys that are walked by separate tasks, for 4 tasks or, of many keys, for 16. Not a
// matter of threads: dq is summed over the parts.
static inline int64_t key_splits(const Attention& a) {
  const int64_t heads = a.B * a.H + (a.B * a.H == 0), many = a.L / 1024, few = a.L / 256;
  const int64_t wanted = many > 1 ? (16 + heads - 1) / heads : (4 + heads - 1) / heads;
  const int64_t most = many > 1 ? many : few > 1 ? few : 1;
  return wanted < most ? wanted : most;
}
static inline int64_t attention_backward_room(const Attention& a) {
  const int64_t queries = a.Q + 32, keys = a.L + 32, D = whole_vectors(a.D);
  return a.B * a.H * (queries * (D * (4 + key_splits(a)) + 3) + keys * D);
}

UNIVIGU_KERNEL(attention, AttentionArgs)
UNIVIGU_KERNEL(attention_backward, AttentionBackwardArgs)

}  // namespace univigu::cpu
