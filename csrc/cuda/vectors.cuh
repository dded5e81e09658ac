// Sixteen bytes at a time: loads that leave L1 to the tables and weights, and fp32 arithmetic on
// what they hold.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"
#include "rotary.cuh"

namespace univigu::cuda {

template <class T>
constexpr int ELEMENTS = 16 / static_cast<int>(sizeof(T));

// Global memory that this kernel does not write and reads once. Volatile: where it stands in the
// source is where it is sent off.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ float2 widen(unsigned bits, __half) {
  return __half22float2(*reinterpret_cast<__half2*>(&bits));
}
__device__ __forceinline__ float2 widen(unsigned bits, __nv_bfloat16) {
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u)};
}
__device__ __forceinline__ unsigned narrow(float a, float b, __half) {
  const __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&h);
}
__device__ __forceinline__ unsigned narrow(float a, float b, __nv_bfloat16) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const unsigned*>(&h);
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[8]) {
  const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 pair = widen(words[i], T());
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[4]) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return {narrow(x[0], x[1], T()), narrow(x[2], x[3], T()), narrow(x[4], x[5], T()),
          narrow(x[6], x[7], T())};
}
template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[4]) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
          __float_as_uint(x[3])};
}

// A unit as it lies in memory.
struct Unit {
  uint4 low, high;
};

template <class T>
__device__ __forceinline__ Unit load_unit(const T* p, int half) {
  return {load_once(p), load_once(p + half)};
}
template <class T, int E>
__device__ __forceinline__ void unpack(const Unit& unit, float (&x)[2][E]) {
  unpack<T>(unit.low, x[0]);
  unpack<T>(unit.high, x[1]);
}
template <class T, int E>
__device__ __forceinline__ void store_unit(T* p, int half, const float (&x)[2][E]) {
  *reinterpret_cast<uint4*>(p) = pack<T>(x[0]);
  *reinterpret_cast<uint4*>(p + half) = pack<T>(x[1]);
}

// Makes the compiler unpack a unit again instead of keeping what it unpacked before in twice the
// registers.
__device__ __forceinline__ void forget(Unit& unit) {
  asm volatile("" : "+r"(unit.low.x), "+r"(unit.low.y), "+r"(unit.low.z), "+r"(unit.low.w));
  asm volatile("" : "+r"(unit.high.x), "+r"(unit.high.y), "+r"(unit.high.z), "+r"(unit.high.w));
}

// The angles of a thread's unit at a row; `sign` -1 turns back.
template <int E>
__device__ __forceinline__ void load_angles(
    const Rotary& r, const Place& place, int unit, float sign, Angle (&angles)[E]) {
#pragma unroll
  for (int i = 0; i < E; i++) {
    const Angle* at = angle_of(r, place, pair_of<E>(r, place.text, unit, i));
    const float2 a = __ldg(reinterpret_cast<const float2*>(at));
    angles[i] = {a.x, sign * a.y};
  }
}

// The same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
  return x;
}

// The sum over a row's warps, the same bits in every thread. `partial` is shared, [2][MAX_WARPS];
// the halves take turns, so one barrier a row is enough.
__device__ __forceinline__ float row_sum(float x, int warps, float* partial, int turn) {
  x = warp_sum(x);
  if (warps == 1) return x;
  const int lane = threadIdx.x % 32;
  float* sums = partial + turn * MAX_WARPS;
  if (lane == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  return warp_sum(lane < warps ? sums[lane] : 0.0f);
}

}  // namespace univigu::cuda
