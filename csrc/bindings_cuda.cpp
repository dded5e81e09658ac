// CUDA implementations of rope3d and qknorm_rope; their schemas are in bindings_rows.cpp. Compiled
// where setup.py finds nvcc. Launches go to the current stream of the tensors' device.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <limits>

#include "bindings.h"
#include "cuda/launch.h"

namespace univigu {
namespace {

using std::tuple;
using torch::stable::accelerator::DeviceGuard;

// Every row where 16-byte accesses may begin: t itself, or a copy.
Tensor aligned(const Tensor& t) {
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  const int last = static_cast<int>(t.dim()) - 1;
  bool fits = t.stride(last) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int i = 0; i < last; i++) fits = fits && t.stride(i) * bytes % 16 == 0;
  if (fits) return t;
  const Tensor copy = torch::stable::contiguous(t);
  return reinterpret_cast<uintptr_t>(copy.const_data_ptr()) % 16 ? torch::stable::clone(copy)
                                                                 : copy;
}

cuda::Dtype dtype_of(const char* what, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cuda::Dtype::f32;
    case ScalarType::Half: return cuda::Dtype::f16;
    case ScalarType::BFloat16: return cuda::Dtype::bf16;
    default: break;
  }
  STD_TORCH_CHECK(false, what, " must be float32, float16 or bfloat16 in the backend cuda; got ",
                  toString(t.scalar_type()), ". Request the backend reference for it.");
}

int narrow(const char* what, int64_t n) {
  STD_TORCH_CHECK(n <= std::numeric_limits<int>::max(), what, " must be below 2^31; got ", n,
                  ". Split the batch.");
  return static_cast<int>(n);
}

cudaStream_t stream_of(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int multiprocessors(const Tensor& t) {
  int count = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, t.get_device_index()));
  return count;
}

struct Tables {
  Tensor t, h, w, text;

  Tables(const Tensor& t, const Tensor& h, const Tensor& w, const Tensor& text)
      : t(whole(t)), h(whole(h)), w(whole(w)), text(whole(text)) {}

  // For L rows of H heads of K channels like those of x, on a grid.
  cuda::Rotary rotary(const char* what, const Tensor& x, int64_t L, int64_t H, int64_t K,
                      int64_t frames, int64_t height, int64_t width) const {
    const int64_t video_rows = frames * height * width, B = x.size(0);
    for (const Tensor* table : {&t, &h, &w, &text})
      STD_TORCH_CHECK(table->dim() == 3 && table->get_device_index() == x.get_device_index() &&
                          table->is_cuda(),
                      what, ": rotary must be [length, pairs, 2] on the device of x; got ",
                      table->dim(), " dimensions. Build the rotary tables on that device.");
    STD_TORCH_CHECK(
        0 <= video_rows && video_rows <= L && t.size(0) >= frames && h.size(0) >= height &&
            w.size(0) >= width && text.size(0) >= L - video_rows &&
            2 * (t.size(1) + h.size(1) + w.size(1)) == K && 2 * text.size(1) == K,
        what, ": rotary must be of head_dim ", K, " and ", L, " rows; got a grid of ", video_rows,
        " rows. Build the rotary tables for this grid and text length.");
    const cuda::Dtype dtype = dtype_of(what, x);
    const int64_t step = 2 * cuda::elements_of(dtype);
    STD_TORCH_CHECK(K % step == 0, what, ": head_dim must be a multiple of ", step, " for ",
                    toString(x.scalar_type()), " in the backend cuda; got ", K,
                    ". Request the backend triton or reference for it.");
    STD_TORCH_CHECK(B <= 65535 && cuda::fits(narrow(what, H), narrow(what, K / 2), dtype), what,
                    ": x must be of at most 65535 samples and, at head_dim ", K, ", of a width "
                    "that a block holds in the backend cuda; got ", B, " samples of width ",
                    H * K, ". Request the backend triton or reference for it.");
    const auto angles = [](const Tensor& table) { return data<const cuda::Angle>(table); };
    return {angles(t), angles(h), angles(w), angles(text), narrow(what, t.size(1)),
            narrow(what, h.size(1)), narrow(what, K / 2), cuda::divider(narrow(what, height)),
            cuda::divider(narrow(what, width)), narrow(what, video_rows)};
  }
};

