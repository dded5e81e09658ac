#include "vocab_sample.h"

#include "layer.h"
#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

typedef uint64_t vl __attribute__((vector_size(4 * W)));

constexpr int64_t ROW_BLOCK = 16 * MR;  // rows of a task
// Limits of a maximum. Finite, so that -inf (a masked bias) gives exp(-inf), not NaN.
constexpr float FLOOR = -1e30f, CEILING = 1e30f, INF = __builtin_inff();

// The lower half of every x times m.
static inline vl product(vl x, uint32_t m) {
#if defined(__AVX512F__)
  return bits_of<vl>(_mm512_mul_epu32(bits_of<__m512i>(x), _mm512_set1_epi64(m)));
#elif defined(__AVX2__)
  return bits_of<vl>(_mm256_mul_epu32(bits_of<__m256i>(x), _mm256_set1_epi64x(m)));
#else
  return (x & 0xFFFFFFFF) * uint64_t{m};
#endif
}

// Philox-4x32-10 (Salmon et al., SC 2011) at key `seed` and counters (n, row, step, 0); 0 is the
// purpose DRAW of kernels/univigu_kernels/_philox.py. Until n has spread, two rounds are half done.
class Philox {
 public:
  Philox(int64_t seed, uint32_t row, uint32_t step) {
    uint32_t first = static_cast<uint32_t>(seed), second = static_cast<uint64_t>(seed) >> 32;
    for (int i = 0; i < 10; i++, first += 0x9E3779B9, second += 0xBB67AE85) {
      key0_[i] = first;
      key1_[i] = second;
    }
    const uint64_t b = uint64_t{M1} * step;
    const uint64_t a = uint64_t{M0} * (static_cast<uint32_t>(b >> 32) ^ row ^ key0_[0]);
    word0_ = static_cast<uint32_t>(b) ^ key0_[1];
    word2_ = static_cast<uint32_t>(a >> 32) ^ key1_[1];
    word3_ = static_cast<uint32_t>(a);
  }

  // The first word of every n.
  vu words(vu n) const {
    const vl left = half(bits_of<vl>(n)), right = half(bits_of<vl>(n) >> 32);
    return bits_of<vu>((left & 0xFFFFFFFF) | right << 32);
  }

 private:
  static constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57;
  uint64_t key0_[10], key1_[10], word0_, word2_, word3_;

  // Words are lower halves; what is above them is of no meaning.
  vl half(vl n) const {
    const vl first = product(n, M0), second = product((first >> 32) ^ key1_[0], M1);
    vl c0 = (second >> 32) ^ word0_, c1 = second, c2 = first ^ word2_, c3 = vl{} + word3_;
#pragma GCC unroll 8
    for (int i = 2; i < 10; i++) {
      const vl a = product(c0, M0), b = product(c2, M1);
      c0 = (b >> 32) ^ c1 ^ key0_[i];
      c2 = (a >> 32) ^ c3 ^ key1_[i];
      c1 = b;
      c3 = a;
    }
    return c0;
  }
};

// -log(u), u = ((word >> 8) + 0.5) * 2^-24, to 3e-7 of itself. fp32 rounds u above 1/2; what it
// loses there is exact and goes into the logarithm.
static inline vf waiting_time(vu word) {
  const vf grid = __builtin_convertvector(bits_of<vi>(word >> 8), vf) * 0x1p-24f;
  const vf u = grid + 0x1p-25f, lost = (grid - u) + 0x1p-25f;
  const vi bits = bits_of<vi>(u), exponent = (bits - 0x3F2AAAAB) & -0x800000;
  const vf r = bits_of<vf>(bits - exponent) - 1.0f + lost;  // u = 2^e (1 + r), |r| <= 1/3
  // log(1 + r) = r + r^2 q(r): q is minimax, off by 1.9e-7 of log(1 + r).
  vf q = r * -0.15266815f + 0.16990559f;
  q = q * r - 0.1644081f;
  q = q * r + 0.19818169f;
  q = q * r - 0.25006324f;
  q = q * r + 0.33336735f;
  q = q * r - 0.4999996f;
  return __builtin_convertvector(exponent, vf) * -8.2629586e-8f - (r + r * r * q);
}

// What a row has found so far, in W parts: its largest logit, the sum of exponentials below that,
// the least score -log(u) exp((peak - z) / temperature), or -z, and whose that is.
struct Found {
  vf peak = splat(FLOOR), total{}, score = splat(INF);
  vi token{};

  // `inverse` is 1 / temperature, or 0 where nothing is drawn.
  void raise(vf to, float inverse) {
    total *= exp(peak - to);
    if (inverse > 0) score *= exp((to - peak) * inverse);
    peak = to;
  }
  // Of equals the first stays.
  void take(vf other, vi whose) {
    token = other < score ? whose : token;
    score = other < score ? other : score;
  }
};

struct Winner {
  float peak, total, score;
  int32_t token;
};

static inline Winner winner(Found x, float inverse) {
  const float peak = max_of(x.peak);
  x.raise(splat(peak), inverse);
  const float score = -max_of(-x.score);
  int32_t token = INT32_MAX;
  for (int i = 0; i < W; i++)
    if (x.score[i] == score && x.token[i] < token) token = x.token[i];
  return {peak, sum(x.total), score, token};
}

