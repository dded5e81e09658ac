"""Flash attention for joint and cross attention: the forward kernel, over all keys or over one
split of them, and the reduction of splits. The backward is in _flash_backward.py.

The product of probabilities and values is one block late: while it runs on the tensor cores, the
exponentials of the next block do not wait (the schedule of FlashAttention-3 inside a warpgroup).

Legend  B samples, Q queries, L keys, H heads, D head_dim, S splits; a tile is BLOCK_M queries of
        one head and one modality, a block is BLOCK_N keys.
"""

import math
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ._card import SPARE, Card, Tile, card_of, offered
from ._checks import require
from ._rows import packed, row_tile, tiles_of
from ._triton import configuration, launch, tl, triton

LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
WIDEST = 128
# In blocks of keys: the least that a program takes, what the rest of a program counts, and the
# addition of a piece. Tiles are cut along their keys where they fill fewer than WAVES waves.
LEAST, START, ADD, WAVES = 8, 4, 2, 4


class Geometry(NamedTuple):
    """Who sees whom. Keys are [video ; text], those of a sample end after `lengths` text keys, and
    as many queries at its end are padding, of the text ones. Queries are [video ; text] too; their
    text is the last of the sequence."""

    video_queries: int  # leading queries that are video
    video_rows: int  # leading keys that are video
    video_keys: int  # leading keys that a video query may see: video_rows, or all
    lengths: Tensor | None = None  # [B] text keys; None: all


@triton.jit
def key_limit(lengths, b, video_rows, keys):
    """Keys of sample b before its padding; a length out of range is clamped, reads stay inside."""
    if lengths is None:
        limit = keys
    else:
        length = tl.minimum(tl.maximum(tl.load(lengths + b), 0), keys - video_rows)
        limit = (video_rows + length).to(tl.int32)
    return limit


@triton.jit
def live_queries(limit, queries, keys, video_queries):
    """Queries of a sample before its padding; a video query is never padding."""
    return tl.maximum(video_queries, queries - (keys - limit))


@triton.jit
def tile_rows(tile, video_rows, rows, ROWS: tl.constexpr):
    """Returns (first row, end), in 32 bits: the kernel of dk and dv has no registers for 64."""
    _, first, end = row_tile(tile, video_rows, rows, ROWS)
    return first.to(tl.int32), end.to(tl.int32)


@triton.jit
def query_tile(
    tile, lengths, b, queries, keys, video_queries, video_rows, video_keys, BLOCK_M: tl.constexpr
):
    """Returns (first row, end, end of the real rows, number of keys that they see)."""
    first, end = tile_rows(tile, video_queries, queries, BLOCK_M)
    limit = key_limit(lengths, b, video_rows, keys)
    live = tl.minimum(end, live_queries(limit, queries, keys, video_queries))
    seen = tl.minimum(limit, tl.where(first < video_queries, video_keys, keys))
    return first, end, live, tl.where(first < live, seen, 0)


