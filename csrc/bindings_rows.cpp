// Bindings of the operations over rows: adaln, residual_adaln, rope3d, qknorm_rope, flow_step; and
// of rms_norm_silu, over pixels.
// Modulations and norm weights of any float dtype reach the kernels in fp32; their gradients leave
// in the dtype that came.
#include "bindings.h"
#include "cpu/adaln.h"
#include "cpu/flow_step.h"
#include "cpu/qknorm_rope.h"
#include "cpu/residual_adaln.h"
#include "cpu/rms_norm_silu.h"
#include "cpu/rope3d.h"

namespace univigu {
namespace {

using std::optional;
using std::tuple;

Tensor wide(const Tensor& t) { return packed(cast(t, ScalarType::Float)); }

// A packed tensor [B, L, D].
cpu::Rows rows(const char* what, const Tensor& t, const cpu::Joint& j) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == j.B && t.size(1) == j.L && t.size(2) == j.D, what,
                  " must be [", j.B, ", ", j.L, ", ", j.D, "]; got ", t.numel(),
                  " elements. Pass all rows of the same samples.");
  return {data<void>(t), is_low(what, t.scalar_type()), t.stride(0), t.stride(1)};
}

cpu::Joint joint(const char* what, const Tensor& x, int64_t video_rows) {
  STD_TORCH_CHECK(x.dim() == 3 && 0 <= video_rows && video_rows <= x.size(1), what,
                  " must be [B, L, D] with at most L video rows; got ", x.dim(),
                  " dimensions and ", video_rows, " video rows. Correct the call.");
  return {run_parallel, x.size(0), x.size(1), x.size(2), video_rows};
}

// A modulation that went through `wide`.
cpu::Mod mod(const char* what, const Tensor& t, const cpu::Joint& j) {
  STD_TORCH_CHECK(t.dim() == 3 && (t.size(0) == 1 || t.size(0) == j.B) &&
                      (t.size(1) == 1 || t.size(1) == 2) && t.size(2) == j.D,
                  what, " must be [1|B, 1|2, ", j.D, "]; got ", t.numel(),
                  " elements. Index 0 of dim 1 is video, 1 is text.");
  return {data<float>(t), t.size(0) > 1 ? t.stride(0) : 0, t.size(1) > 1 ? t.stride(1) : 0};
}

Tensor gradient_of(const Tensor& mod) { return fresh(mod, mod.sizes(), ScalarType::Float); }

cpu::ModGradient gradient(const Tensor& t) { return {data<float>(t), t.size(0), t.size(1)}; }

Tensor partial_sums(const Tensor& x, const cpu::Joint& j, int64_t sums) {
  return fresh(x, {cpu::chunks_of(j), sums, j.D}, ScalarType::Float);
}

tuple<Tensor, Tensor> adaln(Tensor x, Tensor weight, Tensor shift, int64_t video_rows,
                            double eps_video, double eps_text, ScalarType out_dtype) {
  const cpu::Joint j = joint("adaln: x", x, video_rows);
  x = packed(x), weight = wide(weight), shift = wide(shift);
  is_low("adaln: out_dtype", out_dtype);
  Tensor h = fresh(x, x.sizes(), out_dtype), stats = fresh(x, {j.B, j.L, 2}, ScalarType::Float);
  const cpu::AdalnArgs args{
      j, rows("adaln: x", x, j), rows("adaln: h", h, j), mod("adaln: weight", weight, j),
      mod("adaln: shift", shift, j),
      {static_cast<float>(eps_video), static_cast<float>(eps_text)}, data<float>(stats)};
  UNIVIGU_CALL(isa(), adaln, args)
  return {h, stats};
}

