"""residual_adaln: x' = x + gate * y, then h = LN(x') * weight + shift, in one pass.

Formula  closes one sub-layer (gate, residual add) and opens the next (adaln of the new x).
Gradient with dn the gradient of adaln at x': d = dx' + dn;
         dx = d; dy = gate * d; dgate = sum_rows y * d; dweight, dshift as in adaln
Dtypes   x any float (the residual stream is fp32), y may be bf16; fp32 arithmetic (fp64 for fp64).
         x' is rounded once to x.dtype and h is the norm of that rounded x'; h rounds once more.
Saved    y, gate, x', weight and two fp32 numbers per row.
Bytes    12D per row: fp32 x in and out, bf16 y in, bf16 h out. Apart, the ops move 16D.
Bound    memory: 10 FLOP per 12 bytes.
Given up nothing.
Legend   B samples, L joint rows [video ; text], D width, 2 modalities (0 video, 1 text).
"""

import torch
from torch import Tensor

from . import adaln
from ._checks import check_modulation, compute_dtype, require, segments
from ._spec import Backend, Op, joint_rows


def check(x: Tensor, y: Tensor, gate, weight: Tensor, shift: Tensor, video_rows: int) -> None:
    what = "residual_adaln"
    adaln.check(what, x, weight, shift, video_rows)
    require(
        y.shape == x.shape,
        f"{what}: y",
        f"shaped like x {list(x.shape)}",
        list(y.shape),
        "Pass the branch output for the same rows.",
    )
    if gate is not None:
        check_modulation(what, "gate", gate, x.shape[0], x.shape[2])


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
    weight_B2D: Tensor,
    shift_B2D: Tensor,
    video_rows: int,
    eps: tuple[float, float] = (1e-6, 1e-6),
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
    """x, y [B, L, D], gate, weight, shift [1|B, 1|2, D] -> (x' in x.dtype, h as adaln gives)."""
    check(x_BLD, y_BLD, gate_B2D, weight_B2D, shift_B2D, video_rows)
    dtype = compute_dtype(x_BLD)
    gate = None if gate_B2D is None else gate_B2D.to(dtype)
    x_BLD = add_gated(x_BLD.to(dtype), y_BLD.to(dtype), gate, video_rows).to(x_BLD.dtype)
    h = adaln.adaln_reference(x_BLD, weight_B2D, shift_B2D, video_rows, eps, out_dtype)
    return x_BLD, h


def example(device, dtype, generator):
    (x, weight, shift, video_rows), options = adaln.example(device, dtype, generator)
    y = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(device, dtype)
    gate = torch.randn(weight.shape, generator=generator, dtype=x.dtype).to(device)
    return (x, y, gate, weight, shift, video_rows), options


OP = Op(
    name="residual_adaln",
    backends=(Backend("reference", residual_adaln_reference),),
    example=example,
    bytes=lambda c: 12 * joint_rows(c) * c["D"],
    flops=lambda c: 10 * joint_rows(c) * c["D"],
)
