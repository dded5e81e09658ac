"""Boxes of rows that TMA brings and writes, each cut at a row of its own.

Legend   B samples, L rows, H heads, D head_dim.
"""

import torch
from torch import Tensor

from ._triton import descriptor, gl, gluon, tl

DTYPES = (torch.float16, torch.bfloat16)
FAR = tl.constexpr(1 << 30)  # more rows than any tensor has


def cut_rows(x: Tensor, rows: int):
    """x [B, L, H, D] -> a descriptor of boxes of `rows` rows of one head, which the hardware cuts
    at any row, a different one for each box: rows from there on are read as zeros and not written.

    A descriptor has one fixed bound for each of its dimensions. Rows stand in three of them here:
    at (FAR, end, FAR - end + row) lies row `row`, for FAR of the first dimension's steps, 2^34 less
    one row, and FAR more rows add up to 2^64 elements, which wraps to nothing; and the third
    dimension's bound, FAR, is row `end`. (The idea is Triton's, tools/ragged_tma.py.)
    """
    B, _, H, D = x.shape
    shape = (0x7FFF0000, 0x7FFF0000, B, FAR.value, H * D)
    strides = (2**34 - x.stride(1), x.stride(1), x.stride(0), x.stride(1), 1)
    return descriptor(x, shape, strides, (1, 1, 1, rows, D))


def tma_takes(x: Tensor) -> bool:
    """Whether TMA can take boxes of x [B, L, H, D]: 16-bit numbers, heads side by side, rows that
    begin at multiples of 16 bytes, at least one element."""
    B, L, H, D = x.shape
    strides = [x.stride(0), x.stride(1)]
    beside = x.stride(3) == 1 and (x.stride(2) == D or H == 1)
    aligned = x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in strides)
    return x.dtype in DTYPES and x.numel() > 0 and beside and aligned


@gluon.jit
def box_at(b, row, end, head, D: gl.constexpr):
    """Coordinates of rows from `row` on, cut at `end`: see `cut_rows`."""
    return [FAR, end, b, FAR - end + row, head * D]
