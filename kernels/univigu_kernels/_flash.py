"""Flash attention for joint and cross attention: the forward kernel, with keys in one piece or in
splits, and the reduction of splits. The backward is in _flash_backward.py.

Legend  B samples, Q queries, L keys, H heads, D head_dim, S splits; a tile is BLOCK_M queries of
        one head and one modality, a block is BLOCK_N keys.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import require
from ._triton import architecture, configuration, launch, tl, triton
from .adaln import packed, row_tile, tiles_of

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
PROGRAMS = 132  # multiprocessors of an H100: fewer tiles than these are split along their keys


class Geometry(NamedTuple):
    """Who sees whom. Keys are [video ; text], and a sample's own end after `lengths` text keys; as
    many queries at its end are padding. Queries are [video ; text] too."""

    video_queries: int  # leading queries that are video
    video_rows: int  # leading keys that are video
    video_keys: int  # leading keys that a video query may see
    lengths: Tensor | None = None  # [B] text keys; None: all


@triton.jit
def key_limit(lengths, b, video_rows, keys):
    """Keys of sample b before its padding, whatever the device holds as its length."""
    if lengths is None:
        return keys
    else:
        return video_rows + tl.minimum(tl.maximum(tl.load(lengths + b), 0), keys - video_rows)


@triton.jit
def load_tile(
    base, start, end, stride,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + ROWS of one head, [ROWS, BLOCK_D]; zeros past D, and if MASKED from
    row `end` on."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = base + start * stride + (rows * stride + cols)
    if MASKED:
        tile = tl.load(at, (rows < end - start) & (cols < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, (rows >= 0) & (cols < D), other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(base, tile, start, end, stride, D: tl.constexpr, ROWS: tl.constexpr):
    """Rows start .. end of one head, rounded once."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, tile.shape[1])[None, :]
    at = base + start * stride + (rows * stride + cols)
    tl.store(at, tile.to(base.dtype.element_ty), (rows < end - start) & (cols < D))


@triton.jit
def attend_block(
    acc, top, total, q_tile, k, v, start, end, k_l, v_l, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys into the running sum `acc`, base-2 maximum `top` and denominator."""
    k_tile = load_tile(k, start, end, k_l, D, BLOCK_N, BLOCK_D, MASKED)
    s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    if MASKED:
        s = tl.where((tl.arange(0, BLOCK_N) < end - start)[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    v_tile = load_tile(v, start, end, v_l, D, BLOCK_N, BLOCK_D, MASKED)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision="ieee")
    return acc, new_top, total


@triton.jit
def _flash_forward(
    q, k, v, lengths, o, lse, queries, keys, video_queries, video_rows, video_keys, heads, span,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    split, head = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = head // heads, head % heads
    _, first, end = row_tile(tl.program_id(0), video_queries, queries, BLOCK_M)
    limit = key_limit(lengths, b, video_rows, keys)
    live = tl.minimum(end, queries - (keys - limit))
    seen = tl.where(first < video_queries, tl.minimum(limit, video_keys), limit)
    begin = split * span
    stop = tl.minimum(tl.where(first < live, seen, 0), begin + span)
    full = begin + tl.maximum(stop - begin, 0) // BLOCK_N * BLOCK_N
    q_tile = load_tile(q + b * q_b + h * q_h, first, live, q_l, D, BLOCK_M, BLOCK_D, True)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2E
    for start in range(begin, full, BLOCK_N):
        acc, top, total = attend_block(
            acc, top, total, q_tile, k, v, start, stop, k_l, v_l, scale, D, BLOCK_D, BLOCK_N, False
        )
    if full < stop:
        acc, top, total = attend_block(
            acc, top, total, q_tile, k, v, full, stop, k_l, v_l, scale, D, BLOCK_D, BLOCK_N, True
        )
    rows = first + tl.arange(0, BLOCK_M)
    real = (rows < live) & (total > 0)
    total = tl.where(real, total, 1.0)
    plane = split * tl.num_programs(2) + head
    row_lse = tl.where(real, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse + plane * queries + rows, row_lse, rows < end)
    o += (split * (tl.num_programs(2) // heads) + b) * queries * heads * D + h * D
    o_tile = tl.where(real[:, None], acc / total[:, None], 0.0)
    store_tile(o, o_tile, first, end, heads * D, D, BLOCK_M)


@triton.jit
def _flash_reduce(
    parts, part_lse, o, lse, queries, heads, splits,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """o = sum_s exp(lse_s - lse) * o_s; offsets fit 31 bits, for only a few rows are split."""
    head, first = tl.program_id(1), tl.program_id(0) * ROWS
    heads_of_all = tl.num_programs(1)
    rows, cols = first + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)[None, :]
    inside = rows < queries
    at = head * queries + rows
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        here = part_lse + split * heads_of_all * queries + at
        top = tl.maximum(top, tl.load(here, inside, other=float("-inf")))
    seen = top > float("-inf")
    top = tl.where(seen, top, 0.0)
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK_D], tl.float32)
    tile = ((head // heads * queries + rows) * heads + head % heads)[:, None] * D + cols
    kept = inside[:, None] & (cols < D)
    for split in range(splits):
        here = part_lse + split * heads_of_all * queries + at
        weight = tl.exp(tl.load(here, inside, other=float("-inf")) - top)
        part = tl.load(parts + split * heads_of_all * queries * D + tile, kept, other=0.0)
        acc += weight[:, None] * part
        total += weight
    total = tl.where(seen, total, 1.0)
    tl.store(lse + at, tl.where(seen, top + tl.log(total), float("-inf")), inside)
    tl.store(o + tile, (acc / total[:, None]).to(o.dtype.element_ty), kept)


def padded_width(width: int) -> int:
    """head_dim as the kernels hold it: a power of two, at least the 16 of a matrix instruction."""
    return max(16, 1 << (width - 1).bit_length())
