"""vocab_sample: text head and a categorical draw in one, without keeping the logits.

Formula  z = h weight^T + bias; token = argmax_n(z[n] + temperature * g[n]), g = -log(-log(u)),
         which draws from softmax(z / temperature); temperature 0 is argmax(z).
         u is Philox-4x32-10 of key seeds[b] and counter (n, t, step, DRAW).
         confidence = max softmax(z), at any temperature.
         Triton and CPU take the same argmax as argmin_n(-log(u) * exp((max z - z[n]) /
         temperature)): no rounding to fp32 makes equals of logits that differ, or lets the first of
         equals win, and an exponential is one instruction of a GPU, a logarithm fifteen.
Gradient none.
Dtypes   matmul in the dtype of h with fp32 accumulation; z, g and confidence in fp32 (fp64 for
         fp64); u in fp64, by Triton and CPU -log(u) in fp32 to 3e-7 of itself, however near 1 u
         is.
Saved    nothing.
Bytes    2D per row for bf16 h, 2DN for the weight, 12 per row out.
Bound    weight bandwidth below 300 rows on an H100 (295 FLOP per byte), tensor cores above. A draw
         is 75 instructions: 0.2 ms for 256 rows of 256,000 if nothing else used the issue slots.
Triton   a program runs through the vocabulary tiles of a split and keeps per row the best, the
         maximum and the sum of exponentials; a second launch joins the splits. With 128 registers
         two programs share a multiprocessor: one draws while the other multiplies. Philox's middle
         rounds are a loop: unrolled for each piece of a tile they took long to compile.
CPU      a task multiplies up to 96 rows by panels of 64 vocabulary rows, which it packs 512 deep
         where they are used, and draws from each; splits of 512 are joined, however many threads.
Given up the reference holds the logits and draws of 64 rows of one sample. Rows of a tile of
         Triton's are of one sample, so samples of few rows fill it badly.
Legend   B samples, T text rows, D width, N vocabulary rows, S splits, P columns of a piece.
"""

import torch
from torch import Tensor

from ._card import card_of
from ._checks import compute_dtype, require
from ._compiled import built, supports_cpu
from ._draw import MIDDLE, draw_word, waiting_time
from ._philox import DRAW, check_seeds, philox_uniform
from ._rows import packed
from ._spec import Backend, Op
from ._triton import configuration, launch, operator, supports_triton, tl, triton
from ._vocab import (
    FLOOR,
    check_head,
    example_head,
    exp,
    fitting,
    head_logits,
    head_meta,
    head_operands,
    head_tile,
    join_splits,
    reduce_configuration,
    row_tile,
    split_tile,
    split_vocabulary,
    tile_configuration,
)

CHUNK_ROWS = 64


def check(h: Tensor, weight: Tensor, bias, seeds: Tensor, temperature: float) -> None:
    check_head("vocab_sample", h, weight, bias)
    check_seeds("vocab_sample", seeds, h.shape[0])
    require(
        temperature >= 0,
        "vocab_sample: temperature",
        "at least 0",
        temperature,
        "0 takes the most probable token.",
    )


def _sample_rows(h_TD, weight_ND, bias_N, seed, rows_T, step, temperature):
    logits_TN = head_logits(h_TD, weight_ND, bias_N)
    confidence_T = torch.exp(logits_TN.amax(-1) - logits_TN.logsumexp(-1))
    if temperature > 0:
        vocab_N = torch.arange(len(weight_ND), device=h_TD.device)
        uniform_TN = philox_uniform(seed, vocab_N, rows_T[:, None], step, DRAW)
        logits_TN = logits_TN - temperature * (-uniform_TN.log()).log().to(logits_TN.dtype)
    return logits_TN.argmax(-1), confidence_T


