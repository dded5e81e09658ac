"""Flash attention for Hopper in Gluon: the forward kernel of joint and cross attention, and the
reduction of the tiles that it splits along their keys. What TMA cannot take, and head_dims that are
not 64 or 128, go to the kernel of _flash.py.

A program does a tile: 128 queries of one head and one modality. One warp brings the keys and values
in blocks of 128; two groups of four warps hold 64 queries each and take turns at the tensor cores,
so that the softmax of one runs beside the products of the other. Inside a group the product of
probabilities and values is one block late, as in _flash.py. Both are FlashAttention-3's schedule
(arXiv 2407.08608). The block with the last key comes first: only the first is masked.

Nothing is read past the last key that a tile sees, and nothing is written past its last query,
though TMA moves whole boxes: see _boxes.py. Padded keys may therefore hold NaN, and a tile's end
never overwrites rows of the other modality.

The last wave of tiles, which would leave multiprocessors idle (60 tiles on 132), is split along the
keys. First go all pieces of one length, then what is left of each tile, which fills the gaps.

Legend   as in _flash.py; a group is the four warps of a warpgroup, a ring is STAGES blocks in
shared memory with a barrier for each that says when it is full, and one when it is used up.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import _flash
from ._boxes import DTYPES, box_at, cut_rows, tma_takes
from ._card import SPARE, card_of, lacks_hopper
from ._flash import LN2, LOG2E, Geometry, query_tile, reduce_parts, span_of, tile_rows
from ._rows import tiles_of
from ._triton import (
    GLUON,
    configuration,
    gl,
    gluon,
    hopper,
    launch,
    tl,
    tma_load,
    tma_store,
    triton,
)

ROWS, WIDTHS = 64, (64, 128)  # queries of a group; head_dims that have a kernel
SIZES = (
    "queries",
    "keys",
    "video_queries",
    "video_rows",
    "video_keys",
    "heads",
    "tiles",
    "whole",
    "rest",
    "span",
)


def supports_hopper(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernel lacks on `device` in `dtype`, or None."""
    if GLUON.missing:
        return GLUON.missing
    if reason := lacks_hopper(device):
        return reason
    return None if dtype in DTYPES else "needs float16 or bfloat16"