// The logits z of `vectors` vectors of vocabulary rows from n.
template <bool DRAW>
UNIVIGU_ROW void take(Found& found, const float* z, int vectors, uint32_t n, const Philox& philox,
                      float inverse) {
  Found x = found;
  vf peak = x.peak;
  for (int v = 0; v < vectors; v++) peak = max(load(z + v * W), peak);  // peak where z is a NaN
  x.raise(min(peak, splat(CEILING)), inverse);
  for (int v = 0; v < vectors; v++) {
    const vf z_v = load(z + v * W), gap = x.peak - z_v;
    const vi token = lane() + static_cast<int32_t>(n + v * W);
    x.total += exp(-gap);
    if constexpr (DRAW) {
      const vf factor = exp(gap * inverse);
      x.take(waiting_time(philox.words(bits_of<vu>(token))) * factor, token);
    } else {
      x.take(-z_v, token);
    }
  }
  found = x;
}

template <class T>
class Task {
 public:
  explicit Task(const VocabSampleArgs& a)
      : a_(a), h_(static_cast<const T*>(a.h)), weight_(static_cast<const T*>(a.weight)),
        bias_(static_cast<const T*>(a.bias)) {}

  // Rows from `top`, vocabulary rows from `left`.
  void run(int64_t top, int64_t left, int64_t rows, int64_t size, float inverse) {
    Found found[ROW_BLOCK];
    for (int64_t n = left; n < left + size; n += NR) {
      const int64_t columns = left + size - n < NR ? left + size - n : NR;
      const int64_t width = padded_columns(columns);
      multiply_panel(top, rows, n, columns);
      for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = columns; i < width; i++) z_[r * NR + i] = -INF;
        const int64_t row = top + r;
        const Philox philox(a_.seeds[row / a_.T], static_cast<uint32_t>(row % a_.T), a_.step);
        (inverse > 0 ? take<true> : take<false>)(
            found[r], z_ + r * NR, static_cast<int>(width / W), static_cast<uint32_t>(n), philox,
            inverse);
      }
    }
    keep(found, top, left / SPLIT, rows, inverse);
  }

 private:
  const VocabSampleArgs& a_;
  const T *h_, *weight_, *bias_;
  alignas(64) float z_[ROW_BLOCK * NR];
  alignas(64) Packed<T> panel_[NR * DEPTH];

  // Logits of one panel, by parts of the depth: the weight is packed where it is used.
  void multiply_panel(int64_t top, int64_t rows, int64_t n, int64_t columns) {
    for (int64_t column = 0; column < columns; column += W) {
      const vf bias = bias_at(bias_, n + column, a_.N);
      for (int64_t r = 0; r < rows; r++) store(z_ + r * NR + column, bias);
    }
    for (int64_t k = 0; k < a_.D; k += DEPTH) {
      const int64_t depth = a_.D - k < DEPTH ? a_.D - k : DEPTH;
      pack_rows(weight_ + n * a_.weight_row + k, a_.weight_row, columns, depth, panel_);
      gemm<T>(h_ + top * a_.h_row + k, a_.h_row, rows, panel_, depth, columns,
              [&](int64_t row, int64_t column, vf value) {
                float* z = z_ + row * NR + column;
                store(z, load(z) + value);
              });
    }
  }

  void keep(const Found* found, int64_t top, int64_t split, int64_t rows, float inverse) {
    const int64_t splits = vocabulary_splits(a_.N), all = a_.B * a_.T * splits;
    for (int64_t r = 0; r < rows; r++) {
      const Winner best = winner(found[r], inverse);
      float* at = a_.parts + (top + r) * splits + split;
      at[0] = best.peak, at[all] = best.total, at[2 * all] = best.score;
      a_.part_tokens[(top + r) * splits + split] = best.token;
    }
  }
};

// Token and confidence of a row from what its splits found.
static inline void join(const VocabSampleArgs& a, int64_t row, float inverse) {
  const int64_t splits = vocabulary_splits(a.N), all = a.B * a.T * splits;
  const int64_t filled = (a.N + SPLIT - 1) / SPLIT;
  Found x;
  for (int64_t i = 0; i < filled; i += W) {
    const float* at = a.parts + row * splits + i;
    const vi here = lane() < static_cast<int32_t>(filled - i);
    Found part;
    __builtin_memcpy(&part.token, a.part_tokens + row * splits + i, sizeof part.token);
    part.peak = here ? load(at) : part.peak;
    part.total = here ? load(at + all) : part.total;
    part.score = here ? load(at + 2 * all) : part.score;
    const vf peak = max(part.peak, x.peak);
    x.raise(peak, inverse);
    part.raise(peak, inverse);
    x.total += part.total;
    x.take(part.score, part.token);
  }
  const Winner best = winner(x, inverse);
  a.tokens[row] = best.token;
  const bool sound = best.total > 0 && best.total < INF;
  a.confidence[row] = sound ? 1 / best.total : __builtin_nanf("");
}

template <class T>
static void run(const VocabSampleArgs& a) {
  const int64_t rows = a.B * a.T, down = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
  const int64_t across = (a.N + SPLIT - 1) / SPLIT;
  // Beyond 1e-30 and 1e30 all of the draw is the logits', or the noise's.
  const double limited = 1 / a.temperature < 1e-30 ? 1e-30 : 1 / a.temperature;
  const float inverse = a.temperature > 0 ? static_cast<float>(limited < 1e30 ? limited : 1e30) : 0;
  Tasks tasks(a.run, down * across);
  tasks.share([&](auto next) {
    Task<T> task(a);
    for (int64_t i; next(i);) {
      const int64_t top = i % down * ROW_BLOCK, left = i / down * SPLIT;
      task.run(top, left, rows - top < ROW_BLOCK ? rows - top : ROW_BLOCK,
               a.N - left < SPLIT ? a.N - left : SPLIT, inverse);
    }
  });
  parallel(a.run, 0, rows, 64, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) join(a, row, inverse);
  });
}

void vocab_sample(const VocabSampleArgs& a) { a.low ? run<bf16>(a) : run<float>(a); }

}  // namespace univigu::cpu::UNIVIGU_ISA
