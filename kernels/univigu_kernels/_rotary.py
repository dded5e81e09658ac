"""What rope3d and qknorm_rope share: the tables of angles, their check and the rotation in plain
PyTorch.

Legend   as in rope3d.py.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require, segments

THETA = 10000.0


class Rotary(NamedTuple):
    """Cosines and sines of every position: `t`, `h`, `w` [axis length, P, 2], `text` [T, K/2, 2].

    Video row (i, j, k) of `grid` = (F, Hh, Ww) is row (i*Hh + j)*Ww + k: t slowest, w fastest.
    """

    grid: tuple[int, int, int]
    t: Tensor
    h: Tensor
    w: Tensor
    text: Tensor


def _axis_table(length: int, channels: int, device, dtype) -> Tensor:
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
    position = torch.arange(length, dtype=torch.float64, device=device)
    angle = position[:, None] * THETA**-exponent
    return torch.stack([angle.cos(), angle.sin()], -1).to(dtype)


def rotary_tables(
    grid: tuple[int, int, int], text_rows: int, head_dim: int, device, dtype=torch.float32
) -> Rotary:
    """Tables for a latent grid (F, Hh, Ww) of patches and `text_rows` tokens.

    h and w take 2*(K//6) channels each and t the rest: 44, 42, 42 at head_dim 128.
    """
    require(
        head_dim % 2 == 0, "rotary_tables: head_dim", "even", head_dim, "Rotation works on pairs."
    )
    side = 2 * (head_dim // 6)
    channels = (head_dim - 2 * side, side, side)
    axes = [_axis_table(n, d, device, dtype) for n, d in zip(grid, channels, strict=True)]
    return Rotary(tuple(grid), *axes, _axis_table(text_rows, head_dim, device, dtype))


def check_rotary(what: str, rows: int, head_dim: int, rotary: Rotary) -> None:
    video_rows, text_rows = math.prod(rotary.grid), rotary.text.shape[0]
    require(
        rows == video_rows + text_rows,
        f"{what}: x",
        f"{video_rows} video rows and {text_rows} text rows long",
        rows,
        "Build the rotary tables for this grid and text length.",
    )
    require(
        head_dim == 2 * rotary.text.shape[1],
        f"{what}: head_dim",
        str(2 * rotary.text.shape[1]),
        head_dim,
        "Build the rotary tables for this head_dim.",
    )


def _as_complex(x: Tensor) -> Tensor:
    # torch reads a complex view only from even offsets and strides.
    odd = x.storage_offset() % 2 or any(s % 2 for s in x.stride()[:-1]) or x.stride(-1) != 1
    x = x.clone(memory_format=torch.contiguous_format) if odd else x
    return torch.view_as_complex(x.unflatten(-1, (x.shape[-1] // 2, 2)))


def _video_table(rotary: Rotary, dtype: torch.dtype) -> Tensor:
    """cos + i sin of every video row, complex [V, 1, K/2]: one number per pair, heads broadcast."""
    t, h, w = rotary.t[:, None, None], rotary.h[:, None], rotary.w
    axes = [axis.to(dtype).expand(*rotary.grid, -1, -1) for axis in (t, h, w)]
    return torch.view_as_complex(torch.cat(axes, -2)).flatten(0, 2)[:, None]


def rotate(x_BLHK: Tensor, rotary: Rotary) -> Tensor:
    """The rotation without rounding, for x in its compute dtype (float32 or float64)."""
    x_video, x_text = segments(x_BLHK, math.prod(rotary.grid))
    video = _as_complex(x_video) * _video_table(rotary, x_BLHK.dtype)
    cos, sin = rotary.text.to(x_BLHK.dtype)[:, None].unbind(-1)
    x0, x1 = x_text.chunk(2, -1)
    text = torch.cat([x0 * cos - x1 * sin, x0 * sin + x1 * cos], -1)
    return torch.cat([torch.view_as_real(video).flatten(-2), text], 1)


def example_rotary(device, dtype) -> Rotary:
    """24 video rows and 5 text rows, head_dim 16."""
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return rotary_tables((2, 3, 4), 5, 16, device, table_dtype)
