"""residual_adaln: x' = x + gate * y, then h = LN(x') * weight + shift, in one pass.

Formula  closes one sub-layer (gate, residual add) and opens the next (adaln of the new x). With a
         constant row c, of a second sub-layer that gives every row of a sample the same, it closes
         both: x' = (x + gate * y) + c.
Gradient with dn the gradient of adaln at x': d = dx' + dn;
         dx = d; dy = gate * d; dgate = sum_rows y * d; dweight, dshift as in adaln;
         dc = sum_rows d
Dtypes   x any float (the residual stream is fp32), y may be bf16; fp32 arithmetic (fp64 for fp64).
         x' is rounded once to x.dtype and h is the norm of that rounded x'; h rounds once more.
         With c both of its sums round to x.dtype, so one launch gives what two would.
Saved    x', weight and two fp32 numbers per row; y and gate where there is a gate.
Bytes    12D per row: fp32 x in and out, bf16 y in, bf16 h out. Apart, the ops move 16D.
         Backward 18D: fp32 x', dx' and bf16 dh, y in, fp32 dx and bf16 dy out; 14D without a gate.
Bound    memory: 10 FLOP per 12 bytes.
Triton   as adaln, with a third partial sum for dgate.
CPU      as adaln too.
Given up nothing.
Legend   B samples, L joint rows [video ; text], D width, 2 modalities (0 video, 1 text).
"""

import torch
from torch import Tensor

from ._adaln import (
    Norm,
    check_norm,
    example_norm,
    input_gradient,
    norm_reference,
    normalise_row,
    reduce_tiles,
    store_row,
    strides,
)
from ._checks import check_modulation, compute_dtype, require, segments
from ._compiled import built, supports_cpu
from ._fp8 import FP8, forbid_fp8, forbid_fp8_gradient
from ._rows import columns, load_row, packed, row_configuration, row_tile, tiles_of
from ._spec import Backend, Op, joint_rows
from ._triton import launch, operator, supports_triton, tl, triton


def check(x: Tensor, y: Tensor, gate: Tensor | None, norm: Norm, video_rows: int, constant) -> None:
    what = "residual_adaln"
    check_norm(what, x, norm, video_rows)
    require(
        y.shape == x.shape,
        f"{what}: y",
        f"shaped like x {list(x.shape)}",
        list(y.shape),
        "Pass the branch output for the same rows.",
    )

    if gate is not None:
        check_modulation(what, "gate", gate, x.shape[0], x.shape[2])
    if constant is not None:
        require(
            constant.shape in ((1, 1, x.shape[2]), (x.shape[0], 1, x.shape[2])),
            f"{what}: constant",
            f"[1, 1, {x.shape[2]}] or [{x.shape[0]}, 1, {x.shape[2]}]",
            list(constant.shape),
            "Pass one row, of all samples or of each.",
        )


def add_gated(x: Tensor, y: Tensor, gate: Tensor | None, video_rows: int) -> Tensor:
    """x + gate * y, gate [1|B, 1|2, D] or None for an ungated branch; one dtype throughout."""
    if gate is None:
        return x + y
    if gate.shape[1] == 1:
        return torch.addcmul(x, gate, y)
    (x_video, x_text), (y_video, y_text) = segments(x, video_rows), segments(y, video_rows)
    video = torch.addcmul(x_video, gate[:, :1], y_video)
    return torch.cat([video, torch.addcmul(x_text, gate[:, 1:], y_text)], 1)