tuple<Tensor, Tensor, Tensor> adaln_backward(Tensor x, Tensor weight, Tensor shift, Tensor stats,
                                             Tensor dh, int64_t video_rows) {
  const cpu::Joint j = joint("adaln: x", x, video_rows);
  x = packed(x), dh = packed(dh);
  const Tensor wide_weight = wide(weight), partial = partial_sums(x, j, 2);
  Tensor dx = fresh(x, x.sizes(), x.scalar_type());
  Tensor dweight = gradient_of(weight), dshift = gradient_of(shift);
  const cpu::AdalnBackwardArgs args{
      j, rows("adaln: x", x, j), rows("adaln: dh", dh, j), rows("adaln: dx", dx, j),
      mod("adaln: weight", wide_weight, j), data<float>(stats), data<float>(partial),
      gradient(dweight), gradient(dshift)};
  UNIVIGU_CALL(isa(), adaln_backward, args)
  return {dx, cast(dweight, weight.scalar_type()), cast(dshift, shift.scalar_type())};
}

tuple<Tensor, Tensor, Tensor> residual_adaln(Tensor x, Tensor y, optional<Tensor> gate,
                                             Tensor weight, Tensor shift, int64_t video_rows,
                                             double eps_video, double eps_text,
                                             ScalarType out_dtype, optional<Tensor> constant) {
  const cpu::Joint j = joint("residual_adaln: x", x, video_rows);
  x = packed(x), y = packed(y), weight = wide(weight), shift = wide(shift);
  if (gate) gate = wide(*gate);
  if (constant) constant = wide(*constant);
  is_low("residual_adaln: out_dtype", out_dtype);
  Tensor sum = fresh(x, x.sizes(), x.scalar_type()), h = fresh(x, x.sizes(), out_dtype);
  Tensor stats = fresh(x, {j.B, j.L, 2}, ScalarType::Float);
  const cpu::ResidualAdalnArgs args{
      j, rows("residual_adaln: x", x, j), rows("residual_adaln: y", y, j),
      rows("residual_adaln: x'", sum, j), rows("residual_adaln: h", h, j),
      gate ? mod("residual_adaln: gate", *gate, j) : cpu::Mod{},
      mod("residual_adaln: weight", weight, j), mod("residual_adaln: shift", shift, j),
      constant ? mod("residual_adaln: constant", *constant, j) : cpu::Mod{},
      {static_cast<float>(eps_video), static_cast<float>(eps_text)}, data<float>(stats)};
  UNIVIGU_CALL(isa(), residual_adaln, args)
  return {sum, h, stats};
}

tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_adaln_backward(
    Tensor sum, optional<Tensor> y, optional<Tensor> gate, Tensor weight, Tensor shift,
    Tensor stats, Tensor dsum, Tensor dh, int64_t video_rows, ScalarType y_dtype) {
  const cpu::Joint j = joint("residual_adaln: x'", sum, video_rows);
  sum = packed(sum), dsum = packed(cast(dsum, sum.scalar_type())), dh = packed(dh);
  if (y) y = packed(*y);
  const optional<Tensor> wide_gate = gate ? optional(wide(*gate)) : std::nullopt;
  const Tensor wide_weight = wide(weight), partial = partial_sums(sum, j, gate ? 3 : 2);
  Tensor dx = fresh(sum, sum.sizes(), sum.scalar_type()), dy = fresh(sum, sum.sizes(), y_dtype);
  Tensor dweight = gradient_of(weight), dshift = gradient_of(shift);
  Tensor dgate = gate ? gradient_of(*gate) : fresh(sum, {0}, sum.scalar_type());
  const cpu::ResidualAdalnBackwardArgs args{
      j, rows("residual_adaln: x'", sum, j),
      gate ? rows("residual_adaln: y", y.value(), j) : cpu::Rows{},
      rows("residual_adaln: dx'", dsum, j), rows("residual_adaln: dh", dh, j),
      rows("residual_adaln: dx", dx, j), rows("residual_adaln: dy", dy, j),
      gate ? mod("residual_adaln: gate", *wide_gate, j) : cpu::Mod{},
      mod("residual_adaln: weight", wide_weight, j), data<float>(stats), data<float>(partial),
      gate ? gradient(dgate) : cpu::ModGradient{}, gradient(dweight), gradient(dshift)};
  UNIVIGU_CALL(isa(), residual_adaln_backward, args)
  if (gate) dgate = cast(dgate, gate->scalar_type());
  return {dx, dy, dgate, cast(dweight, weight.scalar_type()), cast(dshift, shift.scalar_type())};
}

