// Bindings of flash attention, joint and cross.
#include "bindings.h"
#include "cpu/attention.h"

namespace univigu {
namespace {

using std::optional;
using std::tuple;

cpu::Heads heads(const Tensor& t) {
  return {data<void>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// `lengths` is contiguous int64 or null.
cpu::Attention geometry(const Tensor& q, const Tensor& k, const Tensor& v, int64_t video_queries,
                        int64_t video_rows, int64_t video_keys, const optional<Tensor>& lengths) {
  const bool fits = q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && q.size(0) == k.size(0) &&
                    q.size(2) == k.size(2) && q.size(3) == k.size(3) && k.size(0) == v.size(0) &&
                    k.size(1) == v.size(1) && k.size(2) == v.size(2) && k.size(3) == v.size(3);
  STD_TORCH_CHECK(fits && q.scalar_type() == k.scalar_type() &&
                      q.scalar_type() == v.scalar_type(),
                  "attention: q, k and v must be [B, rows, H, K] of the same B, H, K and dtype; "
                  "got ", q.dim(), " dimensions. Split the heads before attention.");
  STD_TORCH_CHECK(q.size(3) <= cpu::WIDEST_HEAD,
                  "attention: q, k and v must be of head_dim at most ", cpu::WIDEST_HEAD,
                  " in the backend cpu; got ", q.size(3), ". Request the backend sdpa for it.");
  STD_TORCH_CHECK(0 <= video_queries && video_queries <= q.size(1) && 0 <= video_rows &&
                      video_rows <= k.size(1) && 0 <= video_keys && video_keys <= k.size(1) &&
                      (!lengths || (lengths->dim() == 1 && lengths->size(0) == k.size(0) &&
                                    q.size(1) <= k.size(1))),
                  "attention: video rows and lengths must be inside the sequence; got ",
                  video_queries, ", ", video_rows, " and ", video_keys, ". Correct the call.");
  return {run_parallel, is_low("attention: q", q.scalar_type()), q.size(0), q.size(1), k.size(1),
          q.size(2), q.size(3), video_queries, video_rows, video_keys,
          lengths ? data<int64_t>(*lengths) : nullptr, heads(q), heads(k), heads(v)};
}

optional<Tensor> integers(const optional<Tensor>& lengths) {
  if (!lengths) return lengths;
  return dense(cast(*lengths, ScalarType::Long));
}

tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, int64_t video_queries,
                                int64_t video_rows, int64_t video_keys, optional<Tensor> lengths,
                                int64_t repeats) {
  STD_TORCH_CHECK(repeats >= 1 && (repeats == 1 || !lengths),
                  "attention: repeats must be at least 1, and 1 with lengths; got ", repeats,
                  ". Pass how many times the last key counts.");
  q = packed(q), k = packed(k), v = packed(v), lengths = integers(lengths);
  const cpu::Attention a = geometry(q, k, v, video_queries, video_rows, video_keys, lengths);
  Tensor o = fresh(q, q.sizes(), q.scalar_type());
  Tensor lse = fresh(q, {a.B, a.H, a.Q}, ScalarType::Float);
  const Tensor room = fresh(q, {cpu::attention_room(a)}, ScalarType::Float);
  const cpu::AttentionArgs args{a, repeats, heads(o), data<float>(lse), data<float>(room)};
  UNIVIGU_CALL(isa(), attention, args)
  return {o, lse};
}

tuple<Tensor, Tensor, Tensor> attention_backward(
    Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, Tensor out_gradient, int64_t video_queries,
    int64_t video_rows, int64_t video_keys, optional<Tensor> lengths) {
  q = packed(q), k = packed(k), v = packed(v), o = packed(o), out_gradient = packed(out_gradient);
  lse = dense(lse), lengths = integers(lengths);
  const cpu::Attention a = geometry(q, k, v, video_queries, video_rows, video_keys, lengths);
  STD_TORCH_CHECK(o.numel() == q.numel() && out_gradient.numel() == q.numel() && o.dim() == 4 &&
                      out_gradient.dim() == 4 && lse.numel() == a.B * a.H * a.Q &&
                      o.scalar_type() == q.scalar_type() &&
                      out_gradient.scalar_type() == q.scalar_type() &&
                      lse.scalar_type() == ScalarType::Float,
                  "attention_backward: o and its gradient must be as q, lse [B, H, Q] in float32; "
                  "got ", o.numel(), " elements. Pass what the forward gave.");
  Tensor dq = fresh(q, q.sizes(), q.scalar_type());
  Tensor dk = fresh(k, k.sizes(), k.scalar_type()), dv = fresh(v, v.sizes(), v.scalar_type());
  const Tensor room = fresh(q, {cpu::attention_backward_room(a)}, ScalarType::Float);
  const cpu::AttentionBackwardArgs args{
      a, heads(o), heads(out_gradient), data<float>(lse), heads(dq), heads(dk), heads(dv),
      data<float>(room)};
  UNIVIGU_CALL(isa(), attention_backward, args)
  return {dq, dk, dv};
}

}  // namespace
}  // namespace univigu

STABLE_TORCH_LIBRARY_FRAGMENT(univigu_C, m) {
  m.def("attention(Tensor q, Tensor k, Tensor v, int video_queries, int video_rows, "
        "int video_keys, Tensor? lengths, int repeats=1) -> (Tensor, Tensor)");
  m.def("attention_backward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
        "Tensor out_gradient, int video_queries, int video_rows, int video_keys, Tensor? lengths) "
        "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(univigu_C, CPU, m) {
  m.impl("attention", TORCH_BOX(&univigu::attention));
  m.impl("attention_backward", TORCH_BOX(&univigu::attention_backward));
}