Tensor rope3d(Tensor x, Tensor t, Tensor h, Tensor w, Tensor text, int64_t frames, int64_t height,
              int64_t width, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4, "rope3d: x must be [B, L, H, K]; got ", x.dim(),
                  " dimensions. Split the width into heads.");
  const DeviceGuard guard(x.get_device_index());
  const int64_t B = x.size(0), L = x.size(1), H = x.size(2), K = x.size(3);
  const Tables tables(t, h, w, text);
  const cuda::Rotary rotary = tables.rotary("rope3d", x, L, H, K, frames, height, width);
  x = aligned(x);
  Tensor out = torch::stable::new_empty(x, {B, L, H, K});
  const cuda::Rope3dArgs args{
      data<void>(x), data<void>(out), x.stride(0), x.stride(1), x.stride(2),
      narrow("rope3d: B", B), narrow("rope3d: L", L), narrow("rope3d: H", H), rotary,
      inverse ? -1.0f : 1.0f};
  STD_CUDA_CHECK(cuda::rope3d(args, dtype_of("rope3d: x", x), stream_of(x)));
  return out;
}

// Checks what q and k share; -> their rotary.
cuda::Rotary check(const Tensor& q, const Tensor& k, const Tensor& weight_q, const Tensor& weight_k,
                   const Tables& tables, int64_t frames, int64_t height, int64_t width) {
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && q.size(0) == k.size(0) &&
                      q.size(1) == k.size(1) && q.size(2) == k.size(2) &&
                      q.scalar_type() == k.scalar_type(),
                  "qknorm_rope: q and k must be two tensors of one shape [B, L, D] and one dtype; "
                  "got ", q.numel(), " and ", k.numel(),
                  " elements. Pass the projections of the same rows.");
  const int64_t D = q.size(2), K = 2 * tables.text.size(1);
  STD_TORCH_CHECK(weight_q.dim() == 1 && weight_k.dim() == 1 && weight_q.size(0) == D &&
                      weight_k.size(0) == D,
                  "qknorm_rope: weight_q and weight_k must be [", D, "]; got ", weight_q.numel(),
                  " and ", weight_k.numel(), " elements. The norm spans all heads.");
  STD_TORCH_CHECK(K > 0 && D % K == 0, "qknorm_rope: head_dim must be a divisor of the width ", D,
                  "; got ", K, ". Build the rotary tables for this head_dim.");
  for (const Tensor* other : {&k, &weight_q, &weight_k})
    STD_TORCH_CHECK(other->is_cuda() && other->get_device_index() == q.get_device_index(),
                    "qknorm_rope: k and the weights must be on the device of q; got device index ",
                    other->get_device_index(), ". Move them there.");
  return tables.rotary("qknorm_rope", q, q.size(1), D / K, K, frames, height, width);
}

tuple<Tensor, Tensor, Tensor> qknorm_rope(
    Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor t, Tensor h, Tensor w,
    Tensor text, int64_t frames, int64_t height, int64_t width, double eps) {
  const DeviceGuard guard(q.get_device_index());
  const Tables tables(t, h, w, text);
  const cuda::Rotary rotary = check(q, k, weight_q, weight_k, tables, frames, height, width);
  const int64_t B = q.size(0), L = q.size(1), K = 2 * rotary.half, H = q.size(2) / K;
  q = aligned(q), k = aligned(k);
  weight_q = aligned(whole(weight_q)), weight_k = aligned(whole(weight_k));
  Tensor q_out = torch::stable::new_empty(q, {B, L, H, K});
  Tensor k_out = torch::stable::new_empty(q, {B, L, H, K});
  Tensor rstd = torch::stable::new_empty(q, {B, L, 2}, ScalarType::Float);
  const cuda::QknormRopeArgs args{
      {data<void>(q), data<void>(k)}, {q.stride(0), k.stride(0)}, {q.stride(1), k.stride(1)},
      {data<float>(weight_q), data<float>(weight_k)}, {data<void>(q_out), data<void>(k_out)},
      data<float>(rstd), narrow("qknorm_rope: B", B), narrow("qknorm_rope: L", L),
      static_cast<int>(H), rotary, static_cast<float>(eps)};
  STD_CUDA_CHECK(cuda::qknorm_rope(args, dtype_of("qknorm_rope: q", q), multiprocessors(q),
                                   stream_of(q)));
  return {q_out, k_out, rstd};
}