struct Tables {
  Tensor t, h, w, text;

  Tables(Tensor t, Tensor h, Tensor w, Tensor text)
      : t(whole(t)), h(whole(h)), w(whole(w)), text(whole(text)) {}

  // For L rows of heads of K channels on a grid.
  cpu::Rotary rotary(int64_t L, int64_t K, int64_t frames, int64_t height, int64_t width) const {
    const int64_t video_rows = frames * height * width;
    STD_TORCH_CHECK(
        t.dim() == 3 && h.dim() == 3 && w.dim() == 3 && text.dim() == 3 && t.size(0) >= frames &&
            h.size(0) >= height && w.size(0) >= width && text.size(0) >= L - video_rows &&
            2 * (t.size(1) + h.size(1) + w.size(1)) == K && 2 * text.size(1) == K,
        "rope3d: rotary must be of head_dim ", K, " and ", L, " rows; got a grid of ", video_rows,
        " rows. Build the rotary tables for this grid and text length.");
    STD_TORCH_CHECK(K <= cpu::MAX_HEAD_DIM, "rope3d: head_dim must be at most ",
                    cpu::MAX_HEAD_DIM, "; got ", K, ". Request the backend reference for it.");
    return {data<float>(t), data<float>(h), data<float>(w), data<float>(text), t.size(1),
            h.size(1), K, height, width, video_rows};
  }
};

Tensor rope3d(Tensor x, Tensor t, Tensor h, Tensor w, Tensor text, int64_t frames, int64_t height,
              int64_t width, bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4, "rope3d: x must be [B, L, H, K]; got ", x.dim(),
                  " dimensions. Split the width into heads.");
  const Tables tables(t, h, w, text);
  x = packed(x);
  const int64_t B = x.size(0), L = x.size(1), H = x.size(2), K = x.size(3);
  const bool low = is_low("rope3d: x", x.scalar_type());
  Tensor out = fresh(x, x.sizes(), x.scalar_type());
  const cpu::Rope3dArgs args{
      run_parallel, B, L, H, {data<void>(x), low, x.stride(0), x.stride(1)}, x.stride(2),
      {data<void>(out), low, L * H * K, H * K},
      tables.rotary(L, K, frames, height, width), inverse};
  UNIVIGU_CALL(isa(), rope3d, args)
  return out;
}

void check_weights(const Tensor& q, const Tensor& k, const Tensor& weight_q,
                   const Tensor& weight_k) {
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && weight_q.dim() == 1 &&
                      weight_k.dim() == 1 && weight_q.size(0) == q.size(2) &&
                      weight_k.size(0) == q.size(2),
                  "qknorm_rope: q and k must be of one dtype and weights of their width; got ",
                  weight_q.numel(), " and ", weight_k.numel(), ". The norm spans all heads.");
}

// What both forwards share. k goes to k_out [B, L, D]; v, where there is one, to v_out. -> q
Tensor norm_and_rotate(Tensor q, Tensor k, optional<Tensor> v, Tensor weight_q, Tensor weight_k,
                       const Tables& tables, const Tensor& k_out, const Tensor& v_out,
                       float* rstd, int64_t frames, int64_t height, int64_t width, double eps) {
  const cpu::Joint j = joint("qknorm_rope: q", q, frames * height * width);
  check_weights(q, k, weight_q, weight_k);
  const int64_t K = 2 * tables.text.size(1);
  STD_TORCH_CHECK(K > 0 && j.D % K == 0, "qknorm_rope: head_dim must be a divisor of the width ",
                  j.D, "; got ", K, ". Build the rotary tables for this head_dim.");
  q = packed(q), k = packed(k), weight_q = whole(weight_q), weight_k = whole(weight_k);
  if (v) v = packed(*v);
  Tensor q_out = fresh(q, {j.B, j.L, j.D / K, K}, q.scalar_type());
  const bool low = is_low("qknorm_rope: q", q.scalar_type());
  const cpu::QknormRopeArgs args{
      j, tables.rotary(j.L, K, frames, height, width),
      {rows("qknorm_rope: q", q, j), rows("qknorm_rope: k", k, j)},
      {{data<void>(q_out), low, j.L * j.D, j.D}, rows("qknorm_rope: k_out", k_out, j)},
      {data<float>(weight_q), data<float>(weight_k)}, static_cast<float>(eps), rstd,
      v ? rows("qknorm_rope: v", *v, j) : cpu::Rows{},
      v ? rows("qknorm_rope: v_out", v_out, j) : cpu::Rows{}};
  UNIVIGU_CALL(isa(), qknorm_rope, args)
  return q_out;
}

