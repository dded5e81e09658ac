// Runs the launchers of csrc/cuda on the host. Inputs come on stdin, results leave on stdout, both
// in the order of the calls below; results hold NaN before.
#include <cstdio>
#include <cstdlib>

#include "launch.h"

using namespace univigu::cuda;

namespace {

char* allot(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes / 64 + 1) * 64);
  std::memset(p, 0xFF, bytes);
  return static_cast<char*>(p);
}

char* input(size_t bytes) {
  char* p = allot(bytes);
  if (std::fread(p, 1, bytes, stdin) != bytes) std::abort();
  return p;
}

float* floats(size_t count) { return reinterpret_cast<float*>(input(4 * count)); }

void require(cudaError_t error) {
  if (error != cudaSuccess) std::exit(static_cast<int>(error));
}

}  // namespace

// frames height width text_rows H K pairs_t pairs_h B dtype sms
int main(int, char** arguments) {
  int a[11];
  for (int i = 0; i < 11; i++) a[i] = std::atoi(arguments[i + 1]);
  const int K = a[5], H = a[4], B = a[8], sms = a[10], V = a[0] * a[1] * a[2], L = V + a[3];
  const Dtype dtype = static_cast<Dtype>(a[9]);
  const int64_t D = H * K, bytes = dtype == Dtype::f32 ? 4 : 2, size = B * L * D * bytes;
  const auto table = [](int64_t pairs) { return reinterpret_cast<Angle*>(floats(2 * pairs)); };
  const Angle *t = table(a[0] * a[6]), *h = table(a[1] * a[7]);
  const Angle *w = table(a[2] * (K / 2 - a[6] - a[7])), *text = table(a[3] * (K / 2));
  const Rotary r{t, h, w, text, a[6], a[7], K / 2, divider(a[1]), divider(a[2]), V};
  char* qkv = input(3 * size);  // q and k inside packed projections
  const float *weight_q = floats(D), *weight_k = floats(D);
  char *dq_out = input(size), *dk_out = input(size);
  char *q_out = allot(size), *k_out = allot(size), *dq = allot(size), *dk = allot(size);
  char *turned = allot(size), *dweights = allot(8 * D), *rstd = allot(8 * B * L);
  float* dweight = reinterpret_cast<float*>(dweights);
  const int64_t x_b = 3 * D * L, x_l = 3 * D;

  require(qknorm_rope({{qkv, qkv + D * bytes}, {x_b, x_b}, {x_l, x_l}, {weight_q, weight_k},
                       {q_out, k_out}, reinterpret_cast<float*>(rstd), B, L, H, r, 1e-6f},
                      dtype, sms, nullptr));
  const int tiles = qknorm_rope_tiles(B, L, H, K / 2, dtype, sms);
  float* partial = reinterpret_cast<float*>(allot(8 * B * tiles * D));
  require(qknorm_rope_backward(
      {{qkv, qkv + D * bytes}, {x_b, x_b}, {x_l, x_l}, {weight_q, weight_k},
       reinterpret_cast<float*>(rstd), {dq_out, dk_out}, {dq, dk}, partial,
       {dweight, dweight + D}, B, L, H, r},
      dtype, tiles, nullptr));
  require(rope3d({qkv, turned, x_b, x_l, K, B, L, H, r, -1}, dtype, nullptr));

  for (char* result : {q_out, k_out, dq, dk, turned}) std::fwrite(result, 1, size, stdout);
  std::fwrite(dweights, 1, 8 * D, stdout);
  std::fwrite(rstd, 1, 8 * B * L, stdout);
}
