"""Products of few rows, split along their sum: y = x weight^T, a scale per row and per column where
the operands are e4m3, a bias, GELU.

A product of 256 rows has too few tiles for a card, and each walks the whole sum: 48 of 128 x 64 for
132 multiprocessors in the 1.3B model's projections to 1536 columns. Here `splits` programs share a
tile. Each sums its part of the depth and stores it in fp32; `split_reduce` adds the parts in their
order, so repeats are bit-equal, and does what follows the sum. Where the tiles are enough there is
one part, and the product does that itself.

Legend   D in, F out.
"""

from functools import partial

import torch
from torch import Tensor

from ._card import card_of, offered
from ._ffn import _sigmoid_2u
from ._fp8 import LONG_SUM
from ._gemm import gemm_bytes, gemm_options, product, quarters, swizzled, tile_count
from ._products import expert_rows
from ._rows import packed
from ._triton import configuration, launch, operator, tl, triton

LEAST = 512  # of a sum that are worth a program: 8 tiles of 64
COLUMNS = 1024  # of a program that joins the parts


@triton.jit
def _finished(acc, row_scale, w_scale, bias, n, F, GELU: tl.constexpr):
    """What follows the sum of a product, for columns n; row_scale goes with acc's rows."""
    if w_scale is not None:
        acc = acc * row_scale * tl.load(w_scale + n, n < F, other=0.0)
    if bias is not None:
        acc += tl.load(bias + n, n < F, other=0.0).to(tl.float32)
    return acc * _sigmoid_2u(acc) if GELU else acc


@triton.jit
def split_product(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    parts,
    rows,
    D,
    F,
    x_row,
    w_row,
    y_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLITS: tl.constexpr,
    GELU: tl.constexpr,
):
    """Its part of a tile's sum, to `parts` [SPLITS, rows, F]; of one part the result, to y."""
    i, j = swizzled(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(F, BLOCK_N), GROUP)
    m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (j * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)

    part = tl.program_id(1)
    depth = tl.cdiv(tl.cdiv(D, BLOCK_K), SPLITS) * BLOCK_K
    first = part * depth
    acc = product(
        x + m * x_row + first,
        w + n * w_row + first,
        1,
        m < rows,
        n < F,
        tl.minimum(depth, D - first),
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        PROMOTE,
    )

    quarter = quarters(acc, BLOCK_M, BLOCK_N)
    for q in tl.static_range(4):
        n = j * BLOCK_N + q * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        mask = (m < rows)[:, None] & (n < F)[None, :]
        if SPLITS > 1:
            at = (part.to(tl.int64) * rows + m) * F
            tl.store(parts + at[:, None] + n[None, :], quarter[q], mask)
        else:
            row_scale = None
            if x_scale is not None:
                row_scale = tl.load(x_scale + m, m < rows, other=0.0)[:, None]
            tile = _finished(quarter[q], row_scale, w_scale, bias, n[None, :], F, GELU)
            tl.store(y + (m * y_row)[:, None] + n[None, :], tile.to(y.dtype.element_ty), mask)


@triton.jit
def split_reduce(
    parts,
    x_scale,
    w_scale,
    bias,
    y,
    rows,
    F,
    y_row,
    SPLITS: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row: its parts added in their order, and what follows the sum."""
    m, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(SPLITS):
        acc += tl.load(parts + (part * rows + m) * F + n, n < F, other=0.0)

    row_scale = None
    if x_scale is not None:
        row_scale = tl.load(x_scale + m)
    y_tile = _finished(acc, row_scale, w_scale, bias, n, F, GELU)
    tl.store(y + m * y_row + n, y_tile.to(y.dtype.element_ty), n < F)


def splits_of(tiles: int, depth: int, multiprocessors: int) -> int:
    """Programs that share a tile: one where the tiles leave at most a tenth of the card idle; else
    what gives each multiprocessor two programs, each with LEAST of the sum or more."""
    if tiles >= 0.9 * multiprocessors:
        return 1
    return max(1, min(2 * multiprocessors // max(tiles, 1), depth // LEAST))


def _configuration(x: Tensor, columns: int) -> dict[str, int]:
    """Tiles of 128 x 64, two programs to a multiprocessor of Hopper, and their splits."""
    rows, depth = x.shape
    card = card_of(x.device)
    if x.dtype == torch.float32:
        size = gemm_options(64, 64, 32, 4, 2)
    else:
        size = gemm_options(128, 64, 128 // x.element_size(), 4, 4)

    (chosen,) = offered("split_product", card, [size], partial(gemm_bytes, card, x.element_size()))
    splits = splits_of(tile_count((rows,), (columns,), chosen), depth, card.multiprocessors)
    chosen = configuration("split_product", {**chosen, "SPLITS": splits})
    long_sum = x.element_size() == 1 and depth // chosen["SPLITS"] > LONG_SUM
    even = depth % chosen["BLOCK_K"] == 0
    return {**chosen, "EVEN_K": even, "PROMOTE": 512 if long_sum else 0}


def few_rows_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    gelu: bool = False,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """y [rows, F] = x [rows, D] weight [F, D]^T, in one launch or two.

    bias: [F].
    scales: of e4m3 operands, [rows] and [F] in fp32.
    gelu: whether the tanh approximation of it follows the bias.
    out: where y goes, of any row stride; None: fresh memory, in `out_dtype` or the dtype of x.
    """
    x, weight = packed(x), packed(weight)
    (rows, D), F = x.shape, len(weight)
    x_scale, w_scale = (None, None) if scales is None else (t.contiguous() for t in scales)
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty(rows, F, dtype=out_dtype or x.dtype) if out is None else out

    options = _configuration(x, F)
    splits, size = options["SPLITS"], (rows, F)
    parts = x.new_empty(splits, *size, dtype=torch.float32) if splits > 1 else None
    ends = x_scale, w_scale, bias, y
    strides = x.stride(0), weight.stride(0), y.stride(0)
    grid = tile_count((rows,), (F,), options), splits
    launch(split_product, grid, x, weight, *ends, parts, rows, D, F, *strides, GELU=gelu, **options)

    if splits > 1:
        chosen = configuration("split_reduce", {"BLOCK": COLUMNS, "num_warps": 4})
        grid = rows, -(-F // chosen["BLOCK"])
        joined = {"SPLITS": splits, "GELU": gelu, **chosen}
        launch(split_reduce, grid, parts, *ends, *size, y.stride(0), **joined)
    return y


def _experts(
    h: Tensor,
    video_up: Tensor,
    video_up_bias: Tensor,
    video_down: Tensor,
    video_down_bias: Tensor,
    text_up: Tensor,
    text_up_bias: Tensor,
    text_down: Tensor,
    text_down_bias: Tensor,
    video_rows: int,
) -> Tensor:
    """Both experts of routed_ffn, one after the other, into the slices of one y [B, L, D]."""
    video = video_up, video_up_bias, video_down, video_down_bias
    text = text_up, text_up_bias, text_down, text_down_bias

    y = h.new_empty(h.shape)
    for expert, x_rows, y_rows in expert_rows((video, text), video_rows, h, y):
        up_weight, up_bias, down_weight, down_bias = expert
        hidden = few_rows_product(x_rows, up_weight, up_bias, gelu=True)
        few_rows_product(hidden, down_weight, down_bias, out=y_rows)
    return y


split_ffn = operator("univigu::split_ffn", _experts)
split_ffn.register_fake(lambda h, *rest: h.new_empty(h.shape))
