// Rotary embedding alone, see kernels/univigu_kernels/rope3d.py. Forward and backward are one
// kernel. A row belongs to `warps` warps, and a thread reads all of its units before it writes.
#include "vectors.cuh"

namespace univigu::cuda {
namespace {

constexpr int MAX_UNITS = 3;

template <class T, int U>
__global__ void __launch_bounds__(32 * MAX_WARPS)
    rope3d_kernel(const __grid_constant__ Rope3dArgs a, const __grid_constant__ Spread s) {
  constexpr int E = ELEMENTS<T>;
  const int row = blockIdx.x * blockDim.y + threadIdx.y, half = a.rotary.half;
  const Share share = share_of(s, a.H, threadIdx.x);
  if (row >= a.L || share.head >= a.H) return;
  const int64_t b = blockIdx.y, channel = share.unit * E;
  const T* x = static_cast<const T*>(a.x) + b * a.x_b + row * a.x_l + channel;
  T* out = static_cast<T*>(a.out) + (b * a.L + row) * (a.H * 2 * half) + channel;
  Unit units[U];
#pragma unroll
  for (int j = 0; j < U; j++) {
    const int head = share.head + j * share.step;
    if (head < a.H) units[j] = load_unit(x + head * a.x_h, half);
  }
  const Place place = place_of(a.rotary, row);
  Angle angles[E];
  load_angles(a.rotary, place, share.unit, a.sign, angles);
#pragma unroll
  for (int j = 0; j < U; j++) {
    const int head = share.head + j * share.step;
    if (head >= a.H) break;
    float values[2][E];
    unpack<T>(units[j], values);
    rotate_unit(values, angles, place.text);
    store_unit(out + head * 2 * half, half, values);
  }
}

template <class T, int U>
cudaError_t launch(const Rope3dArgs& a, const Spread& s, cudaStream_t stream) {
  const int groups = s.warps < 4 ? 4 / s.warps : 1;
  const dim3 grid((a.L + groups - 1) / groups, a.B), block(32 * s.warps, groups);
  rope3d_kernel<T, U><<<grid, block, 0, stream>>>(a, s);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const Rope3dArgs& a, cudaStream_t stream) {
  const Spread s = spread(a.H, a.rotary.half, ELEMENTS<T>, MAX_UNITS);
  switch (s.units) {
    case 1: return launch<T, 1>(a, s, stream);
    case 2: return launch<T, 2>(a, s, stream);
    case 3: return launch<T, 3>(a, s, stream);
    default: return cudaErrorInvalidConfiguration;
  }
}

}  // namespace

cudaError_t rope3d(const Rope3dArgs& a, Dtype dtype, cudaStream_t stream) {
  if (a.B == 0 || a.L == 0 || a.H == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::f32: return launch<float>(a, stream);
    case Dtype::f16: return launch<__half>(a, stream);
    case Dtype::bf16: return launch<__nv_bfloat16>(a, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace univigu::cuda
