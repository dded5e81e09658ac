"""linear: y = x weight^T + bias, the projections around attention.

Gradient dx = dy weight; dweight = dy^T x; dbias = sum_rows dy
Dtypes   x, weight and bias of one dtype; fp32 accumulation (fp64 for fp64), one rounding.
Saved    x and weight.
Bytes    2(D + N) per row and 2DN for the weight, in bf16.
Bound    tensor cores, or on a CPU its multiply-add units: 2DN FLOP per row.
CPU      the weight is packed in every call, 1% of the product of 2000 rows, so that memory
         holds it once; torch's library repacks it too, on one thread. For up to 8 rows a
         large one is packed a part at a time, in L1, where it is used. Backward is torch's.
Triton   "split", for few rows: see _split.py. It keeps nothing: where gradients are wanted the
         reference runs.
Given up on a GPU nothing where the rows are many: the vendor's library is the best there is. Where
         they are few a trial says whether it is; the split costs 4N bytes a row and part, and a
         second launch.
Legend   rows in front, D in, N out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import require, wants_gradients
from ._compiled import built, supports_cpu
from ._problems_linear import linear_trials
from ._spec import TEXT_ROWS, Backend, Op, joint_rows
from ._split import few_rows_product
from ._triton import operator, supports_triton


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    fits = weight.ndim == 2 and x.ndim >= 2 and x.shape[-1] == weight.shape[1]
    fits = fits and (bias is None or bias.shape == weight.shape[:1])
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    if fits and alike:
        return

    require(
        fits,
        "linear: x, weight and bias",
        "[..., D], [N, D] and [N]",
        [None if t is None else list(t.shape) for t in (x, weight, bias)],
        "Take weight and bias of one layer.",
    )
    require(
        alike,
        "linear: x, weight and bias",
        "of one dtype",
        [None if t is None else t.dtype for t in (x, weight, bias)],
        "Convert one or the other.",
    )


def linear_reference(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """x [..., D], weight [N, D], bias [N] or None -> [..., N] in the dtype of x."""
    check(x, weight_ND, bias_N)
    return F.linear(x, weight_ND, bias_N)


def linear_cpu(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As `linear_reference`."""
    check(x, weight_ND, bias_N)
    return torch.ops.univigu_C.linear(x, weight_ND, bias_N)


def _split(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = few_rows_product(x.flatten(0, -2), weight, bias)
    return y.view(*x.shape[:-1], len(weight))


split_op = operator("univigu::split_linear", _split)


@split_op.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def linear_split(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """As `linear_reference`, split along the sum; that itself for gradients."""
    check(x, weight_ND, bias_N)
    if wants_gradients(x, weight_ND, bias_N):
        return linear_reference(x, weight_ND, bias_N)
    return split_op(x, weight_ND, bias_N)


if built():

    @torch.library.register_fake("univigu_C::linear")
    def _(x, weight, bias):
        return x.new_empty(*x.shape[:-1], len(weight))

    def _save(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None

    def _differentiate(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dx = (rows @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        dweight = rows.mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return dx, dweight, rows.sum(0) if ctx.biased else None

    torch.library.register_autograd("univigu_C::linear", _differentiate, setup_context=_save)


def rehearse(case) -> None:
    """Every launch of ours at the real shapes, on meta tensors: the text rows alone, those of a
    step of v2t over a cached video, into q, k and v and back."""
    B, T, D = case["B"], case["T"], case["D"]
    for columns in (3 * D, D):
        x, weight, bias = (
            torch.empty(*shape, device="meta", dtype=torch.bfloat16)
            for shape in ((B, T, D), (columns, D), (columns,))
        )
        _split(x, weight, bias)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return (randn(2, 29, 32), randn(48, 32) / 32**0.5, randn(48)), {}


OP = Op(
    name="linear",
    backends=(
        Backend("split", linear_split, supports_triton, auto_on=(), kinds=(TEXT_ROWS,)),
        Backend("cpu", linear_cpu, supports_cpu),
        Backend("reference", linear_reference),
    ),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * c["D"] + 2 * c["D"] ** 2,
    flops=lambda c: 2 * joint_rows(c) * c["D"] ** 2,
    rehearse=rehearse,
    trials=linear_trials(linear_reference),
)
