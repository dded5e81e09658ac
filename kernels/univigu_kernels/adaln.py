"""adaln: h = LN(x) * weight + shift, with one weight and shift per sample and modality.

Formula  LN(x) = (x - mean) * rstd, rstd = 1/sqrt(var + eps) over D. `weight` is 1 + scale, folded
         by the caller, so an affine LayerNorm is the same op.
Gradient with g = dh * weight and n = LN(x):
         dx = rstd * (g - mean(g) - n * mean(g * n));
         dweight = sum_rows dh * n; dshift = sum_rows dh
Dtypes   any float in, fp32 statistics and arithmetic (fp64 for fp64), one rounding to `out_dtype`.
Saved    x, weight and two fp32 numbers per row.
Bytes    6D per row: fp32 x in, bf16 h out. 5D + 4 with fp8 out. Backward 10D: x, dh in, dx out.
Bound    memory: 8 FLOP per 6 bytes.
Triton   a row is normed in registers while the next one is under way to shared memory; 8 rows share
         a load of weight and shift. dweight, dshift: one partial sum per 64 rows, then one sum over
         those in a fixed order.
CPU      a row is read from memory once and from the first cache twice more; the same partial sums,
         so that any number of threads gives the same bits. No fp8 out.
Given up nothing; fp8 out is opt-in.
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
from ._compiled import built, supports_cpu
from ._fp8 import FP8, forbid_fp8, forbid_fp8_gradient
from ._rows import columns, load_row, packed, row_configuration, row_tile, tiles_of
from ._spec import Backend, Op, joint_rows
from ._triton import launch, operator, supports_triton, tl, triton


def adaln_reference(
    x_BLD: Tensor,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [B, L, D] and its norm -> h [B, L, D] in `out_dtype` (default x.dtype). float8_e4m3fn gives
    (h_fp8, row_scale [B, L] fp32) of quantize_rows."""
    check_norm("adaln", x_BLD, norm, video_rows)
    return norm_reference(x_BLD, norm, video_rows, out_dtype)