@gluon.jit
def _assemble(CODE: gl.constexpr):
    gl.inline_asm_elementwise(CODE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _take_turn(GROUP: gl.constexpr):
    """Waits until the other group has passed the tensor cores on. Named barriers 10 and 11: Triton
    takes low numbers for itself."""
    if GROUP == 0:
        _assemble("bar.sync 10, 256; mov.u32 $0, 0;")
    else:
        _assemble("bar.sync 11, 256; mov.u32 $0, 0;")


@gluon.jit
def _pass_turn(GROUP: gl.constexpr):
    if GROUP == 0:
        _assemble("bar.arrive 11, 256; mov.u32 $0, 0;")
    else:
        _assemble("bar.arrive 10, 256; mov.u32 $0, 0;")


@gluon.jit
def _settled(x):
    """x >= 0, which must exist here. ptxas would sink the softmax below the wait for the product
    that it should run beside, but not past a store, though the store never happens: 651 TFLOP/s
    with it, 635 without (H200)."""
    return gl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; "
        "@p st.volatile.shared.f32 [a], $1; mov.b32 $0, $1;}",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _opaque(x):
    """x. LLVM would move the rescaling of the accumulator ahead of the scores' product; it cannot
    look through this."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _fetch(x, ring, full, empty, block, b, row, end, head):
    """Brings block number `block` into its place of a ring, when that is used up."""
    STAGES: gl.constexpr = ring.shape[0]
    slot = block % STAGES
    hopper.mbarrier.wait(empty.index(slot), block // STAGES % 2 ^ 1)
    hopper.mbarrier.expect(full.index(slot), x.block_type.nbytes)
    tma_load(x, box_at(b, row, end, head, ring.shape[5]), full.index(slot), ring.index(slot))


@gluon.jit
def _load(q, k, v, memory, tile, walk):
    """The warp that loads: keys and values in the order of their use."""
    q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty = memory
    b, head, first, end, live = tile
    last, blocks, seen = walk
    ROWS: gl.constexpr = q_tiles.shape[4]
    BLOCK_N: gl.constexpr = k_ring.shape[4]
    for group in gl.static_range(2):
        hopper.mbarrier.expect(q_full.index(group), q.block_type.nbytes)
        at = box_at(b, first + group * ROWS, live, head, q_tiles.shape[5])
        tma_load(q, at, q_full.index(group), q_tiles.index(group))

    _fetch(k, k_ring, k_full, k_empty, 0, b, last, seen, head)
    for i in range(1, blocks):
        row = last - i * BLOCK_N
        _fetch(k, k_ring, k_full, k_empty, i, b, row, seen, head)
        _fetch(v, v_ring, v_full, v_empty, i - 1, b, row + BLOCK_N, seen, head)
    row = last - (blocks - 1) * BLOCK_N
    _fetch(v, v_ring, v_full, v_empty, blocks - 1, b, row, seen, head)


@gluon.jit
def _partial_sums(e, ROWS: gl.constexpr, BLOCK_N: gl.constexpr):
    """[ROWS, BLOCK_N] -> [ROWS, 4]: of what each of a row's four threads holds, without exchange
    between them."""
    return gl.sum(gl.sum(e.reshape([ROWS, BLOCK_N // 8, 4, 2]), 3), 1)


@gluon.jit
def _finish(outputs, buffer, acc, top, total, tile, heads, queries, piece, GROUP: gl.constexpr):
    """acc / total, rounded once, to o; a piece's goes to its part in 32 bits. Zeros, and -inf in
    lse, for rows that are padding or see no key. `buffer` held the queries, no longer used."""
    o, lse, parts, part_lse = outputs
    b, head, first, end, live = tile
    ROWS: gl.constexpr = acc.shape[0]
    D: gl.constexpr = acc.shape[1]
    first += GROUP * ROWS
    layout: gl.constexpr = acc.type.layout
    rows = first + gl.arange(0, ROWS, layout=top.type.layout)
    seeing = (rows < live) & (total > 0)
    total = gl.where(seeing, total, 1.0)
    row_lse = gl.where(seeing, (top + gl.log2(total)) * LN2, float("-inf"))
    o_rows: gl.constexpr = gl.SliceLayout(1, layout)
    real = first + gl.arange(0, ROWS, layout=o_rows) < live
    acc = acc * gl.convert_layout(1.0 / total, o_rows)[:, None]
    acc = gl.where(real[:, None], acc, 0.0)

    if piece < 0:
        gl.store(lse + (b * heads + head) * queries + rows, row_lse, mask=rows < end)
        buffer.reshape([ROWS, D]).store(acc.to(o.dtype))
        hopper.fence_async_shared()
        tma_store(o, box_at(b, first, end, head, D), buffer)
        hopper.tma.store_wait(0)
    else:
        start = (piece * 2 + GROUP) * ROWS
        gl.store(part_lse + start + gl.arange(0, ROWS, layout=top.type.layout), row_lse)
        down = gl.arange(0, ROWS, layout=o_rows)[:, None]
        across = gl.arange(0, D, layout=gl.SliceLayout(0, layout))[None, :]
        gl.store(parts + start * D + (down * D + across), acc)


@gluon.jit
def _attend(outputs, memory, tile, walk, sizes, GROUP: gl.constexpr, REPEATS: gl.constexpr):
    """A group: its 64 queries against all blocks of keys.

    A turn at the tensor cores is the scores' product of one block and the values' of the block
    before. The accumulator is rescaled between them, beside the scores' product.
    """
    q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty = memory
    last, blocks, seen = walk
    heads, queries, piece, scale, repeats = sizes
    ROWS: gl.constexpr = q_tiles.shape[4]
    STAGES: gl.constexpr = k_ring.shape[0]
    BLOCK_N: gl.constexpr = k_ring.shape[4]
    D: gl.constexpr = k_ring.shape[5]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = v_ring.dtype
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    q = q_tiles.index(GROUP).reshape([ROWS, D])

    if GROUP == 1:
        _pass_turn(GROUP)
    hopper.mbarrier.wait(q_full.index(GROUP), 0)
    hopper.mbarrier.wait(k_full.index(0), 0)
    _take_turn(GROUP)
    k = k_ring.index(0).reshape([BLOCK_N, D]).permute((1, 0))
    s = hopper.warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
    _pass_turn(GROUP)
    s = hopper.warpgroup_mma_wait(0, deps=(s,))
    hopper.mbarrier.arrive(k_empty.index(0), count=1)

    cols = last + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, s_layout))
    s = gl.where((cols < seen)[None, :], s, float("-inf"))
    if REPEATS:
        s += gl.where(cols == seen - 1, repeats, 0.0)[None, :]
    top = gl.max(s, 1) * scale
    top = gl.where(top == float("-inf"), 0.0, top)  # no key at all
    e = gl.exp2(s * scale - top[:, None])
    sums = _partial_sums(e, ROWS, BLOCK_N)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    p = gl.convert_layout(e.to(dtype), p_layout)
    acc = gl.zeros([ROWS, D], gl.float32, o_layout)
    shrink = gl.full([ROWS], 1.0, gl.float32, s_rows)

    for i in range(1, blocks):
        k_slot, v_slot = i % STAGES, (i - 1) % STAGES
        hopper.mbarrier.wait(k_full.index(k_slot), i // STAGES % 2)
        _take_turn(GROUP)
        k = k_ring.index(k_slot).reshape([BLOCK_N, D]).permute((1, 0))
        s = hopper.warpgroup_mma(q, k, nothing, use_acc=False, is_async=True)
        hopper.mbarrier.wait(v_full.index(v_slot), (i - 1) // STAGES % 2)
        acc = acc * gl.convert_layout(_opaque(shrink), o_rows)[:, None]
        v = v_ring.index(v_slot).reshape([BLOCK_N, D])
        acc = hopper.warpgroup_mma(p, v, acc, is_async=True)
        _pass_turn(GROUP)

        s = hopper.warpgroup_mma_wait(1, deps=(s,))
        hopper.mbarrier.arrive(k_empty.index(k_slot), count=1)
        new_top = gl.maximum(top, gl.max(s, 1) * scale)
        shrink = gl.exp2(top - new_top)
        e = gl.exp2(s * scale - new_top[:, None])
        sums = sums * gl.convert_layout(shrink, sum_rows)[:, None]
        sums = _settled(sums + _partial_sums(e, ROWS, BLOCK_N))
        top = new_top

        acc, p = hopper.warpgroup_mma_wait(0, deps=(acc, p))
        hopper.mbarrier.arrive(v_empty.index(v_slot), count=1)
        p = gl.convert_layout(e.to(dtype), p_layout)

    if GROUP == 0:
        _take_turn(GROUP)  # the other group passes once more than it takes
    v_slot = (blocks - 1) % STAGES
    hopper.mbarrier.wait(v_full.index(v_slot), (blocks - 1) // STAGES % 2)
    acc = acc * gl.convert_layout(shrink, o_rows)[:, None]
    v = v_ring.index(v_slot).reshape([BLOCK_N, D])
    acc = hopper.warpgroup_mma(p, v, acc, is_async=True)
    total = gl.convert_layout(gl.sum(sums, 1), s_rows)
    acc, p = hopper.warpgroup_mma_wait(0, deps=(acc, p))
    buffer = q_tiles.index(GROUP)
    _finish(outputs, buffer, acc, top, total, tile, heads, queries, piece, GROUP)


@gluon.jit(do_not_specialize=SIZES)
def _flash_hopper(
    q,
    k,
    v,
    lengths,
    o,
    lse,
    parts,
    part_lse,
    queries,
    keys,
    video_queries,
    video_rows,
    video_keys,
    heads,
    tiles,
    whole,
    rest,
    span,
    scale,
    repeats,
    D: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REPEATS: gl.constexpr,
):
    """q, k, v, o: `cut_rows`. Programs from `whole` on each do `span` blocks of one of the `rest`
    tiles: the first blocks of all of them, then the next. REPEATS: the last key's score grows by
    `repeats`, log(repeats) sqrt(D)."""
    number = gl.program_id(0)
    split = number >= whole
    piece = gl.where(split, number - whole, -1)
    index = gl.where(split, whole + piece % rest, number)
    plane, tile = index // tiles, index % tiles
    b, head = plane // heads, plane % heads
    first, end, live, seen = query_tile(
        tile, lengths, b, queries, keys, video_queries, video_rows, video_keys, 2 * ROWS
    )
    blocks = (seen + BLOCK_N - 1) // BLOCK_N
    low = gl.where(split, piece // rest * span, 0)
    high = gl.where(split, gl.minimum(low + span, blocks), blocks)
    high = gl.maximum(high, low + 1)  # without a key: a block that is masked whole
    last, blocks = (high - 1) * BLOCK_N, high - low

    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, 1, ROWS, D], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, 1, BLOCK_N, D], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, 1, BLOCK_N, D], v.layout)
    each_bar: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], each_bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], each_bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], each_bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], each_bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], each_bar)
    for group in gl.static_range(2):
        hopper.mbarrier.init(q_full.index(group), count=1)
    for slot in gl.static_range(STAGES):
        hopper.mbarrier.init(k_full.index(slot), count=1)
        hopper.mbarrier.init(v_full.index(slot), count=1)
        hopper.mbarrier.init(k_empty.index(slot), count=2)
        hopper.mbarrier.init(v_empty.index(slot), count=2)
    hopper.fence_async_shared()

    memory = (q_tiles, k_ring, v_ring, q_full, k_full, k_empty, v_full, v_empty)
    where, walk = (b, head, first, end, live), (last, blocks, seen)
    outputs = (o, lse, parts, part_lse)
    sizes = (heads, queries, piece, scale, repeats)
    # 65,536 registers: at launch 168 for each thread of 12 warps, of which Triton adds 3 that idle;
    # then by what each role holds.
    gl.warp_specialize(
        [
            (_attend, (outputs, memory, where, walk, sizes, 0, REPEATS)),
            (_attend, (outputs, memory, where, walk, sizes, 1, REPEATS)),
            (_load, (q, k, v, memory, where, walk)),
        ],
        [4, 1],
        [240, 24],
    )


@triton.jit
def _flash_tail_reduce(
    parts,
    part_lse,
    o,
    lse,
    queries,
    video_queries,
    heads,
    tiles,
    whole,
    rest,
    pieces,
    D: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The tiles from `whole` on, of their pieces."""
    nth, chunk = tl.program_id(1), tl.program_id(0)
    index = whole + nth
    plane, tile = index // tiles, index % tiles
    first, end = tile_rows(tile, video_queries, queries, TILE)
    inner, cols = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, D)[None, :]
    rows = first + inner
    inside = rows < end
    kept = inside[:, None] & (cols < D)
    start, apart = nth * TILE, rest * TILE
    parts, at = parts + start * D, inner[:, None] * D + cols
    tile_o, row_lse = reduce_parts(
        parts, part_lse + start, inner, at, apart, apart * D, pieces, inside, kept, ROWS, D
    )
    tl.store(lse + plane * queries + rows, row_lse, inside)
    row = (plane // heads).to(tl.int64) * queries + rows
    out = (row * heads + plane % heads)[:, None] * D + cols
    tl.store(o + out, tile_o.to(o.dtype.element_ty), kept)


def hopper_bytes(width: int, options: Mapping[str, int]) -> int:
    """Shared memory that the kernel takes, at most: queries of both groups, rings of k and of v."""
    rows = 2 * options["ROWS"] + 2 * options["STAGES"] * options["BLOCK_N"]
    return rows * width * 2 + SPARE


def split_tail(tiles: int, blocks: int, multiprocessors: int) -> tuple[int, int]:
    """Returns (tiles that one program does whole, blocks of a piece of the rest). All waves but the
    last are whole; the last is split where that ends sooner."""
    rest = tiles % multiprocessors
    span = span_of(rest, blocks, multiprocessors)
    return (tiles if span == blocks else tiles - rest), span


def attend(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, repeats: int = 1
) -> tuple[Tensor, Tensor]:
    """As `_flash.attend`, for any q, k and v: by its kernel where TMA cannot take one of them, or
    where a block would not fit a card (a Hopper holds 232,448 bytes, this takes 164,864)."""
    (B, Q, H, D), L, card = q.shape, k.shape[1], card_of(q.device)
    chosen = {"ROWS": ROWS, "BLOCK_N": 128, "STAGES": 2, "num_warps": 4}
    options = configuration("flash_hopper", chosen)
    taken = D in WIDTHS and all(map(tma_takes, (q, k, v)))
    if not taken or hopper_bytes(D, options) > card.shared:
        return _flash.attend(q, k, v, geometry, repeats)

    o, lse = q.new_empty(B, Q, H, D), q.new_empty(B, H, Q, dtype=torch.float32)
    rows, block = options["ROWS"], options["BLOCK_N"]
    tiles = sum(tiles_of(geometry.video_queries, Q, 2 * rows))
    total, blocks = tiles * B * H, -(-L // block)
    whole, span = split_tail(total, blocks, card.multiprocessors)
    split = configuration("flash_tail", {"whole": whole, "span": span})
    whole, span = split["whole"], split["span"]

    rest, pieces = total - whole, -(-blocks // span)
    parts = q.new_empty(rest * pieces * 2 * rows, D, dtype=torch.float32)
    part_lse = q.new_empty(rest * pieces * 2 * rows, dtype=torch.float32)
    *who, lengths = geometry
    launch(
        _flash_hopper, (whole + rest * pieces,), cut_rows(q, rows), cut_rows(k, block),
        cut_rows(v, block), lengths, cut_rows(o, rows), lse, parts, part_lse, Q, L, *who, H, tiles,
        whole, max(1, rest), span, LOG2E.value / math.sqrt(D), math.log(repeats) * math.sqrt(D),
        D=D, REPEATS=int(repeats > 1), **options,
    )  # fmt: skip
    if rest:
        reduce = configuration("flash_tail_reduce", {"ROWS": 16, "num_warps": 4})
        sizes = (Q, geometry.video_queries, H, tiles, whole, rest, pieces)
        grid = (2 * rows // reduce["ROWS"], rest)
        launch(
            _flash_tail_reduce, grid, parts, part_lse, o, lse, *sizes, D=D, TILE=2 * rows, **reduce
        )
    return o, lse


def forward_kernels(device: torch.device) -> tuple[Callable, ...]:
    """`attend` of each kernel that a device's card has: that of _flash.py, on a Hopper this too."""
    hopper_too = card_of(device).instruction == "wgmma"
    return (_flash.attend, attend) if hopper_too else (_flash.attend,)