tuple<Tensor, Tensor, Tensor, Tensor> qknorm_rope_backward(
    Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor t, Tensor h, Tensor w,
    Tensor text, Tensor rstd, Tensor dq_out, Tensor dk_out, int64_t frames, int64_t height,
    int64_t width) {
  const DeviceGuard guard(q.get_device_index());
  const Tables tables(t, h, w, text);
  const cuda::Rotary rotary = check(q, k, weight_q, weight_k, tables, frames, height, width);
  const int64_t B = q.size(0), L = q.size(1), D = q.size(2), K = 2 * rotary.half;
  for (const Tensor* gradient : {&dq_out, &dk_out})
    STD_TORCH_CHECK(
        gradient->numel() == q.numel() && gradient->scalar_type() == q.scalar_type() &&
            gradient->is_cuda(),
        "qknorm_rope: gradients must be shaped and typed like the results; got ",
        gradient->numel(), " elements of ", toString(gradient->scalar_type()),
        ". Pass [B, L, H, K].");
  q = aligned(q), k = aligned(k), rstd = torch::stable::contiguous(rstd);
  dq_out = aligned(torch::stable::contiguous(dq_out));
  dk_out = aligned(torch::stable::contiguous(dk_out));
  const Tensor wide_q = aligned(whole(weight_q)), wide_k = aligned(whole(weight_k));
  const cuda::Dtype dtype = dtype_of("qknorm_rope: q", q);
  const int batch = narrow("qknorm_rope: B", B), rows = narrow("qknorm_rope: L", L);
  const int heads = static_cast<int>(D / K);
  const int tiles =
      cuda::qknorm_rope_tiles(batch, rows, heads, rotary.half, dtype, multiprocessors(q));
  Tensor dq = torch::stable::new_empty(q, {B, L, D}), dk = torch::stable::new_empty(q, {B, L, D});
  Tensor partial = torch::stable::new_empty(q, {2, B, tiles, D}, ScalarType::Float);
  Tensor dweight_q = torch::stable::new_empty(q, {D}, ScalarType::Float);
  Tensor dweight_k = torch::stable::new_empty(q, {D}, ScalarType::Float);
  const cuda::QknormRopeBackwardArgs args{
      {data<void>(q), data<void>(k)}, {q.stride(0), k.stride(0)}, {q.stride(1), k.stride(1)},
      {data<float>(wide_q), data<float>(wide_k)}, data<float>(rstd),
      {data<void>(dq_out), data<void>(dk_out)}, {data<void>(dq), data<void>(dk)},
      data<float>(partial), {data<float>(dweight_q), data<float>(dweight_k)}, batch, rows, heads,
      rotary};
  STD_CUDA_CHECK(cuda::qknorm_rope_backward(args, dtype, tiles, stream_of(q)));
  const auto cast = [](const Tensor& gradient, const Tensor& weight) {
    const bool wide = weight.scalar_type() == ScalarType::Float;
    return wide ? gradient : torch::stable::to(gradient, weight.scalar_type());
  };
  return {dq, dk, cast(dweight_q, weight_q), cast(dweight_k, weight_k)};
}

}  // namespace
}  // namespace univigu

STABLE_TORCH_LIBRARY_IMPL(univigu_C, CUDA, m) {
  m.impl("rope3d", TORCH_BOX(&univigu::rope3d));
  m.impl("qknorm_rope", TORCH_BOX(&univigu::qknorm_rope));
  m.impl("qknorm_rope_backward", TORCH_BOX(&univigu::qknorm_rope_backward));
}