@triton.jit
def _adaln_forward(
    x,
    weight,
    shift,
    h,
    scale,
    mean,
    rstd,
    video_rows,
    rows,
    x_b,
    x_l,
    w_b,
    w_s,
    s_b,
    s_s,
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
    cols, eps = tl.arange(0, BLOCK), tl.where(segment == 1, eps_text, eps_video)
    w_row = load_row(weight + b * w_b + segment * w_s, cols, D)
    s_row = load_row(shift + b * s_b + segment * s_s, cols, D)
    for row in tl.range(first, end, num_stages=STAGES):
        at = b * rows + row
        x_row = load_row(x + b * x_b + row * x_l, cols, D)
        n_row, row_mean, row_rstd = normalise_row(x_row, cols, eps, D)
        tl.store(mean + at, row_mean)
        tl.store(rstd + at, row_rstd)
        store_row(n_row * w_row + s_row, h, scale, at, cols, D, FP8)


@triton.jit
def _adaln_backward(
    x,
    weight,
    mean,
    rstd,
    dh,
    dx,
    dweight,
    dshift,
    video_rows,
    rows,
    x_b,
    x_l,
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
    for row in tl.range(first, end, num_stages=STAGES):
        at = b * rows + row
        x_row = load_row(x + b * x_b + row * x_l, cols, D)
        n_row = tl.where(cols < D, (x_row - tl.load(mean + at)) * tl.load(rstd + at), 0.0)
        dh_row = load_row(dh + at * D, cols, D)
        dx_row = input_gradient(dh_row * w_row, n_row, tl.load(rstd + at), D)
        tl.store(dx + at * D + cols, dx_row.to(dx.dtype.element_ty), cols < D)
        dw_row += dh_row * n_row
        ds_row += dh_row
    partial = (b * tl.num_programs(0) + tile) * D
    tl.store(dweight + partial + cols, dw_row, cols < D)
    tl.store(dshift + partial + cols, ds_row, cols < D)


def _forward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    video_rows: int,
    eps_video: float,
    eps_text: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns h, the fp8 scale of each row (empty unless fp8), mean, rstd [B, L] fp32."""
    B, L, D = x.shape
    x, weight, shift = packed(x), packed(weight), packed(shift)

    h = torch.empty(B, L, D, dtype=out_dtype, device=x.device)
    scale = x.new_empty(B, L if out_dtype == FP8 else 0, dtype=torch.float32)
    mean, rstd = (x.new_empty(B, L, dtype=torch.float32) for _ in range(2))

    options = row_configuration("adaln_forward", B * L, 8, 8, x)
    launch(
        _adaln_forward,
        (sum(tiles_of(video_rows, L, options["ROWS"])), B),
        x,
        weight,
        shift,
        h,
        scale,
        mean,
        rstd,
        video_rows,
        L,
        *x.stride()[:2],
        *strides(weight),
        *strides(shift),
        eps_video,
        eps_text,
        D=D,
        FP8=out_dtype == FP8,
        **options,
    )

    return h, scale, mean, rstd


def _backward(
    x: Tensor,
    weight: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dh: Tensor,
    video_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dx, dweight, dshift."""
    B, L, D = x.shape
    x, weight, dh = packed(x), packed(weight), dh.contiguous()

    options = row_configuration("adaln_backward", B * L, 64, 16, x, dh)
    tiles = tiles_of(video_rows, L, options["ROWS"])

    dx = x.new_empty(B, L, D)
    dweight, dshift = (x.new_empty(B, sum(tiles), D, dtype=torch.float32) for _ in range(2))

    launch(
        _adaln_backward,
        (sum(tiles), B),
        x,
        weight,
        mean,
        rstd,
        dh,
        dx,
        dweight,
        dshift,
        video_rows,
        L,
        *x.stride()[:2],
        *strides(weight),
        D=D,
        **options,
    )

    return dx, reduce_tiles(dweight, tiles[0], weight), reduce_tiles(dshift, tiles[0], shift)


forward_op = operator("univigu::adaln", _forward)
backward_op = operator("univigu::adaln_backward", _backward)


@forward_op.register_fake
def _(x, weight, shift, video_rows, eps_video, eps_text, out_dtype):
    B, L, D = x.shape
    scale = x.new_empty(B, L if out_dtype == FP8 else 0, dtype=torch.float32)
    mean, rstd = (x.new_empty(B, L, dtype=torch.float32) for _ in range(2))
    return x.new_empty(B, L, D, dtype=out_dtype), scale, mean, rstd


@backward_op.register_fake
def _(x, weight, shift, mean, rstd, dh, video_rows):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), shift.new_empty(shift.shape)


def _save(ctx, inputs, output):
    x, weight, shift, ctx.video_rows, _, _, out_dtype = inputs
    forbid_fp8_gradient("adaln", out_dtype, (x, weight, shift))
    ctx.save_for_backward(x, weight, shift, *output[2:])


def _differentiate(ctx, dh, *_):
    return *backward_op(*ctx.saved_tensors, dh, ctx.video_rows), None, None, None, None


forward_op.register_autograd(_differentiate, setup_context=_save)


def adaln_triton(
    x_BLD: Tensor,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `adaln_reference`, in one launch."""
    check_norm("adaln", x_BLD, norm, video_rows)
    out_dtype = out_dtype or x_BLD.dtype
    h, scale, _, _ = forward_op(x_BLD, *norm[:2], video_rows, *norm.eps, out_dtype)
    return (h, scale) if out_dtype == FP8 else h


def adaln_cpu(
    x_BLD: Tensor,
    norm: Norm,
    video_rows: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `adaln_reference` in fp32 and bf16, in one pass over memory; no fp8."""
    check_norm("adaln", x_BLD, norm, video_rows)
    out_dtype = out_dtype or x_BLD.dtype
    forbid_fp8("adaln", out_dtype)
    return torch.ops.univigu_C.adaln(x_BLD, *norm[:2], video_rows, *norm.eps, out_dtype)[0]


if built():

    @torch.library.register_fake("univigu_C::adaln")
    def _(x, weight, shift, video_rows, eps_video, eps_text, out_dtype):
        stats = x.new_empty(*x.shape[:2], 2, dtype=torch.float32)
        return x.new_empty(x.shape, dtype=out_dtype), stats

    @torch.library.register_fake("univigu_C::adaln_backward")
    def _(x, weight, shift, stats, dh, video_rows):
        return tuple(t.new_empty(t.shape) for t in (x, weight, shift))

    def _save_cpu(ctx, inputs, output):
        *tensors, ctx.video_rows, _, _, _ = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    def _differentiate_cpu(ctx, dh, _):
        gradients = torch.ops.univigu_C.adaln_backward(*ctx.saved_tensors, dh, ctx.video_rows)
        return *gradients, None, None, None, None

    torch.library.register_autograd("univigu_C::adaln", _differentiate_cpu, setup_context=_save_cpu)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: bf16 activations, fp32 residual stream."""
    B, V, L, D = case["B"], case["V"], case["V"] + case["T"], case["D"]
    x, mod = (torch.empty(B, n, D, device="meta") for n in (L, 2))
    h, _, mean, rstd = _forward(x, mod, mod, V, 1e-6, 1e-5, torch.bfloat16)
    _forward(x, mod, mod, V, 1e-6, 1e-5, FP8)
    _backward(x, mod, mod, mean, rstd, h, V)


OP = Op(
    name="adaln",
    backends=(
        Backend("triton", adaln_triton, supports_triton, auto_on=("cuda",)),
        Backend("cpu", adaln_cpu, supports_cpu),
        Backend("reference", adaln_reference),
    ),
    example=example_norm,
    bytes=lambda c: 6 * joint_rows(c) * c["D"],
    flops=lambda c: 8 * joint_rows(c) * c["D"],
    rehearse=rehearse,
)
