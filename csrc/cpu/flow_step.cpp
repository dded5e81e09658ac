#include "flow_step.h"

#include "row_math.h"

namespace univigu::cpu::UNIVIGU_ISA {

// The state from `first` on, `size` values of it.
template <class V>
UNIVIGU_ROW void step_part(const VideoStepArgs& a, int64_t first, int64_t size, V*) {
  const V* velocity = static_cast<const V*>(a.velocity) + first;
  const V* null = a.null ? static_cast<const V*>(a.null) + first : nullptr;
  const float *x = a.x + first, *corrected = a.corrected + first;
  const float *m1 = a.m1 + first, *m2 = a.m2 + first;
  float *x_next = a.x_next + first, *corrected_next = a.corrected_next + first;
  float* m0_next = a.m0 + first;
  const SolverRow r = a.row;
  columns(size, [&](int64_t i, int, auto lanes) {
    vf v = lanes.load(velocity + i);
    if (null) {
      const vf v_null = lanes.load(null + i);
      v = v_null + a.guidance * (v - v_null);
    }
    const vf x_i = lanes.load(x + i), m1_i = lanes.load(m1 + i), m0 = x_i - r.sigma * v;
    const vf xc = r.c_x * x_i + r.c_corrected * lanes.load(corrected + i) + r.c_m0 * m0 +
                  r.c_m1 * m1_i + r.c_m2 * lanes.load(m2 + i);
    lanes.store(m0_next + i, m0);
    lanes.store(corrected_next + i, xc);
    lanes.store(x_next + i, r.p_x * xc + r.p_m0 * m0 + r.p_m1 * m1_i);
  });
}

void video_step(const VideoStepArgs& a) {
  parallel(a.run, 0, a.size, grain_of(1), [&](int64_t first, int64_t last) {
    a.low ? step_part(a, first, last - first, static_cast<bf16*>(nullptr))
          : step_part(a, first, last - first, static_cast<float*>(nullptr));
  });
}

// The first word of Philox-4x32-10 (Salmon et al., SC 2011) at key `seed` and counter
// (row, 0, step, 1); 1 is the purpose JUMP of kernels/univigu_kernels/_philox.py.
static inline uint32_t philox(int64_t seed, uint32_t row, uint32_t step) {
  const uint64_t key = static_cast<uint64_t>(seed);
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = row, c1 = 0, c2 = step, c3 = 1;
  for (int round = 0; round < 10; round++, key0 += 0x9E3779B9, key1 += 0xBB67AE85) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(b);
    c3 = static_cast<uint32_t>(a);
  }
  return c0;
}

void text_step(const TextStepArgs& a) {
  parallel(a.run, 0, a.B * a.T, 4096, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const uint32_t word = philox(a.seeds[i / a.T], static_cast<uint32_t>(i % a.T), a.step);
      const double uniform = ((word >> 8) + 0.5) * 0x1p-24;
      a.tokens_next[i] = uniform < a.probability ? a.proposal[i] : a.tokens[i];
    }
  });
}

}  // namespace univigu::cpu::UNIVIGU_ISA
