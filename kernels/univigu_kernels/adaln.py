"""adaln: h = LN(x) * weight + shift, with one weight and shift per sample and modality.

Formula  LN(x) = (x - mean) * rstd, rstd = 1/sqrt(var + eps) over D. `weight` is 1 + scale, folded
         by the caller, so an affine LayerNorm is the same op.
Gradient with g = dh * weight and n = LN(x):
         dx = rstd * (g - mean(g) - n * mean(g * n));
         dweight = sum_rows dh * n; dshift = sum_rows dh
Dtypes   any float in, fp32 statistics and arithmetic (fp64 for fp64), one rounding to `out_dtype`.
Saved    x, weight and two fp32 numbers per row.
Bytes    6D per row: fp32 x in, bf16 h out. 5D + 4 with fp8 out.
Bound    memory: 8 FLOP per 6 bytes.
Given up nothing; fp8 out is opt-in.
Legend   B samples, L joint rows [video ; text], D width, 2 modalities (0 video, 1 text).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_modulation, check_video_rows, compute_dtype, require, segments
from ._spec import Backend, Op, joint_rows
from .fp8_linear import FP8, quantize_rows


def check(what: str, x: Tensor, weight: Tensor, shift: Tensor, video_rows: int) -> None:
    require(x.ndim == 3, f"{what}: x", "[B, L, D]", list(x.shape), "Add the batch dimension.")
    check_video_rows(what, video_rows, x.shape[1])
    check_modulation(what, "weight", weight, x.shape[0], x.shape[2])
    check_modulation(what, "shift", shift, x.shape[0], x.shape[2])


def _normalise(x: Tensor, video_rows: int, eps: tuple[float, float]) -> Tensor:
    width = x.shape[-1:]
    if eps[0] == eps[1]:
        return F.layer_norm(x, width, eps=eps[0])
    both = zip(segments(x, video_rows), eps, strict=True)
    return torch.cat([F.layer_norm(rows, width, eps=e) for rows, e in both], 1)


def _modulate(n: Tensor, weight: Tensor, shift: Tensor, video_rows: int) -> Tensor:
    n_video, n_text = segments(n, video_rows)
    video = torch.addcmul(shift[:, :1], n_video, weight[:, :1])
    text = torch.addcmul(shift[:, -1:], n_text, weight[:, -1:])
    return torch.cat([video, text], 1)


def adaln_reference(
    x_BLD: Tensor,
    weight_B2D: Tensor,
    shift_B2D: Tensor,
    video_rows: int,
    eps: tuple[float, float] = (1e-6, 1e-6),
    out_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [B, L, D], weight and shift [1|B, 1|2, D], eps (video, text) -> h [B, L, D] in `out_dtype`
    (default x.dtype). float8_e4m3fn gives (h_fp8, row_scale [B, L] fp32) of quantize_rows."""
    check("adaln", x_BLD, weight_B2D, shift_B2D, video_rows)
    out_dtype = out_dtype or x_BLD.dtype
    dtype = compute_dtype(x_BLD)
    x, weight, shift = (t.to(dtype) for t in (x_BLD, weight_B2D, shift_B2D))
    if weight.shape[:2] == shift.shape[:2] == (1, 1) and eps[0] == eps[1]:
        h = F.layer_norm(x, x.shape[-1:], weight[0, 0], shift[0, 0], eps[0])
    else:
        h = _modulate(_normalise(x, video_rows, eps), weight, shift, video_rows)
    return quantize_rows(h) if out_dtype == FP8 else h.to(out_dtype)


def example(device, dtype, generator):
    def randn(*shape):
        residual = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=generator, dtype=residual).to(device)

    weight, shift = 1 + 0.3 * randn(2, 2, 32), randn(2, 2, 32)
    return (randn(2, 29, 32), weight, shift, 24), {"eps": (1e-6, 1e-5), "out_dtype": dtype}


OP = Op(
    name="adaln",
    backends=(Backend("reference", adaln_reference),),
    example=example,
    bytes=lambda c: 6 * joint_rows(c) * c["D"],
    flops=lambda c: 8 * joint_rows(c) * c["D"],
)
