"""What the matrix kernels share: the order of their tiles and the product of one tile."""

from ._triton import tl, triton


@triton.jit
def swizzled(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """-> (row tile, column tile). GROUP row tiles go through all column tiles together, so that
    what runs at one time shares its rows and columns in the L2 cache."""
    first = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile - first * tiles_n
    return first + within % height, within // height


@triton.jit
def product(
    x, w, w_k, inside_m, inside_n, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N] of rows x and columns w, given as pointers [M, 1] and [1, N] to the first of
    their K elements, which lie 1 and w_k apart; zero outside. EVEN_K: BLOCK_K divides K."""
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, K, BLOCK_K):
        x_mask, w_mask = inside_m[:, None], inside_n[None, :]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (start + k < K)[None, :], w_mask & (start + k < K)[:, None]
        x_tile = tl.load(x + (start + k)[None, :], x_mask, other=0.0)
        w_tile = tl.load(w + (start + k)[:, None] * w_k, w_mask, other=0.0)
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
    return acc
