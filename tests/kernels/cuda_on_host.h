// The part of CUDA that csrc/cuda uses, on one host thread: a fiber per CUDA thread, block after
// block. Every exchange (barrier or shuffle) hands over to the next fiber, so all threads of a warp
// stay at the same one. Shared memory and what a launch allots hold NaN at the start of a block.
#pragma once
#include <cuda_runtime_api.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __maxnreg__(registers)
#undef __global__
#define __global__
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ inline
#undef __shared__
#define __shared__ static

using std::min;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline float shared_memory[10240];

struct Fiber {
  ucontext_t context;
  dim3 thread;
  bool done = false;
  std::vector<char> stack = std::vector<char>(32 << 10);
};
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<float> exchanged;
inline size_t current;
inline ucontext_t scheduler;
inline std::function<void()> kernel_call;

inline void hand_over() { swapcontext(&fibers[current]->context, &scheduler); }

inline void fiber_main() {
  kernel_call();
  fibers[current]->done = true;
  hand_over();
}

inline void run_block() {
  std::fill(std::begin(shared_memory), std::end(shared_memory), NAN);
  exchanged.assign(blockDim.x * blockDim.y, NAN);
  fibers.clear();
  for (unsigned i = 0; i < blockDim.x * blockDim.y; i++) {
    auto fiber = std::make_unique<Fiber>();
    fiber->thread = dim3(i % blockDim.x, i / blockDim.x);
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack.data();
    fiber->context.uc_stack.ss_size = fiber->stack.size();
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, fiber_main, 0);
    fibers.push_back(std::move(fiber));
  }
  for (bool busy = true; busy;) {
    busy = false;
    for (current = 0; current < fibers.size(); current++) {
      if (fibers[current]->done) continue;
      busy = true;
      threadIdx = fibers[current]->thread;
      swapcontext(&scheduler, &fibers[current]->context);
    }
  }
}

template <class Kernel, class... Args>
void launch_on_host(dim3 grid, dim3 block, size_t shared, cudaStream_t, Kernel kernel,
                    Args... args) {
  if (shared > sizeof shared_memory || block.x * block.y > 1024) std::abort();
  gridDim = grid, blockDim = block;
  kernel_call = [&] { kernel(args...); };
  for (unsigned i = 0; i < grid.x * grid.y * grid.z; i++) {
    blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
  }
}

inline void __syncthreads() { hand_over(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
  const size_t me = current;
  exchanged[me] = x;
  hand_over();
  const float other = exchanged[me ^ mask];
  hand_over();
  return other;
}

inline uint4 load_16_bytes(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) std::abort();
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline cudaError_t launched() { return cudaSuccess; }
#define cudaGetLastError launched
