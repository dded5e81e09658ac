// Bindings of the layers that are matrix products, and of the norm between them: linear,
// routed_ffn, rms_norm, vocab_sample.
#include <algorithm>
#include <vector>

#include "bindings.h"
#include "cpu/linear.h"
#include "cpu/rms_norm.h"
#include "cpu/routed_ffn.h"
#include "cpu/vocab_sample.h"

namespace univigu {
namespace {

using std::optional;
using std::tuple;

constexpr int64_t PANEL = 64;  // columns that packing may add, at most

// Room for a weight [N, D] in the layout of the matrix product, in fp32 at most.
Tensor room(const Tensor& like, int64_t N, int64_t D) {
  return fresh(like, {(N + PANEL) * (D + 1)}, ScalarType::Float);
}

struct Rows {
  Tensor x;
  int64_t step;
};

// x [..., D] as rows that lie one stride apart. A dimension of one row may have any stride.
Rows even_rows(const Tensor& x) {
  int64_t rows = 1, step = x.size(-1);
  bool even = x.stride(-1) == 1;
  for (int64_t i = x.dim() - 2; i >= 0; i--) {
    if (x.size(i) == 1) continue;
    if (rows == 1) step = x.stride(i);
    even = even && x.stride(i) == step * rows;
    rows *= x.size(i);
  }
  return even ? Rows{x, step} : Rows{dense(x), x.size(-1)};
}

Tensor linear(Tensor x, Tensor weight, optional<Tensor> bias) {
  const int64_t N = weight.size(0), D = weight.size(1);
  STD_TORCH_CHECK(x.dim() >= 2 && x.size(-1) == D && x.scalar_type() == weight.scalar_type(),
                  "linear: x must be [..., ", D, "] of the weight's dtype; got ", x.size(-1),
                  " channels. Pass what the layer was made for.");
  const auto [rows, step] = even_rows(x);
  weight = packed(weight);
  if (bias) bias = dense(*bias);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = N;
  Tensor y = fresh(x, shape, x.scalar_type());
  if (y.numel() == 0) return y;
  const int64_t count = y.numel() / N;  // D may be 0
  optional<Tensor> packing;
  if (!cpu::few(count, N * D)) packing = room(x, N, D);
  const cpu::LinearArgs args{
      run_parallel, count, D, N, is_low("linear: x", x.scalar_type()), data<void>(rows),
      step, data<void>(weight), bias ? data<void>(*bias) : nullptr, weight.stride(0),
      data<void>(y), packing ? data<float>(*packing) : nullptr};
  UNIVIGU_CALL(isa(), linear, args)
  return y;
}

struct Expert {
  Tensor up, up_bias, down, down_bias;
  optional<Tensor> up_room, down_room;

  Expert(const Tensor& up, const Tensor& up_bias, const Tensor& down, const Tensor& down_bias,
         bool few)
      : up(dense(up)), up_bias(dense(up_bias)),
        down(dense(down)), down_bias(dense(down_bias)) {
    if (few) return;
    up_room = room(up, up.size(0), up.size(1)), down_room = room(up, up.size(1), up.size(0));
  }

