"""What the matrix kernels share: the tile of a program, its product, its epilogue's slices, and the
options of a launch."""

from functools import partial

import torch
from torch import Tensor

from ._card import SPARE, Card, Tile, card_of, offered
from ._triton import configuration, tl, triton


@triton.jit
def swizzled(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Returns (row tile, column tile). GROUP row tiles go through all column tiles together, so
    that programs that run at one time share rows and columns in the L2 cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile - first * tiles_n
    return first + within % height, within // height


@triton.jit
def product(
    x,
    w,
    w_k,
    inside_m,
    inside_n,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr = 0,
):
    """fp32 [BLOCK_M, BLOCK_N] of rows x and columns w, given as pointers to the first of their K
    elements, which lie 1 and w_k apart; zero outside. EVEN_K: BLOCK_K divides K. PROMOTE: elements
    that the tensor core sums (in 13 bits where they are fp8) before fp32 does; 0: all."""
    k = tl.arange(0, BLOCK_K)
    x, w = x[:, None] + k[None, :], w[None, :] + (k * w_k)[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask, w_mask = inside_m[:, None], inside_n[None, :]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (k < K - start)[None, :], w_mask & (k < K - start)[:, None]
        x_tile = tl.load(x + start, x_mask, other=0.0)
        w_tile = tl.load(w + start * w_k, w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        if PROMOTE > 0:
            if start % PROMOTE == PROMOTE - BLOCK_K:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if PROMOTE > 0:
        acc += total
    return acc


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def quarters(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The four quarters of x's columns. An epilogue that takes them in turn keeps a quarter of the
    temporaries: whole, a GELU with its gradient spilled 744 accesses."""
    left, right = _halves(x, BLOCK_M, BLOCK_N)
    return _halves(left, BLOCK_M, BLOCK_N // 2) + _halves(right, BLOCK_M, BLOCK_N // 2)


def tile_count(rows: tuple[int, ...], columns: tuple[int, ...], options: dict[str, int]) -> int:
    """Tiles of the products that share a launch."""
    m, n = options["BLOCK_M"], options["BLOCK_N"]
    return sum(-(-r // m) * -(-c // n) for r, c in zip(rows, columns, strict=True))


def gemm_bytes(card: Card, element: int, tile: Tile) -> int:
    """Shared memory that a product of elements of so many bytes takes, at most: its operands'
    tiles for each stage, or afterwards the fp32 sum, which changes threads to be stored."""
    m, n, k = (tile[f"BLOCK_{side}"] for side in "MNK")
    return max(card.buffers(tile["num_stages"]) * (m + n) * k * element, 4 * m * n) + SPARE


def first_full(
    kernel: str, x: Tensor, sizes: list[dict[str, int]], rows: tuple[int, ...], columns
) -> dict[str, int]:
    """The first of the sizes that fit the card of x whose tiles leave at most a tenth of its
    multiprocessors idle, or the last."""
    card = card_of(x.device)
    sizes = offered(kernel, card, sizes, partial(gemm_bytes, card, x.element_size()))
    enough = 0.9 * card.multiprocessors
    full = [size for size in sizes if tile_count(rows, columns, size) >= enough]
    return configuration(kernel, (full or sizes[-1:])[0])


def gemm_options(m: int, n: int, k: int, warps: int, stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP": 8,
        "num_warps": warps,
        "num_stages": stages,
    }


def gemm_configuration(
    kernel: str, x: Tensor, rows: tuple[int, ...], columns: tuple[int, ...], depth: int
) -> dict[str, int]:
    """Launch options of products of x's dtype, sums of `depth`, with these rows and columns.

    On a Hopper or a data-centre Blackwell: 128 x 256 where the sum is deep, for it needs the least
    shared-memory traffic per product; else 128 x 128, of which two fit a multiprocessor and the
    epilogue of one runs under the other's matrix instructions; 64 x 64 where larger tiles are too
    few to go round.
    """
    if x.dtype == torch.float32:
        sizes = [gemm_options(64, 64, 32, 4, 2)]
    elif card_of(x.device).instruction == "mma":
        sizes = [gemm_options(128, 128, 32, 8, 4)]
    else:
        sizes = [gemm_options(128, 256, 64, 8, 4)] if depth >= 4096 else []
        sizes += [gemm_options(128, 128, 64, 4, 3), gemm_options(64, 64, 128, 4, 4)]
    return first_full(kernel, x, sizes, rows, columns)
