"""What vocab_sample and vocab_loss share: the check of the text head and its logits in plain
PyTorch; on a GPU one tile of the logits, which stay in registers, the running log-sum-exp over such
tiles, and how the vocabulary is split.

Grid     (row tiles, samples, splits): a program runs through the vocabulary tiles of its split, and
         the programs of a split start together, so a weight tile comes from memory once.
Legend   B samples, T text rows, M = B*T, D width, N vocabulary rows, S splits.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ._card import card_of, offered
from ._checks import compute_dtype, require
from ._gemm import gemm_bytes
from ._rows import packed
from ._triton import INTERPRETED, configuration, tl, triton

# Of a row's maximum. Finite, so that a tile of -inf (a masked bias) gives exp(-inf), not NaN.
FLOOR = tl.constexpr(-1e30)
_INTERPRETED = tl.constexpr(INTERPRETED)


def check_head(what: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(
        h.ndim == 3 and weight.ndim == 2 and h.shape[2] == weight.shape[1] and len(weight) > 0,
        f"{what}: h and weight",
        "[B, T, D] and [N, D], N at least 1",
        (list(h.shape), list(weight.shape)),
        "Pass the text rows only.",
    )

    require(
        h.dtype == weight.dtype,
        f"{what}: h and weight",
        "of one dtype",
        (h.dtype, weight.dtype),
        "Convert the head with the model.",
    )

    require(
        bias is None or bias.shape == weight.shape[:1],
        f"{what}: bias",
        f"[{weight.shape[0]}] or None",
        None if bias is None else list(bias.shape),
        "Pass one bias per vocabulary row.",
    )


def head_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h [..., D] -> logits [..., N] in float32 (float64 for float64)."""
    bias = None if bias is None else bias.to(h.dtype)
    return F.linear(h, weight, bias).to(compute_dtype(h))


@triton.jit
def exp(x):
    """tl.exp without its three instructions for results below 2^-126, which are 0 here. tl.exp2
    is that instruction in a function of libdevice, whose branch LLVM keeps for every number until
    the end: vocab_sample took 3 s longer to compile. The interpreter has no instructions."""
    x *= 1.4426950408889634
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )


@triton.jit
def row_tile(h, T, h_b, h_t, BLOCK_M: tl.constexpr):
    """Returns a program's (sample, first row, rows to read from there: those past T repeat the
    last, pointer to the first). Offsets in a tile are 32 bits wide, which saves registers."""
    b, first = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK_M
    read_M = tl.minimum(tl.arange(0, BLOCK_M), T - 1 - first)
    return b, first, read_M, h + b * h_b + first.to(tl.int64) * h_t


@triton.jit
def head_tile(
    h_at,
    read_M,
    w_at,
    bias,
    n,
    N,
    D,
    h_t,
    w_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,
):
    """Logits [BLOCK_M, BLOCK_N] fp32 of the rows read_M from h_at and of the vocabulary rows from
    n, which lie from w_at; -inf past N."""
    k_K, column_N = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    h_MK = read_M[:, None] * h_t + k_K[None, :]
    w_KN = tl.minimum(column_N, N - 1 - n)[None, :] * w_n + k_K[:, None]
    z_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        z_MN += tl.load(bias + n + column_N, column_N < N - n, other=0.0).to(tl.float32)[None, :]
    for k in range(0, D, BLOCK_K):
        if TAIL:
            h_tile = tl.load(h_at + h_MK, k_K[None, :] < D - k, other=0.0)
            w_tile = tl.load(w_at + w_KN, k_K[:, None] < D - k, other=0.0)
        else:
            h_tile, w_tile = tl.load(h_at + h_MK), tl.load(w_at + w_KN)
        z_MN = tl.dot(h_tile, w_tile, z_MN, input_precision="ieee")
        h_at += BLOCK_K
        w_at += BLOCK_K
    return tl.where(column_N[None, :] < N - n, z_MN, float("-inf"))