tuple<Tensor, Tensor, Tensor> qknorm_rope(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k,
                                          Tensor t, Tensor h, Tensor w, Tensor text,
                                          int64_t frames, int64_t height, int64_t width,
                                          double eps) {
  const Tables tables(t, h, w, text);
  Tensor k_out = fresh(q, q.sizes(), q.scalar_type());
  Tensor rstd = fresh(q, {q.size(0), q.size(1), 2}, ScalarType::Float);
  const Tensor q_out = norm_and_rotate(q, k, {}, weight_q, weight_k, tables, k_out, k_out,
                                       data<float>(rstd), frames, height, width, eps);
  return {q_out, torch::stable::view(k_out, q_out.sizes()), rstd};
}

Tensor qknorm_rope_into(Tensor q, Tensor k, Tensor v, Tensor weight_q, Tensor weight_k, Tensor t,
                        Tensor h, Tensor w, Tensor text, Tensor k_out, Tensor v_out,
                        int64_t frames, int64_t height, int64_t width, double eps) {
  for (const Tensor* x : {&v, &k_out, &v_out}) {
    STD_TORCH_CHECK(x->scalar_type() == q.scalar_type() && x->stride(-1) == 1,
                    "qknorm_rope: v and the views of k and v must be of q's dtype, their heads "
                    "side by side; got ", toString(x->scalar_type()),
                    ". Pass rows of a contiguous cache.");
  }
  return norm_and_rotate(q, k, v, weight_q, weight_k, Tables(t, h, w, text), k_out, v_out, nullptr,
                         frames, height, width, eps);
}

tuple<Tensor, Tensor, Tensor, Tensor> qknorm_rope_backward(
    Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor t, Tensor h, Tensor w,
    Tensor text, Tensor rstd, Tensor dq_out, Tensor dk_out, int64_t frames, int64_t height,
    int64_t width) {
  const cpu::Joint j = joint("qknorm_rope: q", q, frames * height * width);
  const Tables tables(t, h, w, text);
  const ScalarType dtype = q.scalar_type(), weight_dtype = weight_q.scalar_type();
  q = packed(q), k = packed(k), weight_q = whole(weight_q), weight_k = whole(weight_k);
  dq_out = torch::stable::contiguous(dq_out), dk_out = torch::stable::contiguous(dk_out);
  STD_TORCH_CHECK(dq_out.numel() == q.numel() && dk_out.numel() == q.numel(),
                  "qknorm_rope: gradients must be shaped like the results; got ", dq_out.numel(),
                  " and ", dk_out.numel(), " elements. Pass [B, L, H, K].");
  Tensor dq = fresh(q, q.sizes(), dtype), dk = fresh(q, q.sizes(), dtype);
  Tensor dweight_q = fresh(q, {j.D}, ScalarType::Float);
  Tensor dweight_k = fresh(q, {j.D}, ScalarType::Float);
  const Tensor partial = partial_sums(q, j, 3);
  const bool low = is_low("qknorm_rope: q", dtype);
  const cpu::QknormRopeBackwardArgs args{
      j, tables.rotary(j.L, 2 * tables.text.size(1), frames, height, width),
      {rows("qknorm_rope: q", q, j), rows("qknorm_rope: k", k, j)},
      {{data<void>(dq_out), low, j.L * j.D, j.D}, {data<void>(dk_out), low, j.L * j.D, j.D}},
      {rows("qknorm_rope: dq", dq, j), rows("qknorm_rope: dk", dk, j)},
      {data<float>(weight_q), data<float>(weight_k)}, data<float>(rstd), data<float>(partial),
      {{data<float>(dweight_q), 1, 1}, {data<float>(dweight_k), 1, 1}}};
  UNIVIGU_CALL(isa(), qknorm_rope_backward, args)
  return {dq, dk, cast(dweight_q, weight_dtype), cast(dweight_k, weight_dtype)};
}