@triton.jit
def load_tile(
    base,
    start,
    end,
    stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Rows start .. start + ROWS of one head, [ROWS, BLOCK_D]; zeros past D, and if MASKED from
    row `end` on."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    at = base + start * tl.cast(stride, tl.int64) + (rows * stride + cols)
    if MASKED:
        tile = tl.load(at, (rows < end - start) & (cols < D), other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(at, (rows >= 0) & (cols < D), other=0.0)
    else:
        tile = tl.load(at)
    return tile


@triton.jit
def store_tile(
    base, tile, start, live, end, stride, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows start .. end of one head, rounded once; zeros from row `live` on."""
    rows, cols = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    tile = tl.where(rows < live - start, tile, 0.0).to(base.dtype.element_ty)
    at = base + start * tl.cast(stride, tl.int64) + (rows * stride + cols)
    tl.store(at, tile, (rows < end - start) & (cols < D))


@triton.jit
def as_bits(x):
    """x as integers. Triton moves a floating operand that a loop carries to a product through
    shared memory; one that it carries as bits stays in registers."""
    if x.dtype.primitive_bitwidth == 32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True)
    return bits


@triton.jit
def softmax_block(s, top, total, scale, dtype: tl.constexpr):
    """q k^T of one block, scale = log2(e) / sqrt(D) -> (probabilities against the new maximum, as
    bits, the factor that carries older ones over to it, the maximum, the sum)."""
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return as_bits(p.to(dtype)), shrink, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def add_product(acc, bits, tile):
    """acc + a @ tile of the operand `bits`."""
    return tl.dot(bits.to(tile.dtype, bitcast=True), tile, acc, input_precision="ieee")


@triton.jit
def _flash_forward(
    q,
    k,
    v,
    lengths,
    o,
    lse,
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
    scale,
    more,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEATS: tl.constexpr,
):
    """REPEATS: the last key's score grows by `more`, log(repeats) / scale; it is in no full
    block then. The splits are the slowest axis of the grid, so the last one of all tiles, which
    has the fewest keys, begins last and fills the gaps."""
    head, split = tl.program_id(1).to(tl.int64), tl.program_id(2)
    b, h = head // heads, head % heads
    first, end, live, seen = query_tile(
        tl.program_id(0), lengths, b, queries, keys, video_queries, video_rows, video_keys, BLOCK_M
    )

    begin, stop = split * span, tl.minimum(seen, split * span + span)
    full = begin + tl.maximum(stop - begin - REPEATS, 0) // BLOCK_N * BLOCK_N
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h

    q_tile = load_tile(q + b * q_b + h * q_h, first, live, q_l, D, BLOCK_M, BLOCK_D, True)
    dtype: tl.constexpr = v.dtype.element_ty

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    p = as_bits(tl.zeros([BLOCK_M, BLOCK_N], dtype))
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total, shrink = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    scale *= LOG2E

    # A block's probabilities meet v in the next round, beside the next block's scores.
    for start in range(begin, full, BLOCK_N):
        k_tile = load_tile(k, start, stop, k_l, D, BLOCK_N, BLOCK_D, False)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        late = tl.maximum(start - BLOCK_N, begin)
        v_tile = load_tile(v, late, stop, v_l, D, BLOCK_N, BLOCK_D, False)
        acc = add_product(acc * shrink[:, None], p, v_tile)
        p, shrink, top, total = softmax_block(s, top, total, scale, dtype)
    if begin < full:
        v_tile = load_tile(v, full - BLOCK_N, stop, v_l, D, BLOCK_N, BLOCK_D, False)
        acc = add_product(acc * shrink[:, None], p, v_tile)

    # The keys that do not fill a block.
    if full < stop:
        k_tile = load_tile(k, full, stop, k_l, D, BLOCK_N, BLOCK_D, True)
        s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        s = tl.where((tl.arange(0, BLOCK_N) < stop - full)[None, :], s, float("-inf"))
        if REPEATS:
            s += tl.where(tl.arange(0, BLOCK_N) == keys - 1 - full, more, 0.0)[None, :]
        p, shrink, top, total = softmax_block(s, top, total, scale, dtype)
        v_tile = load_tile(v, full, stop, v_l, D, BLOCK_N, BLOCK_D, True)
        acc = add_product(acc * shrink[:, None], p, v_tile)

    rows = first + tl.arange(0, BLOCK_M)
    real = (rows < live) & (total > 0)
    total = tl.where(real, total, 1.0)
    row_lse = tl.where(real, (top + tl.log2(total)) * LN2, float("-inf"))

    plane = split * tl.num_programs(1) + head
    tl.store(lse + plane * queries + rows, row_lse, rows < end)
    o += (split * (tl.num_programs(1) // heads) + b) * queries * heads * D + h * D
    store_tile(o, acc / total[:, None], first, live, end, heads * D, D, BLOCK_M, BLOCK_D)


@triton.jit
def reduce_parts(
    parts,
    part_lse,
    at,
    tile,
    rows,
    elements,
    splits,
    inside,
    kept,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Adds up the `splits` parts of rows `at`, elements `tile`: returns (o = sum_s exp(lse_s - lse)
    * o_s, lse). Parts are `rows` rows or `elements` elements apart. A row without a key gets zeros
    and -inf."""
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for split in range(splits):
        top = tl.maximum(top, tl.load(part_lse + split * rows + at, inside, other=float("-inf")))
    seen = top > float("-inf")
    top = tl.where(seen, top, 0.0)
    total, acc = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
    for split in range(splits):
        weight = tl.exp(tl.load(part_lse + split * rows + at, inside, other=float("-inf")) - top)
        acc += weight[:, None] * tl.load(parts + split * elements + tile, kept, other=0.0)
        total += weight
    total = tl.where(seen, total, 1.0)
    return acc / total[:, None], tl.where(seen, top + tl.log(total), float("-inf"))


@triton.jit
def _flash_reduce(
    parts,
    part_lse,
    o,
    lse,
    queries,
    heads,
    splits,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The splits of all rows. Few rows are split, so offsets fit 31 bits."""
    head = tl.program_id(1)
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)[None, :]
    inside = rows < queries
    kept = inside[:, None] & (cols < D)
    at = head * queries + rows
    tile = ((head // heads * queries + rows) * heads + head % heads)[:, None] * D + cols
    plane = tl.num_programs(1) * queries
    reduced, row_lse = reduce_parts(
        parts, part_lse, at, tile, plane, plane * D, splits, inside, kept, ROWS, BLOCK_D
    )
    tl.store(lse + at, row_lse, inside)
    tl.store(o + tile, reduced.to(o.dtype.element_ty), kept)


def check_width(what: str, width: int) -> None:
    require(
        width <= WIDEST,
        f"{what}: q, k and v",
        f"of head_dim at most {WIDEST} for the Triton backend",
        width,
        f'Request "{what}=sdpa".',
    )


def padded_width(q: Tensor) -> int:
    """head_dim as the kernels hold it: a power of two, at least the 16 of a matrix instruction. On
    a GPU at least 64: with 32 columns Triton 3.7.1 reads past shared memory on Hopper (its issue
    11366)."""
    return max(16 if q.device.type == "cpu" else 64, 1 << (q.shape[-1] - 1).bit_length())


def flash_options(m: int, n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}


def held_bytes(held: int, walked: int, operands: int, row: int, card: Card, tile: Tile) -> int:
    """Shared memory of `held` rows and of blocks of `walked` rows from each of so many operands, a
    row of `row` bytes, for each stage of the loop over the blocks."""
    return (held + operands * walked * card.buffers(tile["num_stages"])) * row + SPARE


def forward_bytes(card: Card, element: int, width: int, tile: Tile) -> int:
    """Shared memory that the forward kernel takes, at most: q, and k and v of a block. In fp32 the
    probabilities go through it too."""
    m, n = tile["BLOCK_M"], tile["BLOCK_N"]
    scores = 4 * m * n if element == 4 else 0
    return held_bytes(m, n, 2, width * element, card, tile) + scores


def forward_configuration(q: Tensor) -> dict[str, int]:
    """By registers and shared memory at head_dim 128: the accumulator takes 64 rows a warpgroup.
    Two stages would issue a copy right before the wait for it. Blocks of 64 keys spill 3 accesses
    on sm_80, 86 on sm_120; those of 32 none."""
    card, few = card_of(q.device), q.shape[1] <= 64
    if q.dtype == torch.float32:
        tiles = [flash_options(32, 32, 8, 1)]
    elif card.instruction == "mma":
        newer = card.capability > 80
        tiles = [flash_options(128, 32, 8, 3) if newer else flash_options(128, 64, 8, 2)]
    else:
        tiles = [] if few else [flash_options(128, 128, 8, 3)]
        tiles += [flash_options(64, 64, 4, 3)]

    needs = partial(forward_bytes, card, q.element_size(), padded_width(q))
    return configuration("flash_forward", offered("flash_forward", card, tiles, needs)[0])


def _ends(span: int, tiles: int, blocks: int, programs: int) -> int:
    """When `programs` side by side have done all tiles, cut into pieces of `span` blocks and a
    shorter last one, the long pieces first. In blocks: the rest of a program counts START, adding
    up a piece of each of `programs` tiles ADD."""
    pieces, short = divmod(blocks, span)
    long, shorts = span + START, tiles if short else 0
    waves, busy = divmod(tiles * pieces, programs)
    ends = (waves + (busy > 0)) * long

    # The programs that the last wave of long pieces leaves free do short ones beside it.
    beside = (programs - busy) * (long // (short + START)) if busy else 0
    ends += -(-max(0, shorts - beside) // programs) * (short + START)
    parts = pieces + (short > 0)
    return ends + (parts > 1) * parts * -(-tiles // programs) * ADD


@cache
def span_of(tiles: int, blocks: int, programs: int) -> int:
    """Blocks of keys that a program takes of its tile so that all end soonest, at least LEAST: all
    of them, or fewer where tiles fill so few waves of `programs` that the last one is felt."""
    least = blocks if tiles >= WAVES * programs else min(LEAST, blocks)
    return min(range(blocks, least - 1, -1), key=lambda n: _ends(n, tiles, blocks, programs))


def attend(q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, repeats: int = 1):
    """q [B, Q, H, D], k and v [B, L, H, D] -> o [B, Q, H, D], lse [B, H, Q] fp32, -inf where a
    query sees no key. The last key counts `repeats` times."""
    (B, Q, H, D), L = q.shape, k.shape[1]
    q, k, v = packed(q), packed(k), packed(v)
    o, lse = q.new_empty(B, Q, H, D), q.new_empty(B, H, Q, dtype=torch.float32)

    options, width = forward_configuration(q), {"D": D, "BLOCK_D": padded_width(q)}
    tiles = sum(tiles_of(geometry.video_queries, Q, options["BLOCK_M"]))
    blocks = max(1, -(-L // options["BLOCK_N"]))
    span = span_of(tiles * B * H, blocks, card_of(q.device).multiprocessors)
    span = configuration("flash_split", {"span": span})["span"]
    splits = -(-blocks // span)

    parts, part_lse = o, lse
    if splits > 1:
        parts = q.new_empty(splits, B, Q, H, D, dtype=torch.float32)
        part_lse = q.new_empty(splits, B, H, Q, dtype=torch.float32)

    *who, lengths = geometry
    launch(
        _flash_forward, (tiles, B * H, splits), q, k, v, lengths, parts, part_lse, Q, L, *who, H,
        span * options["BLOCK_N"], *q.stride()[:3], *k.stride()[:3],
        *v.stride()[:3], 1 / math.sqrt(D), math.log(repeats) * math.sqrt(D), **width,
        REPEATS=int(repeats > 1), **options,
    )  # fmt: skip

    if splits > 1:
        rows = configuration("flash_reduce", {"ROWS": 16, "num_warps": 4})
        launch(
            _flash_reduce,
            (-(-Q // rows["ROWS"]), B * H),
            parts,
            part_lse,
            o,
            lse,
            Q,
            H,
            splits,
            **width,
            **rows,
        )
    return o, lse