  cpu::ExpertArgs args() const {
    return {data<void>(up), data<void>(up_bias), data<void>(down), data<void>(down_bias),
            up.size(0), up_room ? data<float>(*up_room) : nullptr,
            down_room ? data<float>(*down_room) : nullptr};
  }
};

tuple<Tensor, Tensor> routed_ffn(Tensor h, Tensor video_up, Tensor video_up_bias,
                                 Tensor video_down, Tensor video_down_bias, Tensor text_up,
                                 Tensor text_up_bias, Tensor text_down, Tensor text_down_bias,
                                 int64_t video_rows, bool save) {
  const int64_t B = h.size(0), L = h.size(1), D = h.size(2);
  const int64_t F = std::max(video_up.size(0), text_up.size(0));
  STD_TORCH_CHECK(video_up.size(1) == D && text_up.size(1) == D && video_rows <= L,
                  "routed_ffn: h must be of the experts' width ", video_up.size(1), "; got ", D,
                  ". Take experts and rows of one model.");
  const bool few = cpu::few(B, L, video_rows, F * D);
  h = few ? dense(h) : packed(h);
  const Expert video(video_up, video_up_bias, video_down, video_down_bias, few);
  const Expert text(text_up, text_up_bias, text_down, text_down_bias, few);
  Tensor y = fresh(h, {B, L, D}, h.scalar_type());
  Tensor a = fresh(h, {B, save ? L : 0, F}, h.scalar_type());
  const cpu::RoutedFfnArgs args{
      run_parallel, B, L, D, video_rows, is_low("routed_ffn: h", h.scalar_type()), data<void>(h),
      h.stride(0), h.stride(1), data<void>(y), save ? data<void>(a) : nullptr, F,
      {video.args(), text.args()}};
  UNIVIGU_CALL(isa(), routed_ffn, args)
  return {y, a};
}

tuple<Tensor, Tensor> gelu_backward(Tensor a, Tensor dhidden) {
  a = dense(a), dhidden = dense(dhidden);
  Tensor hidden = fresh(a, a.sizes(), a.scalar_type()), da = fresh(a, a.sizes(), a.scalar_type());
  const cpu::GeluBackwardArgs args{
      run_parallel, a.numel(), is_low("gelu_backward: a", a.scalar_type()), data<void>(a),
      data<void>(dhidden), data<void>(hidden), data<void>(da)};
  UNIVIGU_CALL(isa(), gelu_backward, args)
  return {hidden, da};
}

cpu::Joint one_modality(const Tensor& x) {
  return {run_parallel, x.size(0), x.size(1), x.size(2), x.size(1)};
}

cpu::Rows rows_of(const Tensor& t) {
  return {data<void>(t), is_low("rms_norm: x", t.scalar_type()), t.stride(0), t.stride(1)};
}

tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
  x = packed(x), weight = whole(weight);
  Tensor y = fresh(x, x.sizes(), x.scalar_type());
  Tensor rstd = fresh(x, {x.size(0), x.size(1)}, ScalarType::Float);
  const cpu::RmsNormArgs args{one_modality(x), rows_of(x), rows_of(y), data<float>(weight),
                              static_cast<float>(eps), data<float>(rstd)};
  UNIVIGU_CALL(isa(), rms_norm, args)
  return {y, rstd};
}

tuple<Tensor, Tensor> rms_norm_backward(Tensor x, Tensor weight, Tensor rstd, Tensor dy) {
  x = packed(x), dy = packed(dy);
  const Tensor wide_weight = whole(weight);
  const cpu::Joint j = one_modality(x);
  Tensor dx = fresh(x, x.sizes(), x.scalar_type());
  Tensor dweight = fresh(x, weight.sizes(), ScalarType::Float);
  const Tensor partial = fresh(x, {cpu::chunks_of(j), j.D}, ScalarType::Float);
  const cpu::RmsNormBackwardArgs args{j, rows_of(x), rows_of(dy), rows_of(dx),
                                      data<float>(wide_weight), data<float>(rstd),
                                      data<float>(partial), data<float>(dweight)};
  UNIVIGU_CALL(isa(), rms_norm_backward, args)
  return {dx, cast(dweight, weight.scalar_type())};
}

tuple<Tensor, Tensor> vocab_sample(Tensor h, Tensor weight, optional<Tensor> bias, Tensor seeds,
                                   int64_t step, double temperature) {
  const bool fits = h.dim() == 3 && weight.dim() == 2 && h.size(2) == weight.size(1) &&
                    weight.size(0) > 0 && h.scalar_type() == weight.scalar_type() &&
                    (!bias || bias->numel() == weight.size(0));
  STD_TORCH_CHECK(fits, "vocab_sample: h and weight must be [B, T, D] and [N, D] of one dtype, ",
                  "N at least 1 and as many biases; got ", h.dim(), " and ", weight.dim(),
                  " dimensions. Pass the text rows only.");
  const int64_t B = h.size(0), T = h.size(1), D = h.size(2), N = weight.size(0);
  STD_TORCH_CHECK(seeds.numel() == B && seeds.scalar_type() == ScalarType::Long && temperature >= 0,
                  "vocab_sample: seeds must be [B] int64 and temperature at least 0; got ",
                  seeds.numel(), " seeds. Pass one seed per sample.");
  Tensor tokens = fresh(h, {B, T}, ScalarType::Long);
  Tensor confidence = fresh(h, {B, T}, ScalarType::Float);
  if (B * T == 0) return {tokens, confidence};
  const auto [rows, row_step] = even_rows(h);
  weight = packed(weight), seeds = dense(seeds);
  if (bias) bias = dense(cast(*bias, h.scalar_type()));
  const int64_t splits = cpu::vocabulary_splits(N);
  const Tensor parts = fresh(h, {3, B * T, splits}, ScalarType::Float);
  const Tensor part_tokens = fresh(h, {B * T, splits}, ScalarType::Int);
  const cpu::VocabSampleArgs args{
      run_parallel, B, T, D, N, is_low("vocab_sample: h", h.scalar_type()), data<void>(rows),
      row_step, data<void>(weight), bias ? data<void>(*bias) : nullptr, weight.stride(0),
      data<int64_t>(seeds), static_cast<uint32_t>(step), temperature, data<float>(parts),
      data<int32_t>(part_tokens), data<int64_t>(tokens), data<float>(confidence)};
  UNIVIGU_CALL(isa(), vocab_sample, args)
  return {tokens, confidence};
}

}  // namespace
}  // namespace univigu

STABLE_TORCH_LIBRARY_FRAGMENT(univigu_C, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "routed_ffn(Tensor h, Tensor video_up, Tensor video_up_bias, Tensor video_down, "
      "Tensor video_down_bias, Tensor text_up, Tensor text_up_bias, Tensor text_down, "
      "Tensor text_down_bias, int video_rows, bool save) -> (Tensor y, Tensor a)");
  m.def("gelu_backward(Tensor a, Tensor dhidden) -> (Tensor hidden, Tensor da)");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor x, Tensor weight, Tensor rstd, Tensor dy) -> "
      "(Tensor dx, Tensor dweight)");
  m.def(
      "vocab_sample(Tensor h, Tensor weight, Tensor? bias, Tensor seeds, int step, "
      "float temperature) -> (Tensor tokens, Tensor confidence)");
}

STABLE_TORCH_LIBRARY_IMPL(univigu_C, CPU, m) {
  m.impl("linear", TORCH_BOX(&univigu::linear));
  m.impl("routed_ffn", TORCH_BOX(&univigu::routed_ffn));
  m.impl("gelu_backward", TORCH_BOX(&univigu::gelu_backward));
  m.impl("rms_norm", TORCH_BOX(&univigu::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&univigu::rms_norm_backward));
  m.impl("vocab_sample", TORCH_BOX(&univigu::vocab_sample));
}