const float* state(const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float && t.numel() == size,
                  "flow_step: state must be float32 and of one shape; got ", t.numel(),
                  " elements beside ", size, ". Request flow_step=reference for float64.");
  return data<float>(t);
}

tuple<Tensor, Tensor, Tensor> video_step(Tensor x, Tensor corrected, Tensor m1, Tensor m2,
                                         Tensor velocity, optional<Tensor> null, double guidance,
                                         std::vector<double> row) {
  STD_TORCH_CHECK(row.size() == 9, "flow_step: coefficients must be 9 numbers; got ", row.size(),
                  ". Take a row of the solver's table.");
  for (Tensor* t : {&x, &corrected, &m1, &m2}) *t = torch::stable::contiguous(*t);
  const bool low = velocity.scalar_type() == ScalarType::BFloat16 &&
                   (!null || null->scalar_type() == ScalarType::BFloat16);
  const ScalarType dtype = low ? ScalarType::BFloat16 : ScalarType::Float;
  velocity = torch::stable::contiguous(cast(velocity, dtype));
  if (null) null = torch::stable::contiguous(cast(*null, dtype));
  const int64_t size = x.numel();
  STD_TORCH_CHECK(velocity.numel() == size && (!null || null->numel() == size),
                  "flow_step: velocity must be shaped like the state; got ", velocity.numel(),
                  " elements beside ", size, ". Unpatchify the velocity first.");
  Tensor x_next = fresh(x, x.sizes(), ScalarType::Float);
  Tensor corrected_next = fresh(x, x.sizes(), ScalarType::Float);
  Tensor m0 = fresh(x, x.sizes(), ScalarType::Float);
  const auto c = [&](int i) { return static_cast<float>(row[i]); };
  const cpu::VideoStepArgs args{
      run_parallel, size, state(x, size), state(corrected, size), state(m1, size),
      state(m2, size), data<void>(velocity), null ? data<void>(*null) : nullptr, low,
      static_cast<float>(guidance), {c(0), c(1), c(2), c(3), c(4), c(5), c(6), c(7), c(8)},
      data<float>(x_next), data<float>(corrected_next), data<float>(m0)};
  UNIVIGU_CALL(isa(), video_step, args)
  return {x_next, corrected_next, m0};
}

Tensor text_step(Tensor tokens, Tensor proposal, double probability, Tensor seeds, int64_t step) {
  for (Tensor* t : {&tokens, &proposal, &seeds}) {
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Long,
                    "flow_step: tokens, proposal and seeds must be int64; got ",
                    toString(t->scalar_type()), ". Pass token ids.");
    *t = torch::stable::contiguous(*t);
  }
  STD_TORCH_CHECK(tokens.dim() == 2 && proposal.numel() == tokens.numel() &&
                      seeds.numel() == tokens.size(0),
                  "flow_step: tokens must be [B, T] with a proposal each and a seed per sample; ",
                  "got ", proposal.numel(), " proposals and ", seeds.numel(),
                  " seeds. Sample every text row.");
  Tensor next = fresh(tokens, tokens.sizes(), ScalarType::Long);
  const cpu::TextStepArgs args{run_parallel, tokens.size(0), tokens.size(1),
                               data<int64_t>(tokens), data<int64_t>(proposal),
                               data<int64_t>(seeds), probability, static_cast<uint32_t>(step),
                               data<int64_t>(next)};
  UNIVIGU_CALL(isa(), text_step, args)
  return next;
}

