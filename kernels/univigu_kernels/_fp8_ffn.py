"""Kernels of fp8_ffn: grouped GEMMs of e4m3 operands, both experts in one launch.

Legend   samples B; V video rows and T text rows of a sample, which lie [video ; text]; D width;
         video_F, text_F hidden width of an expert; h_b, h_l strides of a sample and a row.
"""

from ._ffn import _sigmoid_2u, routed_tile
from ._gemm import product, quarters
from ._triton import INTERPRETED, tl, triton

GROUP_COLUMNS = 128  # of a hidden row that share a scale: the columns of one tile
_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def to_fp8(x):
    """x, at most 448 in size, rounded to e4m3. The interpreter's cast loses the carry of a rounding
    that reaches a power of two and rounds subnormals wrongly, so there x is rounded before it."""
    if _INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF
        subnormal = (x + 24576.0) - 24576.0  # fp32 lies 2^-9 apart there, as e4m3's subnormals do
        x = tl.where(tl.abs(x) < 2.0**-6, subnormal, normal.to(tl.float32, bitcast=True))
    return x.to(tl.float8e4nv)


@triton.jit
def fp8_ffn_up(
    h,
    h_scale,
    video_weight,
    text_weight,
    video_scale,
    text_scale,
    video_bias,
    text_bias,
    hidden,
    hidden_scale,
    samples,
    V,
    T,
    D,
    video_F,
    text_F,
    h_b,
    h_l,
    video_row,
    text_row,
    hidden_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
):
    """hidden = gelu(h up_weight^T + bias) in e4m3 and its scales [groups, rows]. A tile's columns
    are a group, so its amax is at hand; no program waits for another one."""
    text, sample, row, inside, first, _ = routed_tile(
        samples, V, T, video_F, text_F, BLOCK_M, BLOCK_N, GROUP
    )

    F, n = tl.where(text, text_F, video_F), first + tl.arange(0, BLOCK_N)
    weight = tl.where(text, text_weight, video_weight)
    w_row = tl.where(text, text_row, video_row).to(tl.int64)

    acc = product(
        h + sample * h_b + row * h_l,
        weight + n * w_row,
        1,
        inside,
        n < F,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        PROMOTE,
    )

    w_scale, bias = tl.where(text, text_scale, video_scale), tl.where(text, text_bias, video_bias)
    at = sample * (V + T) + row
    row_scale = tl.load(h_scale + at, inside, other=0.0)

    # A row's amax spans all four quarters, so their values wait for it in registers.
    amax, parts, values = tl.zeros([BLOCK_M], tl.float32), quarters(acc, BLOCK_M, BLOCK_N), ()
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        a = parts[part] * row_scale[:, None] * tl.load(w_scale + n, n < F, other=0.0)[None, :]
        a += tl.load(bias + n, n < F, other=0.0).to(tl.float32)[None, :]
        values = values + (a * _sigmoid_2u(a),)
        amax = tl.maximum(amax, tl.max(tl.abs(values[part]), 1))

    scale = tl.where(amax > 0, amax / 448.0, 1.0)
    tl.store(hidden_scale + first // BLOCK_N * (samples * (V + T)) + at, scale, inside)
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        tile = to_fp8(values[part] * (1.0 / scale)[:, None])
        mask = inside[:, None] & (n < F)[None, :]
        tl.store(hidden + (at * hidden_row)[:, None] + n[None, :], tile, mask)


@triton.jit
def fp8_ffn_down(
    hidden,
    hidden_scale,
    video_weight,
    text_weight,
    video_scale,
    text_scale,
    video_bias,
    text_bias,
    y,
    samples,
    V,
    T,
    D,
    video_F,
    text_F,
    hidden_row,
    video_row,
    text_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = hidden down_weight^T + bias. The tensor core sums BLOCK_K products, a part of the COLUMNS
    that share a scale; fp32 sums the scaled parts."""
    text, sample, row, inside, first, _ = routed_tile(samples, V, T, D, D, BLOCK_M, BLOCK_N, GROUP)
    F, n, k = tl.where(text, text_F, video_F), first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight = tl.where(text, text_weight, video_weight)
    w_row = tl.where(text, text_row, video_row).to(tl.int64)

    at, rows = sample * (V + T) + row, samples * (V + T)
    x = hidden + (at * hidden_row)[:, None] + k[None, :]
    w = weight + (n * w_row)[None, :] + k[:, None]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, F, BLOCK_K):
        x_mask, w_mask = inside[:, None], (n < D)[None, :]
        if not EVEN_K:
            x_mask, w_mask = x_mask & (k < F - start)[None, :], w_mask & (k < F - start)[:, None]
        x_tile = tl.load(x + start, x_mask, other=0.0)
        w_tile = tl.load(w + start, w_mask, other=0.0)
        scale = tl.load(hidden_scale + start // COLUMNS * rows + at, inside, other=0.0)
        acc += tl.dot(x_tile, w_tile) * scale[:, None]

    w_scale, bias = tl.where(text, text_scale, video_scale), tl.where(text, text_bias, video_bias)
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        y_tile = parts[part] * tl.load(w_scale + n, n < D, other=0.0)[None, :]
        y_tile += tl.load(bias + n, n < D, other=0.0).to(tl.float32)[None, :]
        mask = inside[:, None] & (n < D)[None, :]
        tl.store(y + (at * D)[:, None] + n[None, :], y_tile.to(y.dtype.element_ty), mask)