@triton.jit
def add_logits(z_MN, peak_M, total_M):
    """Takes a tile into (maximum, sum of exp(z - maximum)). A NaN logit ends up in the sum."""
    peak = tl.maximum(peak_M, tl.max(z_MN, 1))
    tile_M = tl.sum(exp(z_MN - peak[:, None]), 1)
    return peak, total_M * exp(peak_M - peak) + tile_M


@triton.jit
def join_splits(peak, total, at_SM, mask_S1):
    """Returns (maximum, sum of exp(z - maximum)): the splits' own, joined in a fixed order."""
    peak_SM = tl.load(peak + at_SM, mask_S1, other=FLOOR)
    peak_M = tl.max(peak_SM, 0)
    total_SM = tl.load(total + at_SM, mask_S1, other=0.0)
    return peak_M, tl.sum(total_SM * exp(peak_SM - peak_M[None, :]), 0)


@triton.jit
def split_tile(rows_M, M, splits, BLOCK_S: tl.constexpr):
    """Returns (split numbers, offsets into partials [S, M], mask of those that exist); rows past M
    repeat the last."""
    split_S = tl.arange(0, BLOCK_S)
    at_SM = split_S[:, None].to(tl.int64) * M + tl.minimum(rows_M, M - 1)[None, :]
    return split_S, at_SM, (split_S < splits)[:, None]


def tile_configuration(kernel: str, h: Tensor, **more: int) -> dict[str, int]:
    """By text rows, never by samples: a batch must equal its samples bit for bit. 128 bytes of K,
    96 KiB of shared memory at most; on Hopper registers for two programs on a multiprocessor."""
    small = h.shape[1] <= 64
    tile = {
        "BLOCK_M": 64 if small else 128,
        "BLOCK_N": 128,
        "BLOCK_K": 128 // h.element_size(),
        "num_warps": 4 if small else 8,
        "num_stages": 4 if small else 3,
    }
    hopper = card_of(h.device).instruction == "wgmma"
    cap = {"maxnreg": 128} if hopper and not small else {}
    return configuration(kernel, {**fitting(kernel, h, tile), **cap, **more})


def fitting(kernel: str, h: Tensor, tile: dict[str, int]) -> dict[str, int]:
    """The tile, or what of it the card of h holds."""
    card = card_of(h.device)
    return offered(kernel, card, [tile], partial(gemm_bytes, card, h.element_size()))[0]


def split_vocabulary(h: Tensor, vocabulary: int, options: dict[str, int]) -> tuple[int, int]:
    """Takes PROGRAMS, how many a sample gets, out of `options` -> (vocabulary tiles of a program,
    splits). Splits are consecutive rows, so the first of equals has the lowest index."""
    card = card_of(h.device)
    each = 2 if card.instruction == "wgmma" else 1  # a multiprocessor, which has the registers
    programs = options.pop("PROGRAMS", each * card.multiprocessors)
    tiles = triton.cdiv(vocabulary, options["BLOCK_N"])
    splits = max(1, programs // max(1, triton.cdiv(h.shape[1], options["BLOCK_M"])))
    per_split = triton.cdiv(tiles, splits)
    return per_split, triton.cdiv(tiles, per_split)


def reduce_configuration(kernel: str, splits: int) -> dict[str, int]:
    chosen = {"BLOCK_S": 1 << (splits - 1).bit_length(), "BLOCK_M": 16, "num_warps": 4}
    return configuration(kernel, chosen)


def head_operands(h: Tensor, weight: Tensor, bias: Tensor | None):
    """With contiguous rows; the kernels take any stride of row and sample."""
    return packed(h), packed(weight), None if bias is None else packed(bias)


def head_meta(case, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """h, weight and bias of a real shape, for rehearsals."""
    N, D, options = case["N"], case["D"], {"dtype": torch.bfloat16, "device": "meta"}
    h = torch.empty(case["B"], rows, D, **options)
    return h, torch.empty(N, D, **options), torch.empty(N, **options)


def example_head(device, dtype, generator):
    """h [2, 5, 32], weight [97, 32], bias [97]."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return randn(2, 5, 32), randn(97, 32) / 4, randn(97)
