"""What adaln and residual_adaln share: a norm and its modulation, their check, the norm in plain
PyTorch and in registers, the sums of a modulation's gradient, and example inputs.

Legend   as in adaln.py.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_modulation, check_video_rows, compute_dtype, require, segments
from ._fp8 import FP8, quantize_rows
from ._triton import tl, triton


class Norm(NamedTuple):
    """A LayerNorm to come: LN(x) * weight + shift.

    weight_B2D, shift_B2D: [1|B, 1|2, D], one row per modality. eps: of video and of text rows.
    """

    weight_B2D: Tensor
    shift_B2D: Tensor
    eps: tuple[float, float] = (1e-6, 1e-6)


def check_norm(what: str, x: Tensor, norm: Norm, video_rows: int) -> None:
    require(x.ndim == 3, f"{what}: x", "[B, L, D]", list(x.shape), "Add the batch dimension.")
    check_video_rows(what, video_rows, x.shape[1])
    check_modulation(what, "weight", norm.weight_B2D, x.shape[0], x.shape[2])
    check_modulation(what, "shift", norm.shift_B2D, x.shape[0], x.shape[2])


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


def norm_reference(
    x: Tensor, norm: Norm, video_rows: int, out_dtype: torch.dtype | None
) -> Tensor | tuple[Tensor, Tensor]:
    """Returns h [B, L, D] in `out_dtype`, with row scales [B, L] where that is fp8."""
    out_dtype = out_dtype or x.dtype
    dtype, eps = compute_dtype(x), norm.eps
    x, weight, shift = (t.to(dtype) for t in (x, *norm[:2]))

    if weight.shape[:2] == shift.shape[:2] == (1, 1) and eps[0] == eps[1]:
        h = F.layer_norm(x, x.shape[-1:], weight[0, 0], shift[0, 0], eps[0])
    else:
        h = _modulate(_normalise(x, video_rows, eps), weight, shift, video_rows)
    return quantize_rows(h) if out_dtype == FP8 else h.to(out_dtype)


@triton.jit
def normalise_row(x, cols, eps, D: tl.constexpr):
    """Returns (LN(x), mean, rstd), in two passes over registers; zeros past D."""
    mean = tl.sum(x, 0) / D
    centred = tl.where(cols < D, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    return centred * rstd, mean, rstd


@triton.jit
def store_row(h_row, h, scale, at, cols, D: tl.constexpr, FP8: tl.constexpr):
    """Row `at` of h, rounded once; in fp8 divided by its scale = amax / 448, which is stored."""
    if FP8:
        amax = tl.max(tl.abs(tl.where(cols < D, h_row, 0.0)), 0)
        row_scale = tl.where(amax > 0, amax / 448.0, 1.0)
        tl.store(scale + at, row_scale)
        h_row = tl.clamp(h_row / row_scale, -448.0, 448.0)
    tl.store(h + at * D + cols, h_row.to(h.dtype.element_ty), cols < D)


@triton.jit
def input_gradient(g_row, n_row, rstd, D: tl.constexpr):
    """rstd * (g - mean(g) - n * mean(g * n))."""
    return rstd * (g_row - tl.sum(g_row, 0) / D - n_row * (tl.sum(g_row * n_row, 0) / D))


def strides(mod: Tensor | None) -> tuple[int, int]:
    """Sample and modality strides of a modulation [1|B, 1|2, D]; 0 where it is shared, or none."""
    if mod is None:
        return 0, 0
    return tuple(mod.stride(i) if mod.shape[i] > 1 else 0 for i in (0, 1))


def reduce_tiles(partial: Tensor, video_tiles: int, like: Tensor) -> Tensor:
    """Sums of tiles [B, tiles, D] -> the gradient of a modulation shaped like `like`. In a fixed
    order, so repeats are bit-equal."""
    grad = torch.stack([partial[:, :video_tiles].sum(1), partial[:, video_tiles:].sum(1)], 1)
    grad = grad.sum(1, keepdim=True) if like.shape[1] == 1 else grad
    grad = grad.sum(0, keepdim=True) if like.shape[0] == 1 else grad
    return grad.to(like.dtype)


def example_norm(device, dtype, generator):
    def randn(*shape):
        residual = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=generator, dtype=residual).to(device)

    weight, shift = 1 + 0.3 * randn(2, 2, 32), randn(2, 2, 32)
    norm = Norm(weight, shift, (1e-6, 1e-5))
    return (randn(2, 29, 32), norm, 24), {"out_dtype": dtype}
