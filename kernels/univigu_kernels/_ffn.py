"""Kernels of routed_ffn: grouped GEMMs, both experts in one launch.

Legend   samples B; V video rows and T text rows of a sample, which lie [video ; text]; D width;
         video_F, text_F hidden width of an expert; x_b, x_l strides of a sample and a row.
"""

from ._gemm import product, quarters, swizzled
from ._triton import tl, triton


@triton.jit
def routed_tile(
    samples,
    V,
    T,
    video_columns,
    text_columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
):
    """This program's tile, the video expert's first -> (is text's, sample and joint row of each
    row, whether it exists, first column, row tile). An expert's rows are packed across samples:
    row m is row m % V of sample m // V."""
    video_m, text_m = tl.cdiv(samples * V, BLOCK_M), tl.cdiv(samples * T, BLOCK_M)
    video_n, text_n = tl.cdiv(video_columns, BLOCK_N), tl.cdiv(text_columns, BLOCK_N)
    tile = tl.program_id(0)
    text = tile >= video_m * video_n
    tile -= tl.where(text, video_m * video_n, 0)
    i, j = swizzled(tile, tl.where(text, text_m, video_m), tl.where(text, text_n, video_n), GROUP)
    m, rows = i * BLOCK_M + tl.arange(0, BLOCK_M), tl.where(text, T, V)
    before, tile = tl.where(text, V, 0), tl.where(text, video_m, 0) + i
    if samples == 1:  # known when compiling: spares the division of each row
        sample, row = m * 0, before + m
    else:
        sample, row = m // rows, before + m % rows
    inside = m < samples * rows
    return text, sample.to(tl.int64), row.to(tl.int64), inside, j * BLOCK_N, tile


@triton.jit
def _sigmoid_2u(a):
    """gelu(a) = a * sigmoid(2u) with u = sqrt(2 / pi) * (a + 0.044715 a^3); here -2u / log(2)."""
    return 1.0 / (1.0 + tl.exp2(a * (-2.302208198 - 0.1029432396 * (a * a))))


