// RMSNorm of q and k over the full width and their rotary embedding in one launch, see
// kernels/univigu_kernels/qknorm_rope.py. A block works down a tile of one sample's rows, of q or
// of k; tiles fill the GPU once. A row stays in registers between its sum and its result. The
// weights of the norm lie in shared memory: in registers they would halve the rows under way.
#include "vectors.cuh"

namespace univigu::cuda {
namespace {

// Registers a thread, and the warps that an SM holds with them.
constexpr int REGISTERS = 80, RESIDENT = 24, BACKWARD_REGISTERS = 96, RESIDENT_BACKWARD = 20;
constexpr int MAX_UNITS = 3;
constexpr int MAX_WIDTH = 10240;  // 40 KiB of weights in shared memory

struct Tile {
  int b, tensor, first, end;
};

__device__ __forceinline__ Tile tile_of(int L) {
  const int tile = blockIdx.x, tiles = gridDim.x;
  return {static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z), tile_start(L, tile, tiles),
          tile_start(L, tile + 1, tiles)};
}

__device__ __forceinline__ void stage(float* shared, const float* weight, int D) {
  const int threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  for (int i = 4 * thread; i < D; i += 4 * threads)
    *reinterpret_cast<float4*>(shared + i) = __ldg(reinterpret_cast<const float4*>(weight + i));
  __syncthreads();
}

// weight[0][E] and weight[1][E] of a unit at shared `p`.
template <int E>
__device__ __forceinline__ void load_weight(const float* p, int half, float (&weight)[2][E]) {
#pragma unroll
  for (int i = 0; i < 2 * E; i += 4) {
    const float4 v = *reinterpret_cast<const float4*>(p + i / E * half + i % E);
    float* to = &weight[i / E][i % E];
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
}

template <class T, int U>
__global__ void __maxnreg__(REGISTERS) qknorm_rope_kernel(
    const __grid_constant__ QknormRopeArgs a, const __grid_constant__ Spread s) {
  constexpr int E = ELEMENTS<T>;
  extern __shared__ __align__(16) float weights[];
  __shared__ float partial[2][MAX_WARPS];
  const int half = a.rotary.half, K = 2 * half, D = a.H * K;
  const Tile tile = tile_of(a.L);
  stage(weights, tile.tensor ? a.weight[1] : a.weight[0], D);
  const Share share = share_of(s, a.H, threadIdx.x);
  const int64_t b = tile.b, x_l = tile.tensor ? a.x_l[1] : a.x_l[0];
  const int channel = share.head * K + share.unit * E, step = share.step * K;
  const T* x = static_cast<const T*>(tile.tensor ? a.x[1] : a.x[0]) +
               b * (tile.tensor ? a.x_b[1] : a.x_b[0]) + channel;
  T* out = static_cast<T*>(tile.tensor ? a.out[1] : a.out[0]) + b * a.L * D + channel;
  float* rstd = a.rstd + b * a.L * 2 + tile.tensor;
  int turn = 0;
  for (int row = tile.first + threadIdx.y; row < tile.end; row += blockDim.y, turn ^= 1) {
    Unit units[U] = {};
#pragma unroll
    for (int j = 0; j < U; j++)
      if (share.head + j * share.step < a.H) units[j] = load_unit(x + row * x_l + j * step, half);
    const Place place = place_of(a.rotary, row);
    Angle angles[E];
    load_angles(a.rotary, place, share.unit, 1, angles);
    float values[2][E], sum = 0;
#pragma unroll
    for (int j = 0; j < U; j++) {
      unpack<T>(units[j], values);
#pragma unroll
      for (int i = 0; i < 2 * E; i++) sum += values[i / E][i % E] * values[i / E][i % E];
    }
    const float r = rsqrtf(row_sum(sum, s.warps, partial[0], turn) / D + a.eps);
    if (threadIdx.x == 0) rstd[2 * static_cast<int64_t>(row)] = r;
#pragma unroll
    for (int j = 0; j < U; j++) {
      if (share.head + j * share.step >= a.H) break;
      float weight[2][E];
      load_weight(weights + channel + j * step, half, weight);
      forget(units[j]);
      unpack<T>(units[j], values);
#pragma unroll
      for (int i = 0; i < 2 * E; i++) values[i / E][i % E] *= r * weight[i / E][i % E];
      rotate_unit(values, angles, place.text);
      store_unit(out + static_cast<int64_t>(row) * D + j * step, half, values);
    }
  }
}

// One row a block and one unit a thread; the next row is under way while a row is worked on.
template <class T>
__global__ void __maxnreg__(BACKWARD_REGISTERS) qknorm_rope_backward_kernel(
    const __grid_constant__ QknormRopeBackwardArgs a, const __grid_constant__ Spread s) {
  constexpr int E = ELEMENTS<T>;
  extern __shared__ __align__(16) float weights[];
  __shared__ float partial[2][MAX_WARPS];
  const int half = a.rotary.half, D = a.H * 2 * half;
  const Tile tile = tile_of(a.L);
  stage(weights, tile.tensor ? a.weight[1] : a.weight[0], D);
  const Share share = share_of(s, a.H, threadIdx.x);
  const bool works = share.head < a.H;
  const int channel = works ? share.head * 2 * half + share.unit * E : 0;
  const int64_t b = tile.b, x_l = tile.tensor ? a.x_l[1] : a.x_l[0];
  const T* x = static_cast<const T*>(tile.tensor ? a.x[1] : a.x[0]) +
               b * (tile.tensor ? a.x_b[1] : a.x_b[0]) + tile.first * x_l + channel;
  const int64_t packed = (b * a.L + tile.first) * D + channel;
  const T* dout = static_cast<const T*>(tile.tensor ? a.dout[1] : a.dout[0]) + packed;
  T* dx = static_cast<T*>(tile.tensor ? a.dx[1] : a.dx[0]) + packed;
  const float* rstd = a.rstd + (b * a.L + tile.first) * 2 + tile.tensor;
  float dweight[2][E] = {};
  Unit next_x = {}, next_dout = {};
  float next_rstd = 0;
  if (works && tile.first < tile.end)
    next_x = load_unit(x, half), next_dout = load_unit(dout, half), next_rstd = __ldg(rstd);
  for (int row = tile.first, turn = 0; row < tile.end; row++, turn ^= 1) {
    Unit row_x = next_x;
    const Unit row_dout = next_dout;
    const float r = next_rstd;
    x += x_l, dout += D, rstd += 2;
    if (works && row + 1 < tile.end)
      next_x = load_unit(x, half), next_dout = load_unit(dout, half), next_rstd = __ldg(rstd);
    const Place place = place_of(a.rotary, row);
    Angle angles[E];
    load_angles(a.rotary, place, share.unit, -1, angles);
    float g[2][E], n[2][E], weight[2][E], sum = 0;
    unpack<T>(row_dout, g);
    rotate_unit(g, angles, place.text);
    unpack<T>(row_x, n);
    load_weight(weights + channel, half, weight);
#pragma unroll
    for (int i = 0; i < 2 * E; i++) {
      n[i / E][i % E] *= r;
      dweight[i / E][i % E] += g[i / E][i % E] * n[i / E][i % E];
      g[i / E][i % E] *= weight[i / E][i % E];
      sum += g[i / E][i % E] * n[i / E][i % E];
    }
    const float mean = row_sum(sum, s.warps, partial[0], turn) / D;
    forget(row_x);
    unpack<T>(row_x, n);
#pragma unroll
    for (int i = 0; i < 2 * E; i++)
      g[i / E][i % E] = r * (g[i / E][i % E] - n[i / E][i % E] * r * mean);
    if (works) store_unit(dx, half, g);
    dx += D;
  }
  if (!works) return;
  float* sums = a.partial +
                ((static_cast<int64_t>(tile.tensor) * a.B + b) * gridDim.x + blockIdx.x) * D +
                channel;
#pragma unroll
  for (int i = 0; i < 2 * E; i += 4) {
    const float* v = &dweight[i / E][i % E];
    *reinterpret_cast<float4*>(sums + i / E * half + i % E) = {v[0], v[1], v[2], v[3]};
  }
}

constexpr int REDUCE_ROWS = 16;

// Sums partial [2, count, D] over count, in a fixed order. 4 channels a thread.
__global__ void __launch_bounds__(32 * REDUCE_ROWS)
    dweight_reduce(const float* partial, float* dweight_q, float* dweight_k, int count, int D) {
  __shared__ float4 sums[REDUCE_ROWS][32];
  const int channel = 4 * (blockIdx.x * 32 + threadIdx.x);
  const float* from = partial + static_cast<int64_t>(blockIdx.y) * count * D + channel;
  float4 sum = {};
  if (channel < D) {
#pragma unroll 4
    for (int i = threadIdx.y; i < count; i += REDUCE_ROWS) {
      const float4 v = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(i) * D);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || channel >= D) return;
  for (int i = 1; i < REDUCE_ROWS; i++) {
    const float4 v = sums[i][threadIdx.x];
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  *reinterpret_cast<float4*>((blockIdx.y ? dweight_k : dweight_q) + channel) = sum;
}

template <class T, int U>
cudaError_t launch(const QknormRopeArgs& a, const Spread& s, int sms, cudaStream_t stream) {
  const int groups = s.warps == 1 ? 4 : 1, D = a.H * 2 * a.rotary.half;
  const dim3 grid(tiles_of(a.L, 2 * a.B, groups, s.warps, RESIDENT, sms), a.B, 2);
  const dim3 block(32 * s.warps, groups);
  qknorm_rope_kernel<T, U><<<grid, block, D * sizeof(float), stream>>>(a, s);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const QknormRopeArgs& a, int sms, cudaStream_t stream) {
  const Spread s = spread(a.H, a.rotary.half, ELEMENTS<T>, MAX_UNITS);
  switch (s.units) {
    case 1: return launch<T, 1>(a, s, sms, stream);
    case 2: return launch<T, 2>(a, s, sms, stream);
    case 3: return launch<T, 3>(a, s, sms, stream);
    default: return cudaErrorInvalidConfiguration;
  }
}

template <class T>
cudaError_t launch(const QknormRopeBackwardArgs& a, int tiles, cudaStream_t stream) {
  const Spread s = spread(a.H, a.rotary.half, ELEMENTS<T>, 1);
  if (s.warps == 0) return cudaErrorInvalidConfiguration;
  const dim3 grid(tiles, a.B, 2), block(32 * s.warps);
  const int bytes = a.H * 2 * a.rotary.half * static_cast<int>(sizeof(float));
  qknorm_rope_backward_kernel<T><<<grid, block, bytes, stream>>>(a, s);
  return cudaGetLastError();
}

}  // namespace

cudaError_t qknorm_rope(const QknormRopeArgs& a, Dtype dtype, int sms, cudaStream_t stream) {
  if (a.B == 0 || a.L == 0 || a.H == 0) return cudaSuccess;
  switch (dtype) {
    case Dtype::f32: return launch<float>(a, sms, stream);
    case Dtype::f16: return launch<__half>(a, sms, stream);
    case Dtype::bf16: return launch<__nv_bfloat16>(a, sms, stream);
  }
  return cudaErrorInvalidValue;
}

int qknorm_rope_tiles(int B, int L, int H, int half, Dtype dtype, int sms) {
  const Spread s = spread(H, half, elements_of(dtype), 1);
  if (B == 0 || L == 0 || s.warps == 0) return 0;
  return tiles_of(L, 2 * B, 1, s.warps, RESIDENT_BACKWARD, sms);
}

cudaError_t qknorm_rope_backward(
    const QknormRopeBackwardArgs& a, Dtype dtype, int tiles, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (tiles > 0) {
    switch (dtype) {
      case Dtype::f32: error = launch<float>(a, tiles, stream); break;
      case Dtype::f16: error = launch<__half>(a, tiles, stream); break;
      case Dtype::bf16: error = launch<__nv_bfloat16>(a, tiles, stream); break;
    }
  }
  const int D = a.H * 2 * a.rotary.half;
  if (error != cudaSuccess || D == 0) return error;
  const dim3 grid((D + 127) / 128, 2), block(32, REDUCE_ROWS);
  dweight_reduce<<<grid, block, 0, stream>>>(
      a.partial, a.dweight[0], a.dweight[1], a.B * tiles, D);
  return cudaGetLastError();
}

bool fits(int H, int half, Dtype dtype) {
  return spread(H, half, elements_of(dtype), 1).warps > 0 && H * 2 * half <= MAX_WIDTH;
}

}  // namespace univigu::cuda