@torch.no_grad()
def vocab_sample_reference(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    seeds_B: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """h [B, T, D], weight [N, D], bias [N] or None, seeds [B] int64, step int or 0-d int64
    -> (tokens [B, T] int64, confidence [B, T] fp32). Samples are drawn one by one, so a batch of B
    equals B calls bit for bit."""
    check(h_BTD, weight_ND, bias_N, seeds_B, temperature)
    tokens_BT = torch.empty(h_BTD.shape[:2], dtype=torch.int64, device=h_BTD.device)
    confidence_BT = torch.empty(tokens_BT.shape, dtype=compute_dtype(h_BTD), device=h_BTD.device)

    for b in range(h_BTD.shape[0]):
        for start in range(0, h_BTD.shape[1], CHUNK_ROWS):
            at = b, slice(start, start + CHUNK_ROWS)
            h_TD = h_BTD[at]
            rows_T = torch.arange(start, start + len(h_TD), device=h_TD.device)
            tokens_BT[at], confidence_BT[at] = _sample_rows(
                h_TD, weight_ND, bias_N, seeds_B[b], rows_T, step, temperature
            )

    return tokens_BT, confidence_BT


@triton.jit
def take(
    z_MN,
    n,
    peak_M,
    best_MP,
    token_MP,
    total_MP,
    seed,
    text_M,
    step,
    inverse,
    middle,
    RANDOM: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Takes the vocabulary rows from n into the best so far (the least), the piece it is of and the
    sum of exponentials, per column of a piece: the generator's registers of a tile would spill."""
    if WIDTH > PIECE:
        HALF: tl.constexpr = WIDTH // 2
        left, right = z_MN.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        best_MP, token_MP, total_MP = take(
            left,
            n,
            peak_M,
            best_MP,
            token_MP,
            total_MP,
            seed,
            text_M,
            step,
            inverse,
            middle,
            RANDOM,
            PURPOSE,
            BLOCK_M,
            HALF,
            PIECE,
        )
        best_MP, token_MP, total_MP = take(
            right,
            n + HALF,
            peak_M,
            best_MP,
            token_MP,
            total_MP,
            seed,
            text_M,
            step,
            inverse,
            middle,
            RANDOM,
            PURPOSE,
            BLOCK_M,
            HALF,
            PIECE,
        )
    else:
        if RANDOM:  # the word before the gap, which would hold registers through its loop
            n_1P = n + tl.arange(0, WIDTH)[None, :]
            word = draw_word(seed, n_1P, text_M[:, None], step, PURPOSE, middle)

        gap_MP = peak_M[:, None] - z_MN
        total_MP += exp(-gap_MP)
        if RANDOM:
            this_MP = waiting_time(word) * exp(gap_MP * inverse)
        else:
            this_MP = -z_MN

        # The winner so far; on a tie the earlier column stays.
        token_MP = tl.where(this_MP < best_MP, n, token_MP)
        best_MP = tl.minimum(best_MP, this_MP)

    return best_MP, token_MP, total_MP


@triton.jit
def _vocab_sample_forward(
    h,
    weight,
    bias,
    seeds,
    step,
    best,
    token,
    peak,
    total,
    T,
    N,
    D,
    per_split,
    h_b,
    h_t,
    w_n,
    temperature,
    inverse,
    middle,
    RANDOM: tl.constexpr,
    PURPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PIECE: tl.constexpr,
    TAIL: tl.constexpr,
):
    # Halves in a loop: with all of a tile in a row the kernel took 5.5 s to compile, not 2.9.
    PARTS: tl.constexpr = 2 if BLOCK_N > PIECE else 1
    WIDTH: tl.constexpr = BLOCK_N // PARTS

    split = tl.program_id(2)
    b, first, read_M, h_at = row_tile(h, T, h_b, h_t, BLOCK_M)
    w_at = weight + split.to(tl.int64) * per_split * BLOCK_N * w_n
    seed, now = tl.load(seeds + b), tl.load(step).to(tl.int32)

    best_MP = tl.full([BLOCK_M, PIECE], float("inf"), tl.float32)
    token_MP = tl.zeros([BLOCK_M, PIECE], tl.int32)
    total_MP = tl.zeros([BLOCK_M, PIECE], tl.float32)
    peak_M = tl.full([BLOCK_M], FLOOR, tl.float32)

    last = tl.minimum((split + 1) * per_split, tl.cdiv(N, BLOCK_N))
    for tile in range(split * per_split, last):
        n = tile * BLOCK_N
        z_MN = head_tile(
            h_at, read_M, w_at, bias, n, N, D, h_t, w_n, BLOCK_M, BLOCK_N, BLOCK_K, TAIL
        )

        # What is kept refers to the maximum so far, so a higher one rescales it.
        before_M, peak_M = peak_M, tl.maximum(peak_M, tl.max(z_MN, 1))
        if RANDOM:
            best_MP *= exp((peak_M - before_M) * inverse)[:, None]
        total_MP *= exp(before_M - peak_M)[:, None]

        part_MN, next_MN = z_MN, z_MN
        if PARTS == 2:
            part_MN, next_MN = z_MN.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
        for part in range(PARTS):
            best_MP, token_MP, total_MP = take(
                part_MN,
                n + part * WIDTH,
                peak_M,
                best_MP,
                token_MP,
                total_MP,
                seed,
                first + read_M,
                now,
                inverse,
                middle,
                RANDOM,
                PURPOSE,
                BLOCK_M,
                WIDTH,
                PIECE,
            )
            part_MN = next_MN

        w_at += BLOCK_N * w_n

    best_M = tl.min(best_MP, 1)
    n_MP = token_MP + tl.arange(0, PIECE)[None, :]
    token_M = tl.min(tl.where(best_MP == best_M[:, None], n_MP, N - 1), 1)
    best_M = peak_M - temperature * tl.log(best_M) if RANDOM else -best_M

    rows_M = first + tl.arange(0, BLOCK_M)
    at_M = (split * tl.num_programs(1) + b) * T + rows_M
    tl.store(best + at_M, best_M, rows_M < T)
    tl.store(token + at_M, token_M, rows_M < T)
    tl.store(peak + at_M, peak_M, rows_M < T)
    tl.store(total + at_M, tl.sum(total_MP, 1), rows_M < T)


@triton.jit
def _vocab_sample_reduce(
    best,
    token,
    peak,
    total,
    tokens,
    confidence,
    M,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    split_S, at_SM, mask_S1 = split_tile(rows_M, M, splits, BLOCK_S)
    _, total_M = join_splits(peak, total, at_SM, mask_S1)
    tl.store(confidence + rows_M, 1.0 / total_M, rows_M < M)
    best_SM = tl.load(best + at_SM, mask_S1, other=float("-inf"))
    _, winner_M = tl.max(best_SM, 0, return_indices=True)
    token_SM = tl.load(token + at_SM, mask_S1, other=0)
    token_M = tl.sum(tl.where(split_S[:, None] == winner_M[None, :], token_SM, 0), 0)
    tl.store(tokens + rows_M, token_M.to(tl.int64), rows_M < M)


def _configuration(h: Tensor) -> dict[str, int]:
    """A piece is the columns whose registers are apart already. In fp32, without a matrix unit's
    layout, none are: a tile that is cut would be dealt out again and every thread would draw for
    ten."""
    name = "vocab_sample_forward"
    if h.dtype == torch.float32:
        tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "PIECE": 64}
        tile |= {"num_warps": 8, "num_stages": 4}
        return configuration(name, fitting(name, h, tile))
    piece = {"mma": 16, "wgmma": 8, "tcgen05": 4}[card_of(h.device).instruction]
    return tile_configuration(name, h, PIECE=piece)


def _forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, seeds: Tensor, step: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Returns tokens [B, T] int64, confidence [B, T] fp32. step: 0-d int64 on the device."""
    (B, T, D), N, M = h.shape, len(weight), h.shape[0] * h.shape[1]
    h, weight, bias = head_operands(h, weight, bias)
    seeds = packed(seeds)

    options = _configuration(h)
    per_split, splits = split_vocabulary(h, N, options)

    best, peak, total = (h.new_empty(splits, M, dtype=torch.float32) for _ in range(3))
    token = seeds.new_empty(splits, M, dtype=torch.int32)

    launch(
        _vocab_sample_forward, (triton.cdiv(T, options["BLOCK_M"]), B, splits),
        h, weight, bias, seeds, step, best, token, peak, total, T, N, D, per_split,
        *h.stride()[:2], weight.stride(0), temperature, 1.0 / max(temperature, 1e-30), MIDDLE,
        RANDOM=temperature > 0, PURPOSE=DRAW, TAIL=D % options["BLOCK_K"] > 0, **options,
    )  # fmt: skip

    tokens, confidence = seeds.new_empty(B, T), h.new_empty(B, T, dtype=torch.float32)
    options = reduce_configuration("vocab_sample_reduce", splits)
    launch(
        _vocab_sample_reduce,
        (triton.cdiv(M, options["BLOCK_M"]),),
        best,
        token,
        peak,
        total,
        tokens,
        confidence,
        M,
        splits,
        **options,
    )

    return tokens, confidence


forward_op = operator("univigu::vocab_sample", _forward)


@forward_op.register_fake
def _(h, weight, bias, seeds, step, temperature):
    B, T, _ = h.shape
    return h.new_empty(B, T, dtype=torch.int64), h.new_empty(B, T, dtype=torch.float32)


@torch.no_grad()
def vocab_sample_triton(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    seeds_B: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `vocab_sample_reference`, with fp32 logits for 16-bit h. Never waits for the device: an
    int step becomes a filled tensor, a tensor is read where it is."""
    check(h_BTD, weight_ND, bias_N, seeds_B, temperature)
    if not isinstance(step, Tensor) or step.device != h_BTD.device:
        step = torch.full((), int(step), dtype=torch.int64, device=h_BTD.device)
    return forward_op(h_BTD, weight_ND, bias_N, seeds_B, step, temperature)


@torch.no_grad()
def vocab_sample_cpu(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    seeds_B: Tensor,
    step: int | Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """As `vocab_sample_reference`, with fp32 logits for bf16 h."""
    check(h_BTD, weight_ND, bias_N, seeds_B, temperature)
    return torch.ops.univigu_C.vocab_sample(
        h_BTD, weight_ND, bias_N, seeds_B, int(step), temperature
    )


if built():

    @torch.library.register_fake("univigu_C::vocab_sample")
    def _(h, *rest):
        return h.new_empty(h.shape[:2], dtype=torch.int64), h.new_empty(
            h.shape[:2], dtype=torch.float32
        )


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: all text rows, and few of them."""
    seeds = torch.empty(case["B"], dtype=torch.int64, device="meta")
    for rows in (case["T"], 64):
        _forward(*head_meta(case, rows), seeds, seeds[0], 1.0)


def example(device, dtype, generator):
    seeds = torch.tensor([7, -(2**40) - 3], device=device)
    return (*example_head(device, dtype, generator), seeds, 3), {"temperature": 0.8}


OP = Op(
    name="vocab_sample",
    backends=(
        Backend("triton", vocab_sample_triton, supports_triton, auto_on=("cuda",)),
        Backend("cpu", vocab_sample_cpu, supports_cpu),
        Backend("reference", vocab_sample_reference),
    ),
    example=example,
    bytes=lambda c: 2 * c["D"] * (c["B"] * c["T"] + c["N"]) + 12 * c["B"] * c["T"],
    flops=lambda c: 2 * c["B"] * c["T"] * c["D"] * c["N"],
    differentiable=False,
    rehearse=rehearse,
)
