"""rms_norm: RMSNorm over the full width of a row, which the caller then splits into heads.

Formula  y = x * rstd * weight, rstd = 1/sqrt(mean(x^2) + eps) over D. Of cross-attention's queries
         and of the prompt's keys; joint attention's are normed by qknorm_rope.
Gradient with g = dy * weight and n = x * rstd: dx = rstd * (g - n * mean(g * n));
         dweight = sum_rows dy * n
Dtypes   any float in, fp32 statistics and arithmetic (fp64 for fp64), one rounding at the end.
Saved    x, weight and one fp32 number per row.
Bytes    4D per row: bf16 in and out. Backward 6D: x and dy in, dx out.
Bound    memory: 4 FLOP per 4 bytes.
Triton   a row is normed in registers while the next one is under way to shared memory; 8 rows share
         a load of weight. dweight: one partial sum per 64 rows, then one sum over those in a fixed
         order. Of few rows a program takes an eighth as many.
CPU      a row is read from memory once; the same partial sums, for any number of threads.
Given up the reference goes through memory five times in bf16: it casts, squares, scales and casts.
Legend   B samples, R rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._compiled import built, supports_cpu
from ._rows import load_row, packed, row_configuration
from ._spec import Backend, Op, joint_rows
from ._triton import launch, operator, supports_triton, tl, triton


def check(x: Tensor, weight: Tensor) -> None:
    require(
        x.ndim == 3 and weight.shape == x.shape[2:],
        "rms_norm: x and weight",
        "[B, R, D] and [D]",
        (list(x.shape), list(weight.shape)),
        "Norm before the split into heads.",
    )


def rms_norm_reference(x_BRD: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, R, D] (strided views are fine), weight [D] -> [B, R, D] in the dtype of x."""
    check(x_BRD, weight_D)
    dtype = compute_dtype(x_BRD)
    return F.rms_norm(x_BRD.to(dtype), weight_D.shape, weight_D.to(dtype), eps).to(x_BRD.dtype)


@triton.jit
def _rms_norm_forward(
    x,
    weight,
    y,
    rstd,
    rows,
    x_b,
    x_r,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * ROWS
    cols = tl.arange(0, BLOCK)
    w_row = load_row(weight, cols, D)
    for row in tl.range(first, tl.minimum(first + ROWS, rows), num_stages=STAGES):
        at = b * rows + row
        x_row = load_row(x + b * x_b + row * x_r, cols, D)
        row_rstd = tl.rsqrt(tl.sum(x_row * x_row, 0) / D + eps)
        tl.store(rstd + at, row_rstd)
        y_row = x_row * row_rstd * w_row
        tl.store(y + at * D + cols, y_row.to(y.dtype.element_ty), cols < D)


@triton.jit
def _rms_norm_backward(
    x,
    weight,
    rstd,
    dy,
    dx,
    dweight,
    rows,
    x_b,
    x_r,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first, cols = tile.to(tl.int64) * ROWS, tl.arange(0, BLOCK)
    w_row, dw_row = load_row(weight, cols, D), tl.zeros([BLOCK], tl.float32)
    for row in tl.range(first, tl.minimum(first + ROWS, rows), num_stages=STAGES):
        at = b * rows + row
        row_rstd = tl.load(rstd + at)
        n_row = load_row(x + b * x_b + row * x_r, cols, D) * row_rstd
        dy_row = load_row(dy + at * D, cols, D)
        g_row = dy_row * w_row
        dx_row = row_rstd * (g_row - n_row * (tl.sum(g_row * n_row, 0) / D))
        tl.store(dx + at * D + cols, dx_row.to(dx.dtype.element_ty), cols < D)
        dw_row += dy_row * n_row
    partial = (b * tl.num_programs(0) + tile) * D
    tl.store(dweight + partial + cols, dw_row, cols < D)


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y, rstd [B, R] fp32."""
    (B, R, D), x, weight = x.shape, packed(x), packed(weight)
    y, rstd = x.new_empty(B, R, D), x.new_empty(B, R, dtype=torch.float32)
    options = row_configuration("rms_norm_forward", B * R, 8, 8, x)
    grid, strides = (triton.cdiv(R, options["ROWS"]), B), x.stride()[:2]
    launch(_rms_norm_forward, grid, x, weight, y, rstd, R, *strides, eps, D=D, **options)
    return y, rstd


def _backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Returns dx, dweight. Sums of tiles are added in a fixed order, so repeats are bit-equal."""
    (B, R, D), x, weight, dy = x.shape, packed(x), packed(weight), dy.contiguous()
    options = row_configuration("rms_norm_backward", B * R, 64, 16, x, dy)
    tiles, strides = triton.cdiv(R, options["ROWS"]), x.stride()[:2]
    dx, dweight = x.new_empty(B, R, D), x.new_empty(B, tiles, D, dtype=torch.float32)
    tensors = x, weight, rstd, dy, dx, dweight
    launch(_rms_norm_backward, (tiles, B), *tensors, R, *strides, D=D, **options)
    return dx, dweight.sum((0, 1)).to(weight.dtype)


forward_op = operator("univigu::rms_norm", _forward)
backward_op = operator("univigu::rms_norm_backward", _backward)


@forward_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)


@backward_op.register_fake
def _(x, weight, rstd, dy):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # of rstd there is none
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dy, _):
    return *backward_op(*ctx.saved_tensors, dy), None


forward_op.register_autograd(_differentiate, setup_context=_save)


def rms_norm_triton(x_BRD: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """As `rms_norm_reference`, in one launch."""
    check(x_BRD, weight_D)
    return forward_op(x_BRD, weight_D, eps)[0]


def rms_norm_cpu(x_BRD: Tensor, weight_D: Tensor, eps: float = 1e-6) -> Tensor:
    """As `rms_norm_reference`, in one pass over memory."""
    check(x_BRD, weight_D)
    return torch.ops.univigu_C.rms_norm(x_BRD, weight_D, eps)[0]


if built():

    @torch.library.register_fake("univigu_C::rms_norm")
    def _(x, weight, eps):
        return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=torch.float32)

    @torch.library.register_fake("univigu_C::rms_norm_backward")
    def _(x, weight, rstd, dy):
        return x.new_empty(x.shape), weight.new_empty(weight.shape)

    def _differentiate_cpu(ctx, dy, _):
        dx, dweight = torch.ops.univigu_C.rms_norm_backward(*ctx.saved_tensors, dy)
        return dx, dweight, None

    torch.library.register_autograd("univigu_C::rms_norm", _differentiate_cpu, setup_context=_save)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: bf16 queries, and keys beside values; the
    weight in fp32."""
    B, D, weight = case["B"], case["D"], torch.empty(case["D"], device="meta")
    rows, context = case["V"] + case["T"], case["C"]
    for joint in ((rows, 1), (context, 2)):
        x = torch.empty(B, *joint, D, dtype=torch.bfloat16, device="meta")[:, :, 0]
        y, rstd = _forward(x, weight, 1e-6)
        _backward(x, weight, rstd, y)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return (randn(2, 29, 32), randn(32)), {}


OP = Op(
    name="rms_norm",
    backends=(
        Backend("triton", rms_norm_triton, supports_triton, auto_on=("cuda",)),
        Backend("cpu", rms_norm_cpu, supports_cpu),
        Backend("reference", rms_norm_reference),
    ),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * c["D"],
    flops=lambda c: 4 * joint_rows(c) * c["D"],
    rehearse=rehearse,
)
