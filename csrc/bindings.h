// What the bindings of all groups share.
#pragma once
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "cpu/isa.h"

namespace univigu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// The instruction set that CPU kernels run with: the best one here, or what the caller set.
cpu::Isa isa();

// torch's thread pool. A second one (OpenMP's own) would spin beside it on the same cores.
inline void run_parallel(
    int64_t begin, int64_t end, int64_t grain, cpu::Body body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// Uninitialised. torch::stable::new_empty looks the operator up by name in every call, as
// torch::stable::contiguous does: 160 times in a captioning step of four layers.
inline Tensor fresh(const Tensor& like, Shape shape, ScalarType dtype) {
  int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), shape.data(), static_cast<int64_t>(shape.size()), &type, nullptr, nullptr, 0,
      nullptr, &made));
  return Tensor(made);
}

inline Tensor dense(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline Tensor cast(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// With elements of the last dimension side by side.
inline Tensor packed(const Tensor& t) {
  return t.stride(-1) == 1 ? t : torch::stable::contiguous(t);
}

// Contiguous, in fp32.
inline Tensor whole(const Tensor& t) {
  return dense(cast(t, ScalarType::Float));
}

// Whether a CPU kernel takes bf16 here, not fp32.
inline bool is_low(const char* what, ScalarType dtype) {
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, what,
                  " must be float32 or bfloat16 in the backend cpu; got ",
                  toString(dtype), ". Request the backend reference for it.");
  return dtype == ScalarType::BFloat16;
}

}  // namespace univigu