def residual_adaln_reference(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_B2D: Tensor | None,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
    constant_B1D: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """x, y [B, L, D], gate [1|B, 1|2, D] or None, the norm of x', constant [1|B, 1, D] or None ->
    (x' in x.dtype, h as adaln gives)."""
    check(x_BLD, y_BLD, gate_B2D, norm, video_rows, constant_B1D)
    dtype = compute_dtype(x_BLD)
    gate = None if gate_B2D is None else gate_B2D.to(dtype)
    x_BLD = add_gated(x_BLD.to(dtype), y_BLD.to(dtype), gate, video_rows).to(x_BLD.dtype)
    if constant_B1D is not None:
        x_BLD = (x_BLD.to(dtype) + constant_B1D.to(dtype)).to(x_BLD.dtype)
    h = norm_reference(x_BLD, norm, video_rows, out_dtype)
    return x_BLD, h


@triton.jit
def _residual_adaln_forward(
    x,
    y,
    gate,
    weight,
    shift,
    constant,
    new,
    h,
    scale,
    mean,
    rstd,
    video_rows,
    rows,
    x_b,
    x_l,
    y_b,
    y_l,
    g_b,
    g_s,
    w_b,
    w_s,
    s_b,
    s_s,
    c_b,
    eps_video,
    eps_text,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    FP8: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64)
    segment, first, end = row_tile(tl.program_id(0), video_rows, rows, ROWS)
    cols, eps = columns(BLOCK), tl.where(segment == 1, eps_text, eps_video)

    w_row = load_row(weight + b * w_b + segment * w_s, cols, D)
    s_row = load_row(shift + b * s_b + segment * s_s, cols, D)
    if gate is not None:
        g_row = load_row(gate + b * g_b + segment * g_s, cols, D)
    if constant is not None:
        c_row = load_row(constant + b * c_b, cols, D)

    for row in tl.range(first, end, num_stages=STAGES):
        at = b * rows + row
        y_row = load_row(y + b * y_b + row * y_l, cols, D)
        if gate is not None:
            y_row *= g_row
        x_row = load_row(x + b * x_b + row * x_l, cols, D) + y_row
        x_row = x_row.to(new.dtype.element_ty)
        if constant is not None:
            x_row = (x_row.to(tl.float32) + c_row).to(new.dtype.element_ty)
        tl.store(new + at * D + cols, x_row, cols < D)

        n_row, row_mean, row_rstd = normalise_row(x_row.to(tl.float32), cols, eps, D)
        tl.store(mean + at, row_mean)
        tl.store(rstd + at, row_rstd)
        store_row(n_row * w_row + s_row, h, scale, at, cols, D, FP8)


@triton.jit
def _residual_adaln_backward(
    new,
    y,
    gate,
    weight,
    mean,
    rstd,
    dnew,
    dh,
    dx,
    dy,
    dgate,
    dweight,
    dshift,
    video_rows,
    rows,
    y_b,
    y_l,
    g_b,
    g_s,
    w_b,
    w_s,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    segment, first, end = row_tile(tile, video_rows, rows, ROWS)
    cols = columns(BLOCK)

    w_row = load_row(weight + b * w_b + segment * w_s, cols, D)
    dw_row, ds_row = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if gate is not None:
        g_row = load_row(gate + b * g_b + segment * g_s, cols, D)
        dg_row = tl.zeros([BLOCK], tl.float32)

    for row in tl.range(first, end, num_stages=STAGES):
        at = b * rows + row
        x_row = load_row(new + at * D, cols, D)
        n_row = tl.where(cols < D, (x_row - tl.load(mean + at)) * tl.load(rstd + at), 0.0)
        dh_row = load_row(dh + at * D, cols, D)
        d_row = input_gradient(dh_row * w_row, n_row, tl.load(rstd + at), D)
        d_row += load_row(dnew + at * D, cols, D)
        tl.store(dx + at * D + cols, d_row.to(dx.dtype.element_ty), cols < D)

        dy_row = d_row
        if gate is not None:
            dg_row += d_row * load_row(y + b * y_b + row * y_l, cols, D)
            dy_row = d_row * g_row
        tl.store(dy + at * D + cols, dy_row.to(dy.dtype.element_ty), cols < D)
        dw_row += dh_row * n_row
        ds_row += dh_row

    partial = (b * tl.num_programs(0) + tile) * D
    tl.store(dweight + partial + cols, dw_row, cols < D)
    tl.store(dshift + partial + cols, ds_row, cols < D)
    if gate is not None:
        tl.store(dgate + partial + cols, dg_row, cols < D)


def _forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    video_rows: int,
    eps_video: float,
    eps_text: float,
    out_dtype: torch.dtype,
    constant: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns x', h, the fp8 scale of each row (empty unless fp8), mean, rstd [B, L] fp32."""
    B, L, D = x.shape
    x, y, weight, shift = packed(x), packed(y), packed(weight), packed(shift)
    gate, constant = (None if t is None else packed(t) for t in (gate, constant))

    new, h = x.new_empty(B, L, D), x.new_empty(B, L, D, dtype=out_dtype)
    scale = x.new_empty(B, L if out_dtype == FP8 else 0, dtype=torch.float32)
    mean, rstd = (x.new_empty(B, L, dtype=torch.float32) for _ in range(2))

    options = row_configuration("residual_adaln_forward", B * L, 8, 8, x, y)
    launch(
        _residual_adaln_forward, (sum(tiles_of(video_rows, L, options["ROWS"])), B),
        x, y, gate, weight, shift, constant, new, h, scale, mean, rstd, video_rows, L,
        *x.stride()[:2], *y.stride()[:2], *strides(gate), *strides(weight), *strides(shift),
        strides(constant)[0], eps_video, eps_text, D=D, FP8=out_dtype == FP8, **options,
    )  # fmt: skip

    return new, h, scale, mean, rstd


def _backward(
    new: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    weight: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dnew: Tensor,
    dh: Tensor,
    video_rows: int,
    y_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns dx, dy, dgate, dweight, dshift. Without a gate y isn't needed and dgate is empty."""
    B, L, D = new.shape
    weight, dnew, dh = packed(weight), dnew.contiguous(), dh.contiguous()
    y, gate = (None if t is None else packed(t) for t in (y, gate))

    options = row_configuration("residual_adaln_backward", B * L, 64, 16, new, y, dnew, dh)
    tiles = tiles_of(video_rows, L, options["ROWS"])

    dx, dy = new.new_empty(B, L, D), new.new_empty(B, L, D, dtype=y_dtype)
    dgate, dweight, dshift = (
        new.new_empty(B, sum(tiles), D, dtype=torch.float32) for _ in range(3)
    )

    launch(
        _residual_adaln_backward, (sum(tiles), B), new, y, gate, weight, mean, rstd, dnew, dh, dx,
        dy, dgate, dweight, dshift, video_rows, L, *((0, 0) if y is None else y.stride()[:2]),
        *strides(gate), *strides(weight), D=D, **options,
    )  # fmt: skip

    dgate = new.new_empty(0) if gate is None else reduce_tiles(dgate, tiles[0], gate)
    dweight, dshift = reduce_tiles(dweight, tiles[0], weight), reduce_tiles(dshift, tiles[0], shift)
    return dx, dy, dgate, dweight, dshift


forward_op = operator("univigu::residual_adaln", _forward)
backward_op = operator("univigu::residual_adaln_backward", _backward)


@forward_op.register_fake
def _(x, y, gate, weight, shift, video_rows, eps_video, eps_text, out_dtype, constant):
    B, L, D = x.shape
    scale = x.new_empty(B, L if out_dtype == FP8 else 0, dtype=torch.float32)
    mean, rstd = (x.new_empty(B, L, dtype=torch.float32) for _ in range(2))
    return x.new_empty(B, L, D), x.new_empty(B, L, D, dtype=out_dtype), scale, mean, rstd


@backward_op.register_fake
def _(new, y, gate, weight, shift, mean, rstd, dnew, dh, video_rows, y_dtype):
    dy, like = new.new_empty(new.shape, dtype=y_dtype), new.new_empty(0) if gate is None else gate
    dx, dgate, dweight, dshift = (t.new_empty(t.shape) for t in (new, like, weight, shift))
    return dx, dy, dgate, dweight, dshift


def _constant_gradient(dx: Tensor, like: tuple[torch.Size, torch.dtype] | None) -> Tensor | None:
    """The gradient of a constant row of this shape and dtype."""
    if like is None:
        return None
    shape, dtype = like
    return dx.sum((0, 1) if shape[0] == 1 else 1, dtype=torch.float32).to(dtype).view(shape)


def _remember(ctx, y: Tensor, constant: Tensor | None, h_dtype: torch.dtype) -> None:
    """What of the arguments the gradients take after. Of statistics there is no gradient, of a
    result that nobody used neither: `_given` makes zeros for that alone."""
    ctx.set_materialize_grads(False)
    ctx.y_dtype, ctx.h_dtype = y.dtype, h_dtype
    ctx.constant = None if constant is None else (constant.shape, constant.dtype)


def _given(ctx, dnew: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
    """What was saved and both gradients. Selective recomputation lets a tensor be read once."""
    saved = ctx.saved_tensors
    dnew = torch.zeros_like(saved[0]) if dnew is None else dnew
    return *saved, dnew, torch.zeros_like(saved[0], dtype=ctx.h_dtype) if dh is None else dh


def _save(ctx, inputs, output):
    x, y, gate, weight, shift, ctx.video_rows, _, _, out_dtype, constant = inputs
    forbid_fp8_gradient("residual_adaln", out_dtype, (x, y, gate, weight, shift, constant))
    new, _, _, mean, rstd = output
    _remember(ctx, y, constant, out_dtype)
    ctx.save_for_backward(new, None if gate is None else y, gate, weight, shift, mean, rstd)


def _differentiate(ctx, dnew, dh, *_):
    given = _given(ctx, dnew, dh)
    dx, dy, dgate, *mods = backward_op(*given, ctx.video_rows, ctx.y_dtype)
    dgate, dconstant = None if given[2] is None else dgate, _constant_gradient(dx, ctx.constant)
    return dx, dy, dgate, *mods, None, None, None, None, dconstant


forward_op.register_autograd(_differentiate, setup_context=_save)


def residual_adaln_triton(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_B2D: Tensor | None,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
    constant_B1D: Tensor | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """As `residual_adaln_reference`, in one launch."""
    check(x_BLD, y_BLD, gate_B2D, norm, video_rows, constant_B1D)
    out_dtype = out_dtype or x_BLD.dtype
    new, h, scale, _, _ = forward_op(
        x_BLD, y_BLD, gate_B2D, *norm[:2], video_rows, *norm.eps, out_dtype, constant_B1D
    )
    return new, (h, scale) if out_dtype == FP8 else h


def residual_adaln_cpu(
    x_BLD: Tensor,
    y_BLD: Tensor,
    gate_B2D: Tensor | None,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
    constant_B1D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `residual_adaln_reference` in fp32 and bf16, in one pass over memory; no fp8."""
    check(x_BLD, y_BLD, gate_B2D, norm, video_rows, constant_B1D)
    out_dtype = out_dtype or x_BLD.dtype
    forbid_fp8("residual_adaln", out_dtype)
    return torch.ops.univigu_C.residual_adaln(
        x_BLD, y_BLD, gate_B2D, *norm[:2], video_rows, *norm.eps, out_dtype, constant_B1D
    )[:2]


if built():

    @torch.library.register_fake("univigu_C::residual_adaln")
    def _(x, y, gate, weight, shift, video_rows, eps_video, eps_text, out_dtype, constant):
        stats = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
        return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), stats

    @torch.library.register_fake("univigu_C::residual_adaln_backward")
    def _(new, y, gate, weight, shift, stats, dnew, dh, video_rows, y_dtype):
        dy = new.new_empty(new.shape, dtype=y_dtype)
        like = new.new_empty(0) if gate is None else gate
        dx, dgate, dweight, dshift = (t.new_empty(t.shape) for t in (new, like, weight, shift))
        return dx, dy, dgate, dweight, dshift

    def _save_cpu(ctx, inputs, output):
        x, y, gate, weight, shift, ctx.video_rows, _, _, out_dtype, constant = inputs
        _remember(ctx, y, constant, out_dtype)
        y = None if gate is None else y
        ctx.save_for_backward(output[0], y, gate, weight, shift, output[2])
        ctx.mark_non_differentiable(output[2])

    def _differentiate_cpu(ctx, dnew, dh, _):
        given = _given(ctx, dnew, dh)
        dx, dy, dgate, *mods = torch.ops.univigu_C.residual_adaln_backward(
            *given, ctx.video_rows, ctx.y_dtype
        )
        dgate, dconstant = None if given[2] is None else dgate, _constant_gradient(dx, ctx.constant)
        return dx, dy, dgate, *mods, None, None, None, None, dconstant

    torch.library.register_autograd(
        "univigu_C::residual_adaln", _differentiate_cpu, setup_context=_save_cpu
    )


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: bf16 activations, fp32 residual stream."""
    B, V, L, D = case["B"], case["V"], case["V"] + case["T"], case["D"]
    x, mod = (torch.empty(B, n, D, device="meta") for n in (L, 2))
    y, norm = x.bfloat16(), (mod, mod, V, 1e-6, 1e-5)
    for gate in (mod, None):
        for out_dtype in (torch.bfloat16, FP8):
            _forward(x, y, gate, *norm, out_dtype, None)
        branch = (None, None) if gate is None else (y, gate)
        _backward(x, *branch, mod, mod, x[..., 0], x[..., 1], x, y, V, torch.bfloat16)

    # The text rows of a step of v2t over a cached video, whose context is empty.
    x, y, norm = x[:, V:], y[:, V:], (mod, mod, 0, 1e-6, 1e-6)
    for out_dtype in (torch.bfloat16, FP8):
        _forward(x, y, mod, *norm, out_dtype, y[:, :1])


def example(device, dtype, generator):
    (x, norm, video_rows), options = example_norm(device, dtype, generator)
    y = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device, dtype)
    gate = torch.randn(norm.weight_B2D.shape, generator=generator, dtype=x.dtype).to(device)
    constant = torch.randn(2, 1, 32, generator=generator, dtype=x.dtype).to(device, dtype)
    return (x, y, gate, norm, video_rows), {**options, "constant_B1D": constant}


OP = Op(
    name="residual_adaln",
    backends=(
        Backend("triton", residual_adaln_triton, supports_triton, auto_on=("cuda",)),
        Backend("cpu", residual_adaln_cpu, supports_cpu, writes_fp8=False),
        Backend("reference", residual_adaln_reference),
    ),
    example=example,
    bytes=lambda c: 12 * joint_rows(c) * c["D"],
    flops=lambda c: 10 * joint_rows(c) * c["D"],
    rehearse=rehearse,
)
