"""Triton kernels of qknorm_rope: rows of q and of k, normed and rotated in registers.

Legend   D width, H heads, K head_dim, HEADS and PAIRS: H and K/2 as powers of two.
"""

from ._rows import columns, row_tile
from ._triton import tl, triton


@triton.jit
def load_pairs(
    row,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Loads the first and the second element of every pair of a row, fp32 [HEADS, PAIRS].
    Interleaved pairs are loaded as one run of channels and parted in registers; the halves of a
    text row are two runs."""
    row += tl.arange(0, HEADS)[:, None] * K
    head = tl.arange(0, HEADS)[:, None]
    if TEXT:
        col = columns(PAIRS)[None, :]
        inside = (head < H) & (col < K // 2)
        x0 = tl.load(row + col, inside, other=0.0)
        x1 = tl.load(row + K // 2 + col, inside, other=0.0)
    else:
        col = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.load(row + col, (head < H) & (col < K), other=0.0)
        x0, x1 = tl.split(tl.reshape(x, [HEADS, PAIRS, 2]))
    return x0.to(tl.float32), x1.to(tl.float32)


@triton.jit
def store_pairs(
    row,
    x0,
    x1,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    TEXT: tl.constexpr,
):
    """The inverse of `load_pairs`, rounded once."""
    x0, x1 = x0.to(row.dtype.element_ty), x1.to(row.dtype.element_ty)
    row += tl.arange(0, HEADS)[:, None] * K
    head = tl.arange(0, HEADS)[:, None]
    if TEXT:
        col = columns(PAIRS)[None, :]
        inside = (head < H) & (col < K // 2)
        tl.store(row + col, x0, inside)
        tl.store(row + K // 2 + col, x1, inside)
    else:
        col = tl.arange(0, 2 * PAIRS)[None, :]
        x = tl.reshape(tl.join(x0, x1), [HEADS, 2 * PAIRS])
        tl.store(row + col, x, (head < H) & (col < K))


@triton.jit
def load_angles(
    t,
    h,
    w,
    text,
    row,
    video_rows,
    height,
    width,
    P_T: tl.constexpr,
    P_H: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Loads cos, sin [1, PAIRS] of a joint row, the same for every head."""
    pair = tl.arange(0, PAIRS)[None, :]
    if TEXT:
        at = text + ((row - video_rows) * (K // 2) + pair) * 2
    else:
        P_W: tl.constexpr = K // 2 - P_T - P_H
        row = tl.cast(row, tl.int32)  # a 64-bit division takes several times the instructions
        line = row // width
        t_at = t + ((line // height) * P_T + pair) * 2
        h_at = h + ((line % height) * P_H + pair - P_T) * 2
        w_at = w + ((row % width) * P_W + pair - P_T - P_H) * 2
        at = tl.where(pair < P_T, t_at, tl.where(pair < P_T + P_H, h_at, w_at))
    cos = tl.load(at, pair < K // 2, other=0.0).to(tl.float32)
    return cos, tl.load(at + 1, pair < K // 2, other=0.0).to(tl.float32)


@triton.jit
def rotate(x0, x1, cos, sin):
    return x0 * cos - x1 * sin, x0 * sin + x1 * cos


@triton.jit
def _forward_rows(
    x,
    weight,
    out,
    rstd,
    t,
    h,
    w,
    text,
    first,
    end,
    x_l,
    out_l,
    video_rows,
    height,
    width,
    eps,
    P_T: tl.constexpr,
    P_H: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    TEXT: tl.constexpr,
):
    w0, w1 = load_pairs(weight, H, K, HEADS, PAIRS, TEXT)
    for row in tl.range(first, end, num_stages=STAGES):
        cos, sin = load_angles(
            t, h, w, text, row, video_rows, height, width, P_T, P_H, K, PAIRS, TEXT
        )
        x0, x1 = load_pairs(x + row * x_l, H, K, HEADS, PAIRS, TEXT)
        row_rstd = tl.rsqrt(tl.sum(x0 * x0 + x1 * x1) / (H * K) + eps)
        tl.store(rstd + row, row_rstd)
        o0, o1 = rotate(x0 * row_rstd * w0, x1 * row_rstd * w1, cos, sin)
        store_pairs(out + row * out_l, o0, o1, H, K, HEADS, PAIRS, TEXT)


@triton.jit
def _copy_rows(
    x,
    out,
    first,
    end,
    x_l,
    out_l,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    head, col = tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * PAIRS)[None, :]
    at, inside = head * K + col, (head < H) & (col < K)
    for row in tl.range(first, end, num_stages=STAGES):
        tl.store(out + row * out_l + at, tl.load(x + row * x_l + at, inside), inside)


@triton.jit
def _qknorm_rope_forward(
    q,
    k,
    v,
    weight_q,
    weight_k,
    q_out,
    k_out,
    v_out,
    rstd,
    t,
    h,
    w,
    text,
    video_rows,
    rows,
    height,
    width,
    q_b,
    q_l,
    k_b,
    k_l,
    v_b,
    v_l,
    k_out_b,
    k_out_l,
    v_out_b,
    v_out_l,
    eps,
    P_T: tl.constexpr,
    P_H: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The grid's last axis is q, k and, where it goes somewhere, v, which is copied."""
    b, is_k = tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    segment, first, end = row_tile(tl.program_id(0), video_rows, rows, ROWS)
    x, x_l = tl.where(is_k, k + b * k_b, q + b * q_b), tl.where(is_k, k_l, q_l)
    weight = tl.where(is_k, weight_k, weight_q)
    out = tl.where(is_k, k_out + b * k_out_b, q_out + b * rows * (H * K))
    out_l = tl.where(is_k, k_out_l, H * K)
    rstd += (tl.program_id(2) * tl.num_programs(1) + b) * rows

    if tl.program_id(2) == 2:
        if v is not None:
            v += b * v_b
            v_out += b * v_out_b
            _copy_rows(v, v_out, first, end, v_l, v_out_l, H, K, HEADS, PAIRS, STAGES)
    elif segment == 1:
        _forward_rows(
            x, weight, out, rstd, t, h, w, text, first, end, x_l, out_l, video_rows, height, width,
            eps, P_T, P_H, H, K, HEADS, PAIRS, STAGES, True,
        )  # fmt: skip
    else:
        _forward_rows(
            x, weight, out, rstd, t, h, w, text, first, end, x_l, out_l, video_rows, height, width,
            eps, P_T, P_H, H, K, HEADS, PAIRS, STAGES, False,
        )  # fmt: skip


@triton.jit
def _backward_rows(
    x,
    weight,
    rstd,
    dout,
    dx,
    dweight,
    t,
    h,
    w,
    text,
    first,
    end,
    x_l,
    video_rows,
    height,
    width,
    P_T: tl.constexpr,
    P_H: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
    TEXT: tl.constexpr,
):
    w0, w1 = load_pairs(weight, H, K, HEADS, PAIRS, TEXT)
    dw0, dw1 = tl.zeros([HEADS, PAIRS], tl.float32), tl.zeros([HEADS, PAIRS], tl.float32)
    for row in tl.range(first, end, num_stages=STAGES):
        cos, sin = load_angles(
            t, h, w, text, row, video_rows, height, width, P_T, P_H, K, PAIRS, TEXT
        )
        row_rstd = tl.load(rstd + row)
        x0, x1 = load_pairs(x + row * x_l, H, K, HEADS, PAIRS, TEXT)
        n0, n1 = x0 * row_rstd, x1 * row_rstd
        d0, d1 = load_pairs(dout + row * (H * K), H, K, HEADS, PAIRS, TEXT)
        u0, u1 = rotate(d0, d1, cos, -sin)
        g0, g1 = u0 * w0, u1 * w1
        mean = tl.sum(g0 * n0 + g1 * n1) / (H * K)
        dx0, dx1 = row_rstd * (g0 - n0 * mean), row_rstd * (g1 - n1 * mean)
        store_pairs(dx + row * (H * K), dx0, dx1, H, K, HEADS, PAIRS, TEXT)
        dw0 += u0 * n0
        dw1 += u1 * n1
    store_pairs(dweight, dw0, dw1, H, K, HEADS, PAIRS, TEXT)


@triton.jit
def _qknorm_rope_backward(
    q,
    k,
    weight_q,
    weight_k,
    rstd,
    dq_out,
    dk_out,
    dq,
    dk,
    dweight,
    t,
    h,
    w,
    text,
    video_rows,
    rows,
    height,
    width,
    q_b,
    q_l,
    k_b,
    k_l,
    P_T: tl.constexpr,
    P_H: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    b, is_k = tl.program_id(1).to(tl.int64), tl.program_id(2) == 1
    segment, first, end = row_tile(tl.program_id(0), video_rows, rows, ROWS)

    x, x_l = tl.where(is_k, k + b * k_b, q + b * q_b), tl.where(is_k, k_l, q_l)
    weight = tl.where(is_k, weight_k, weight_q)
    dout = tl.where(is_k, dk_out, dq_out) + b * rows * (H * K)
    dx = tl.where(is_k, dk, dq) + b * rows * (H * K)

    sample = tl.program_id(2) * tl.num_programs(1) + b
    rstd += sample * rows
    dweight += (sample * tl.num_programs(0) + tl.program_id(0)) * (H * K)

    if segment == 1:
        _backward_rows(
            x, weight, rstd, dout, dx, dweight, t, h, w, text, first, end, x_l, video_rows, height,
            width, P_T, P_H, H, K, HEADS, PAIRS, STAGES, True,
        )  # fmt: skip
    else:
        _backward_rows(
            x, weight, rstd, dout, dx, dweight, t, h, w, text, first, end, x_l, video_rows, height,
            width, P_T, P_H, H, K, HEADS, PAIRS, STAGES, False,
        )  # fmt: skip
