// The launchers, as the bindings call them: device pointers, sizes, strides in elements, a stream.
// Pointers and strides of x, q, k, gradients and results are multiples of 16 bytes, and so is half
// a head; the tables and the norm's weights are fp32.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "rotary.cuh"

namespace univigu::cuda {

enum class Dtype { f32, f16, bf16 };

constexpr int elements_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 8; }

// Packed rows [B, L, H*K] of which x may be strided.
struct Rope3dArgs {
  const void* x;
  void* out;
  int64_t x_b, x_l, x_h;
  int B, L, H;
  Rotary rotary;
  float sign;  // 1 rotates, -1 rotates back, which is the gradient
};

cudaError_t rope3d(const Rope3dArgs&, Dtype, cudaStream_t);

// Index 0 is q, 1 is k. rstd is [B, L, 2].
struct QknormRopeArgs {
  const void* x[2];
  int64_t x_b[2], x_l[2];
  const float* weight[2];
  void* out[2];
  float* rstd;
  int B, L, H;
  Rotary rotary;
  float eps;
};

cudaError_t qknorm_rope(const QknormRopeArgs&, Dtype, int sms, cudaStream_t);

// partial is [2, B, tiles, D] with the tiles of `qknorm_rope_tiles`.
struct QknormRopeBackwardArgs {
  const void* x[2];
  int64_t x_b[2], x_l[2];
  const float* weight[2];
  const float* rstd;
  const void* dout[2];
  void* dx[2];
  float* partial;
  float* dweight[2];
  int B, L, H;
  Rotary rotary;
};

int qknorm_rope_tiles(int B, int L, int H, int half, Dtype, int sms);
cudaError_t qknorm_rope_backward(const QknormRopeBackwardArgs&, Dtype, int tiles, cudaStream_t);

// Whether a row of H heads fits the blocks of every launcher.
bool fits(int H, int half, Dtype);

}  // namespace univigu::cuda
