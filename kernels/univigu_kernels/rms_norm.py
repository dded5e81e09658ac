"""rms_norm: RMSNorm over the full width of a row, which the caller then splits into heads.

Formula  y = x * rstd * weight, rstd = 1/sqrt(mean(x^2) + eps) over D. Of cross-attention's queries
         and of the prompt's keys; joint attention's are normed by qknorm_rope.
Gradient with g = dy * weight and n = x * rstd: dx = rstd * (g - n * mean(g * n));
         dweight = sum_rows dy * n
Dtypes   any float in, fp32 statistics and arithmetic (fp64 for fp64), one rounding at the end.
Saved    x and one fp32 number per row.
Bytes    4D per row: bf16 in and out. Backward 6D: x and dy in, dx out.
Bound    memory: 4 FLOP per 4 bytes.
Given up the reference goes through memory five times in bf16: it casts, squares, scales and casts.
Legend   B samples, R rows, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._compiled import built, supports_cpu
from ._spec import Backend, Op, joint_rows


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

    def _save(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.mark_non_differentiable(output[1])

    def _differentiate(ctx, dy, _):
        dx, dweight = torch.ops.univigu_C.rms_norm_backward(*ctx.saved_tensors, dy)
        return dx, dweight, None

    torch.library.register_autograd("univigu_C::rms_norm", _differentiate, setup_context=_save)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return (randn(2, 29, 32), randn(32)), {}


OP = Op(
    name="rms_norm",
    backends=(Backend("cpu", rms_norm_cpu, supports_cpu), Backend("reference", rms_norm_reference)),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * c["D"],
    flops=lambda c: 4 * joint_rows(c) * c["D"],
)
