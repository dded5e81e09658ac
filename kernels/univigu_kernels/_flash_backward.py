"""Flash attention backward, without atomics: D = rowsum(do * o), then one kernel that walks the
queries of a tile of keys for dk and dv, and one that walks the keys of a tile of queries for dq.

With P the softmax, recomputed from the log-sum-exp: dv = P^T do; dS = P * (do v^T - D);
dk = dS^T q / sqrt(D); dq = dS k / sqrt(D).
P^T do and dS k are one block late, as the product in _flash.py is. There are 7 products where 5
would do: without atomics neither kernel can hand P and dS to the other.

Legend  as in _flash.py; in the kernel of dk and dv a tile is BLOCK_N keys of one head and modality
        and a block is BLOCK_M queries.
"""

import math
from functools import partial

import torch
from torch import Tensor

from ._card import Card, Tile, card_of, offered
from ._flash import (
    LOG2E,
    Geometry,
    add_product,
    as_bits,
    flash_options,
    held_bytes,
    key_limit,
    live_queries,
    load_tile,
    padded_width,
    query_tile,
    store_tile,
    tile_rows,
)
from ._rows import packed, tiles_of
from ._triton import configuration, launch, tl, triton


@triton.jit
def load_row(base, start, end, other, ROWS: tl.constexpr, MASKED: tl.constexpr):
    rows = tl.arange(0, ROWS)
    if MASKED:
        row = tl.load(base + start + rows, rows < end - start, other=other)
    else:
        row = tl.load(base + start + rows)
    return row