@triton.jit
def ffn_up(
    h,
    video_weight,
    text_weight,
    video_bias,
    text_bias,
    hidden,
    a,
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
    SAVE: tl.constexpr,
):
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
    )

    bias, parts = tl.where(text, text_bias, video_bias), quarters(acc, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        at = ((sample * (V + T) + row) * hidden_row)[:, None] + n[None, :]
        mask = inside[:, None] & (n < F)[None, :]
        a_tile = parts[part] + tl.load(bias + n, n < F, other=0.0).to(tl.float32)[None, :]
        if SAVE:
            tl.store(a + at, a_tile.to(a.dtype.element_ty), mask)
        tl.store(hidden + at, (a_tile * _sigmoid_2u(a_tile)).to(hidden.dtype.element_ty), mask)


@triton.jit
def ffn_project(
    x,
    video_weight,
    text_weight,
    video_bias,
    text_bias,
    y,
    samples,
    V,
    T,
    D,
    video_F,
    text_F,
    x_row,
    video_row,
    text_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    FORWARD: tl.constexpr,
):
    """Rows of F to rows of D: hidden down_weight^T + bias FORWARD, else da up_weight."""
    text, sample, row, inside, first, _ = routed_tile(samples, V, T, D, D, BLOCK_M, BLOCK_N, GROUP)
    F, n = tl.where(text, text_F, video_F), first + tl.arange(0, BLOCK_N)
    weight = tl.where(text, text_weight, video_weight)
    w_row = tl.where(text, text_row, video_row).to(tl.int64)
    x_rows = x + (sample * (V + T) + row) * x_row
    if FORWARD:
        w, w_k = weight + n * w_row, 1
    else:
        w, w_k = weight + n, w_row
    acc = product(x_rows, w, w_k, inside, n < D, F, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K)
    bias, parts = tl.where(text, text_bias, video_bias), quarters(acc, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        y_tile = parts[part]
        if FORWARD:
            y_tile += tl.load(bias + n, n < D, other=0.0).to(tl.float32)[None, :]
        at = ((sample * (V + T) + row) * D)[:, None] + n[None, :]
        tl.store(y + at, y_tile.to(y.dtype.element_ty), inside[:, None] & (n < D)[None, :])


@triton.jit
def ffn_hidden_gradient(
    dy,
    video_weight,
    text_weight,
    a,
    hidden,
    da,
    row_sums,
    samples,
    V,
    T,
    D,
    video_F,
    text_F,
    dy_b,
    dy_l,
    video_row,
    text_row,
    a_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """da = (dy down_weight) * gelu'(a), its sum over a tile's rows, and hidden = gelu(a) again."""
    text, sample, row, inside, first, tile = routed_tile(
        samples, V, T, video_F, text_F, BLOCK_M, BLOCK_N, GROUP
    )

    F, n = tl.where(text, text_F, video_F), first + tl.arange(0, BLOCK_N)
    weight = tl.where(text, text_weight, video_weight)
    w_row = tl.where(text, text_row, video_row).to(tl.int64)

    acc = product(
        dy + sample * dy_b + row * dy_l,
        weight + n,
        w_row,
        inside,
        n < F,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
    )

    parts = quarters(acc, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        n = first + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        at = ((sample * (V + T) + row) * a_row)[:, None] + n[None, :]
        mask = inside[:, None] & (n < F)[None, :]
        a_tile = tl.load(a + at, mask, other=0.0).to(tl.float32)
        s = _sigmoid_2u(a_tile)
        tl.store(hidden + at, (a_tile * s).to(hidden.dtype.element_ty), mask)

        slope = s + a_tile * s * (1.0 - s) * (1.5957691216 + 0.2140644488 * (a_tile * a_tile))
        da_tile = parts[part] * slope
        tl.store(da + at, da_tile.to(da.dtype.element_ty), mask)
        tl.store(row_sums + tile.to(tl.int64) * a_row + n, tl.sum(da_tile, 0), n < F)


@triton.jit
def ffn_weight_gradient(
    da,
    h,
    dy,
    hidden,
    video_up,
    text_up,
    video_down,
    text_down,
    samples,
    V,
    T,
    D,
    video_F,
    text_F,
    F_b,
    F_l,
    h_b,
    h_l,
    dy_b,
    dy_l,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """da^T h [F, D] and dy^T hidden [D, F] over each expert's rows, a sample at a time; zero where
    it has none. Tiles: the video expert's of both weights, then the text expert's."""
    video_ups = tl.cdiv(video_F, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    text_ups = tl.cdiv(text_F, BLOCK_M) * tl.cdiv(D, BLOCK_N)
    video_tiles = video_ups + tl.cdiv(D, BLOCK_M) * tl.cdiv(video_F, BLOCK_N)

    # Four products share the grid: up and down of the video's expert, then of the text's.
    tile = tl.program_id(0)
    text = tile >= video_tiles
    tile -= tl.where(text, video_tiles, 0)
    F, ups = tl.where(text, text_F, video_F), tl.where(text, text_ups, video_ups)
    down = tile >= ups
    tile -= tl.where(down, ups, 0)

    # P, Q are this product's rows and columns, p and q its operands.
    P, Q = tl.where(down, D, F), tl.where(down, F, D)
    i, j = swizzled(tile, tl.cdiv(P, BLOCK_M), tl.cdiv(Q, BLOCK_N), GROUP)
    m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    p_b, q_b = tl.where(down, dy_b, F_b).to(tl.int64), tl.where(down, F_b, h_b).to(tl.int64)
    p_l, q_l = tl.where(down, dy_l, F_l).to(tl.int64), tl.where(down, F_l, h_l).to(tl.int64)
    rows, before = tl.where(text, T, V), tl.where(text, V, 0)
    steps, k = tl.cdiv(rows, BLOCK_K), tl.arange(0, BLOCK_K)
    p = tl.where(down, dy, da) + (k * p_l)[:, None] + m[None, :]
    q = tl.where(down, hidden, h) + (k * q_l)[:, None] + n[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, samples * steps):
        sample, row = step // steps, step % steps * BLOCK_K
        inside = (k < rows - row)[:, None]
        p_tile = tl.load(
            p + (sample * p_b + (before + row) * p_l), inside & (m < P)[None, :], other=0.0
        )
        q_tile = tl.load(
            q + (sample * q_b + (before + row) * q_l), inside & (n < Q)[None, :], other=0.0
        )
        acc = tl.dot(tl.trans(p_tile), q_tile, acc, input_precision="ieee")

    out = tl.where(down, tl.where(text, text_down, video_down), tl.where(text, text_up, video_up))
    at = m.to(tl.int64)[:, None] * Q + n[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), (m < P)[:, None] & (n < Q)[None, :])