Tensor rms_norm_silu(Tensor x, Tensor gamma) {
  STD_TORCH_CHECK(x.dim() >= 3 && gamma.dim() == 1 && gamma.size(0) == x.size(1),
                  "rms_norm_silu: x and gamma must be [B, C, ...] and [C]; got ", x.dim(),
                  " dimensions and ", gamma.numel(), " numbers. Flatten gamma.");
  x = torch::stable::contiguous(x), gamma = wide(gamma);
  const bool low = is_low("rms_norm_silu: x", x.scalar_type());
  Tensor y = fresh(x, x.sizes(), x.scalar_type());
  const int64_t B = x.size(0), C = x.size(1), pixels = x.numel() ? x.numel() / (B * C) : 0;
  const cpu::RmsNormSiluArgs args{run_parallel, B,   C, pixels, data<void>(x), data<void>(y),
                                  low,          data<float>(gamma)};
  UNIVIGU_CALL(isa(), rms_norm_silu, args)
  return y;
}

}  // namespace
}  // namespace univigu

STABLE_TORCH_LIBRARY_FRAGMENT(univigu_C, m) {
  m.def(
      "adaln(Tensor x, Tensor weight, Tensor shift, int video_rows, float eps_video, "
      "float eps_text, ScalarType out_dtype) -> (Tensor, Tensor)");
  m.def(
      "adaln_backward(Tensor x, Tensor weight, Tensor shift, Tensor stats, Tensor dh, "
      "int video_rows) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln(Tensor x, Tensor y, Tensor? gate, Tensor weight, Tensor shift, "
      "int video_rows, float eps_video, float eps_text, ScalarType out_dtype, "
      "Tensor? constant) -> (Tensor, Tensor, Tensor)");
  m.def(
      "residual_adaln_backward(Tensor sum, Tensor? y, Tensor? gate, Tensor weight, Tensor shift, "
      "Tensor stats, Tensor dsum, Tensor dh, int video_rows, ScalarType y_dtype) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rope3d(Tensor x, Tensor t, Tensor h, Tensor w, Tensor text, int frames, int height, "
      "int width, bool inverse) -> Tensor");
  m.def(
      "qknorm_rope(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor t, Tensor h, "
      "Tensor w, Tensor text, int frames, int height, int width, float eps) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "qknorm_rope_into(Tensor q, Tensor k, Tensor v, Tensor weight_q, Tensor weight_k, Tensor t, "
      "Tensor h, Tensor w, Tensor text, Tensor(a!) k_out, Tensor(b!) v_out, int frames, "
      "int height, int width, float eps) -> Tensor");
  m.def(
      "qknorm_rope_backward(Tensor q, Tensor k, Tensor weight_q, Tensor weight_k, Tensor t, "
      "Tensor h, Tensor w, Tensor text, Tensor rstd, Tensor dq_out, Tensor dk_out, int frames, "
      "int height, int width) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "video_step(Tensor x, Tensor corrected, Tensor m1, Tensor m2, Tensor velocity, "
      "Tensor? null, float guidance, float[] coefficients) -> (Tensor, Tensor, Tensor)");
  m.def(
      "text_step(Tensor tokens, Tensor proposal, float probability, Tensor seeds, int step) "
      "-> Tensor");
  m.def("rms_norm_silu(Tensor x, Tensor gamma) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(univigu_C, CPU, m) {
  m.impl("adaln", TORCH_BOX(&univigu::adaln));
  m.impl("adaln_backward", TORCH_BOX(&univigu::adaln_backward));
  m.impl("residual_adaln", TORCH_BOX(&univigu::residual_adaln));
  m.impl("residual_adaln_backward", TORCH_BOX(&univigu::residual_adaln_backward));
  m.impl("rope3d", TORCH_BOX(&univigu::rope3d));
  m.impl("qknorm_rope", TORCH_BOX(&univigu::qknorm_rope));
  m.impl("qknorm_rope_into", TORCH_BOX(&univigu::qknorm_rope_into));
  m.impl("qknorm_rope_backward", TORCH_BOX(&univigu::qknorm_rope_backward));
  m.impl("video_step", TORCH_BOX(&univigu::video_step));
  m.impl("text_step", TORCH_BOX(&univigu::text_step));
  m.impl("rms_norm_silu", TORCH_BOX(&univigu::rms_norm_silu));
}