@triton.jit
def _flash_delta_rows(
    o,
    do,
    delta,
    queries,
    heads,
    do_b,
    do_l,
    do_h,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """D of every row; that of a padded row may be NaN, and nothing reads it."""
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    first = tl.program_id(0) * ROWS
    o += b * queries * heads * D + h * D
    o_tile = load_tile(o, first, queries, heads * D, D, ROWS, BLOCK_D, True)
    do_tile = load_tile(do + b * do_b + h * do_h, first, queries, do_l, D, ROWS, BLOCK_D, True)
    rows = first + tl.arange(0, ROWS)
    sums = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    tl.store(delta + head * queries + rows, sums, rows < queries)


@triton.jit
def softmax_gradient(s, dp, row_lse, row_delta, scale, dtype: tl.constexpr):
    """Returns P and dS as bits, from q k^T, do v^T and their rows' log-sum-exp and D."""
    p = tl.exp2(s * (scale * LOG2E) - row_lse * LOG2E)
    return as_bits(p.to(dtype)), as_bits((p * (dp - row_delta)).to(dtype))


@triton.jit
def _flash_dkdv(
    q,
    k,
    v,
    do,
    lengths,
    lse,
    delta,
    dk,
    dv,
    queries,
    keys,
    video_queries,
    video_rows,
    video_keys,
    heads,
    span,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    do_b,
    do_l,
    do_h,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    first, end = tile_rows(tl.program_id(0), video_rows, keys, BLOCK_N)
    limit = key_limit(lengths, b, video_rows, keys)
    live = tl.minimum(end, limit)

    # The queries that see these keys, cut into this split's share.
    split = tl.program_id(2)
    begin = tl.maximum(tl.where(first < video_keys, 0, video_queries), split * span)
    seeing = tl.where(first < live, live_queries(limit, queries, keys, video_queries), 0)
    stop = tl.minimum(seeing, split * span + span)
    full = begin + tl.maximum(stop - begin, 0) // BLOCK_M * BLOCK_M

    q += b * q_b + h * q_h
    do += b * do_b + h * do_h
    lse += head * queries
    delta += head * queries
    k_tile = load_tile(k + b * k_b + h * k_h, first, live, k_l, D, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v + b * v_b + h * v_h, first, live, v_l, D, BLOCK_N, BLOCK_D, True)

    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dtype: tl.constexpr = q.dtype.element_ty
    p = as_bits(tl.zeros([BLOCK_N, BLOCK_M], dtype))

    # A block's p meets do in the next round, beside the next block's products.
    for start in range(begin, full, BLOCK_M):
        q_tile = load_tile(q, start, stop, q_l, D, BLOCK_M, BLOCK_D, False)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        do_tile = load_tile(do, start, stop, do_l, D, BLOCK_M, BLOCK_D, False)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        late = tl.maximum(start - BLOCK_M, begin)
        late_tile = load_tile(do, late, stop, do_l, D, BLOCK_M, BLOCK_D, False)
        dv_tile = add_product(dv_tile, p, late_tile)
        row_lse = load_row(lse, start, stop, float("inf"), BLOCK_M, False)
        row_delta = load_row(delta, start, stop, 0.0, BLOCK_M, False)
        p, ds = softmax_gradient(s, dp, row_lse[None, :], row_delta[None, :], scale, dtype)
        dk_tile = add_product(dk_tile, ds, q_tile)
    if begin < full:
        late_tile = load_tile(do, full - BLOCK_M, stop, do_l, D, BLOCK_M, BLOCK_D, False)
        dv_tile = add_product(dv_tile, p, late_tile)

    # The queries that do not fill a block.
    if full < stop:
        q_tile = load_tile(q, full, stop, q_l, D, BLOCK_M, BLOCK_D, True)
        s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        do_tile = load_tile(do, full, stop, do_l, D, BLOCK_M, BLOCK_D, True)
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
        row_lse = load_row(lse, full, stop, float("inf"), BLOCK_M, True)
        row_delta = load_row(delta, full, stop, 0.0, BLOCK_M, True)
        p, ds = softmax_gradient(s, dp, row_lse[None, :], row_delta[None, :], scale, dtype)
        dv_tile = add_product(dv_tile, p, do_tile)
        dk_tile = add_product(dk_tile, ds, q_tile)

    out = (split * (tl.num_programs(1) // heads) + b) * keys * heads * D + h * D
    store_tile(dk + out, dk_tile * scale, first, live, end, heads * D, D, BLOCK_N, BLOCK_D)
    store_tile(dv + out, dv_tile, first, live, end, heads * D, D, BLOCK_N, BLOCK_D)


@triton.jit
def _flash_dq(
    q,
    k,
    v,
    do,
    lengths,
    lse,
    delta,
    dq,
    queries,
    keys,
    video_queries,
    video_rows,
    video_keys,
    heads,
    q_b,
    q_l,
    q_h,
    k_b,
    k_l,
    k_h,
    v_b,
    v_l,
    v_h,
    do_b,
    do_l,
    do_h,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    first, end, live, stop = query_tile(
        tl.program_id(0), lengths, b, queries, keys, video_queries, video_rows, video_keys, BLOCK_M
    )

    full = stop // BLOCK_N * BLOCK_N
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h

    q_tile = load_tile(q + b * q_b + h * q_h, first, live, q_l, D, BLOCK_M, BLOCK_D, True)
    do_tile = load_tile(do + b * do_b + h * do_h, first, live, do_l, D, BLOCK_M, BLOCK_D, True)
    row_lse = load_row(lse + head * queries, first, live, float("inf"), BLOCK_M, True)[:, None]
    row_delta = load_row(delta + head * queries, first, live, 0.0, BLOCK_M, True)[:, None]
    row_lse *= LOG2E

    dtype: tl.constexpr = k.dtype.element_ty
    ds = as_bits(tl.zeros([BLOCK_M, BLOCK_N], dtype))
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # A block's ds meets k in the next round, beside the next block's products.
    for start in range(0, full, BLOCK_N):
        v_tile = load_tile(v, start, stop, v_l, D, BLOCK_N, BLOCK_D, False)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        k_tile = load_tile(k, start, stop, k_l, D, BLOCK_N, BLOCK_D, False)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        late = tl.maximum(start - BLOCK_N, 0)
        late_tile = load_tile(k, late, stop, k_l, D, BLOCK_N, BLOCK_D, False)
        dq_tile = add_product(dq_tile, ds, late_tile)
        p = tl.exp2(s * (scale * LOG2E) - row_lse)
        ds = as_bits((p * (dp - row_delta)).to(dtype))
    if full > 0:
        late_tile = load_tile(k, full - BLOCK_N, stop, k_l, D, BLOCK_N, BLOCK_D, False)
        dq_tile = add_product(dq_tile, ds, late_tile)

    # The keys that do not fill a block.
    if full < stop:
        v_tile = load_tile(v, full, stop, v_l, D, BLOCK_N, BLOCK_D, True)
        dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
        k_tile = load_tile(k, full, stop, k_l, D, BLOCK_N, BLOCK_D, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        p = tl.exp2(s * (scale * LOG2E) - row_lse)
        p = tl.where((tl.arange(0, BLOCK_N) < stop - full)[None, :], p, 0.0)
        dq_tile = add_product(dq_tile, as_bits((p * (dp - row_delta)).to(dtype)), k_tile)

    out = b * queries * heads * D + h * D
    store_tile(dq + out, dq_tile * scale, first, live, end, heads * D, D, BLOCK_M, BLOCK_D)


def backward_bytes(walked: str, card: Card, element: int, width: int, tile: Tile) -> int:
    """Shared memory that a backward kernel takes, at most: two tiles of the side that it holds (k
    and v, or q and do) and of a block three (two and the late one), with a log-sum-exp and a D for
    each query. For dk and dv "tcgen05" takes dS from there; in fp32 P and dS go through it."""
    m, n, stages = tile["BLOCK_M"], tile["BLOCK_N"], card.buffers(tile["num_stages"])
    held, rows = (n, 8 * m * stages) if walked == "BLOCK_M" else (m, 0)
    if element == 4:
        scores = 8 * m * n
    else:
        scores = element * m * n if rows and card.instruction == "tcgen05" else 0
    return held_bytes(2 * held, tile[walked], 3, width * element, card, tile) + rows + scores


def tile_configuration(kernel: str, q: Tensor, walked: str) -> dict[str, int]:
    """By registers and shared memory at head_dim 128: 128 rows of accumulator for two warpgroups,
    and blocks of the `walked` side as large as their registers allow."""
    card = card_of(q.device)
    if q.dtype == torch.float32:
        sizes = [(32, 32, 8, 1), (16, 16, 4, 1)]
    else:
        sizes = [] if card.instruction == "mma" else [(128, 64, 8, 3)]
        sizes += [(128, 32, 8, 2)]

    held = "BLOCK_M" if walked == "BLOCK_N" else "BLOCK_N"
    swapped = sizes if walked == "BLOCK_N" else [(n, m, *rest) for m, n, *rest in sizes]
    tiles = [flash_options(*size) for size in swapped]
    needs = partial(backward_bytes, walked, card, q.element_size(), padded_width(q))
    return configuration(kernel, offered(kernel, card, tiles, needs, held)[0])


def split_count(tiles: int, blocks: int, multiprocessors: int) -> int:
    """The number of equal pieces, each of at least 8 blocks of queries, that ends soonest where
    tiles are too few for the multiprocessors. In blocks, the rest of a program counts 4 and adding
    up a piece 2."""
    costs = {
        s: -(-tiles * s // multiprocessors) * (-(-blocks // s) + 4) + 2 * s
        for s in range(1, 1 if tiles >= multiprocessors else blocks // 8 + 1)
    }
    return min(costs, key=costs.get, default=1)


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq [B, Q, H, D], dk and dv [B, L, H, D]; zero in the padded rows."""
    (B, Q, H, D), L = q.shape, k.shape[1]
    q, k, v, do = (packed(x) for x in (q, k, v, do))
    o, lse = o.contiguous(), lse.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))

    delta, width = torch.empty_like(lse), {"D": D, "BLOCK_D": padded_width(q)}
    video_queries, video_rows, _, lengths = geometry
    rows = configuration("flash_delta_rows", {"ROWS": 32, "num_warps": 4})
    launch(
        _flash_delta_rows,
        (-(-Q // rows["ROWS"]), B * H),
        o,
        do,
        delta,
        Q,
        H,
        *do.stride()[:3],
        **width,
        **rows,
    )

    strides = [stride for x in (q, k, v, do) for stride in x.stride()[:3]]
    shared, scale = (Q, L, *geometry[:3], H), 1 / math.sqrt(D)

    options = tile_configuration("flash_dkdv", q, "BLOCK_M")
    tiles, blocks = sum(tiles_of(video_rows, L, options["BLOCK_N"])), -(-Q // options["BLOCK_M"])
    splits = split_count(tiles * B * H, blocks, card_of(q.device).multiprocessors)
    splits = configuration("flash_dkdv_split", {"splits": splits})["splits"]
    parts = (dk, dv)
    if splits > 1:
        parts = [q.new_empty(splits, *k.shape, dtype=torch.float32) for _ in range(2)]

    launch(
        _flash_dkdv, (tiles, B * H, splits), q, k, v, do, lengths, lse, delta, *parts, *shared,
        -(-blocks // splits) * options["BLOCK_M"], *strides, scale, **width, **options,
    )  # fmt: skip
    if splits > 1:
        dk, dv = (part.sum(0).to(q.dtype) for part in parts)

    options = tile_configuration("flash_dq", q, "BLOCK_N")
    launch(
        _flash_dq, (sum(tiles_of(video_queries, Q, options["BLOCK_M"])), B * H),
        q, k, v, do, lengths, lse, delta, dq, *shared, *strides, scale, **width, **options,
    )  # fmt: skip
    return dq, dk, dv
