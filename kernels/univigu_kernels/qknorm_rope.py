"""qknorm_rope: RMSNorm of q and of k over the full width, then the rotary embedding per head.

Formula  n = x * rsqrt(mean(x^2) + eps) * weight over D = H*K, before the split into heads; then
         rope3d(n). RMSNorm over all heads at once is Wan's, not the per-head norm of others.
Gradient with r = rsqrt(...), g = weight * unrotate(dout): dx = r*g - r^3 * x * mean(g * x);
         dweight = sum_rows unrotate(dout) * x * r
Dtypes   any float in, fp32 statistics and rotation (fp64 for fp64), one rounding at the end.
Saved    q, k and one fp32 number per row and tensor.
Bytes    8D per row: bf16 q and k, in and out.
Bound    memory: 14 FLOP per 8 bytes.
Given up nothing.
Legend   B samples, L joint rows [video ; text], D width, H heads, K head_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rope3d
from ._checks import compute_dtype, require
from ._spec import Backend, Op, joint_rows
from .rope3d import Rotary


def check(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, heads: int, rotary) -> None:
    what = "qknorm_rope"
    require(
        q.ndim == 3 and q.shape == k.shape,
        f"{what}: q and k",
        "two tensors of one shape [B, L, D]",
        (list(q.shape), list(k.shape)),
        "Pass the projections of the same rows.",
    )
    width = q.shape[2]
    require(
        weight_q.shape == weight_k.shape == (width,),
        f"{what}: weight_q and weight_k",
        f"[{width}]",
        (list(weight_q.shape), list(weight_k.shape)),
        "The norm spans all heads.",
    )
    require(
        heads > 0 and width % heads == 0,
        f"{what}: heads",
        f"a divisor of the width {width}",
        heads,
        "Take heads from the model's configuration.",
    )
    rope3d.check(what, q.shape[1], width // heads, rotary)


def _norm_rope(x: Tensor, weight: Tensor, heads: int, rotary: Rotary, eps: float) -> Tensor:
    dtype = compute_dtype(x)
    x_BLD = F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)
    x_BLHK = x_BLD.unflatten(-1, (heads, x.shape[-1] // heads))
    return rope3d.rotate(x_BLHK, rotary).to(x.dtype)


def qknorm_rope_reference(
    q_BLD: Tensor,
    k_BLD: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q, k [B, L, D] (strided views are fine), weights [D] -> q, k [B, L, H, K] in their dtype."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary)
    q_BLHK = _norm_rope(q_BLD, weight_q, heads, rotary, eps)
    return q_BLHK, _norm_rope(k_BLD, weight_k, heads, rotary, eps)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, _ = randn(2, 29, 96).chunk(3, -1)
    weights = 1 + 0.3 * randn(2, 32)
    return (q, k, *weights, 2, rope3d.example_rotary(device, dtype)), {}


OP = Op(
    name="qknorm_rope",
    backends=(Backend("reference", qknorm_rope_reference),),
    example=example,
    bytes=lambda c: 8 * joint_rows(c) * c["D"],
    flops=lambda c: 14 * joint_rows(c) * c["D"],
)
