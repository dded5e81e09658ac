"""What vocab_sample and vocab_loss share on a GPU: one tile of the head's logits, which stay in
registers, the running log-sum-exp over such tiles, and how the vocabulary is split.

Grid     (row tiles, splits): a program runs through the vocabulary tiles of its split, so the row
         tiles of a split start together and a weight tile comes from memory once.
Legend   B samples, T text rows, M = B*T, D width, N vocabulary rows, S splits.
"""

from torch import Tensor

from ._triton import configuration, tl, triton

PROGRAMS = 264  # two on each of an H100's 132 multiprocessors: one draws while the other loads


@triton.jit
def head_rows(h, rows_M, M, T, h_b, h_t):
    """-> (pointers to the rows of h, sample, text row), int64; rows past M repeat the last."""
    at_M = tl.minimum(rows_M, M - 1).to(tl.int64)
    return h + at_M // T * h_b + at_M % T * h_t, at_M // T, at_M % T


@triton.jit
def head_tile(
    h_M, weight, bias, n_N, N, w_n, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits [BLOCK_M, BLOCK_N] fp32 of the rows h_M and the vocabulary rows n_N; -inf past N."""
    k_K = tl.arange(0, BLOCK_K)
    h_MK = h_M[:, None] + k_K[None, :]
    w_KN = weight + tl.minimum(n_N, N - 1).to(tl.int64)[None, :] * w_n + k_K[:, None]
    z_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if bias is not None:
        z_MN += tl.load(bias + n_N, n_N < N, other=0.0).to(tl.float32)[None, :]
    for k in range(0, D, BLOCK_K):
        if D % BLOCK_K == 0:
            h_tile, w_tile = tl.load(h_MK), tl.load(w_KN)
        else:
            h_tile = tl.load(h_MK, k_K[None, :] < D - k, other=0.0)
            w_tile = tl.load(w_KN, k_K[:, None] < D - k, other=0.0)
        z_MN = tl.dot(h_tile, w_tile, z_MN, input_precision="ieee")
        h_MK += BLOCK_K
        w_KN += BLOCK_K
    return tl.where(n_N[None, :] < N, z_MN, float("-inf"))


@triton.jit
def no_logits(BLOCK_M: tl.constexpr):
    """-> (maximum, sum of exp(z - maximum)) before the first tile. Finite, so that a tile of -inf
    (a masked bias) gives exp(-inf) and not exp(-inf + inf)."""
    return tl.full([BLOCK_M], -1e30, tl.float32), tl.zeros([BLOCK_M], tl.float32)


@triton.jit
def add_logits(z_MN, peak_M, total_M):
    """Takes a tile into (maximum, sum of exp(z - maximum)). A NaN logit ends up in the sum."""
    peak = tl.maximum(peak_M, tl.max(z_MN, 1))
    tile_M = tl.sum(tl.exp(z_MN - peak[:, None]), 1)
    return peak, total_M * tl.exp(peak_M - peak) + tile_M


@triton.jit
def join_splits(peak, total, at_SM, mask_S1):
    """-> (maximum, sum of exp(z - maximum)) over the splits' partial ones, in a fixed order."""
    peak_SM = tl.load(peak + at_SM, mask_S1, other=-1e30)
    peak_M = tl.max(peak_SM, 0)
    total_SM = tl.load(total + at_SM, mask_S1, other=0.0)
    return peak_M, tl.sum(total_SM * tl.exp(peak_SM - peak_M[None, :]), 0)


@triton.jit
def split_tile(rows_M, M, splits, BLOCK_S: tl.constexpr):
    """-> (split numbers, offsets into partials [S, M], which of them there are); rows past M repeat
    the last."""
    split_S = tl.arange(0, BLOCK_S)
    at_SM = split_S[:, None].to(tl.int64) * M + tl.minimum(rows_M, M - 1)[None, :]
    return split_S, at_SM, (split_S < splits)[:, None]


def tile_configuration(kernel: str, h: Tensor) -> dict[str, int]:
    """By text rows, never by samples: a batch must equal its samples bit for bit. 128 bytes of K,
    96 KiB of shared memory: two programs fit on a Hopper multiprocessor."""
    small = h.shape[1] <= 64
    return configuration(
        kernel,
        {
            "BLOCK_M": 64 if small else 128,
            "BLOCK_N": 128,
            "BLOCK_K": 128 // h.element_size(),
            "num_warps": 4 if small else 8,
            "num_stages": 4 if small else 3,
        },
    )


def split_vocabulary(rows: int, vocabulary: int, options: dict[str, int]) -> tuple[int, int]:
    """Takes PROGRAMS, how many a sample of `rows` gets, out of `options` -> (vocabulary tiles of a
    program, splits). Splits are consecutive rows, so the first of equals has the lowest index."""
    tiles = triton.cdiv(vocabulary, options["BLOCK_N"])
    splits = max(1, options.pop("PROGRAMS", PROGRAMS) // triton.cdiv(rows, options["BLOCK_M"]))
    per_split = triton.cdiv(tiles, splits)
    return per_split, triton.cdiv(tiles, per_split)


def reduce_configuration(kernel: str, splits: int) -> dict[str, int]:
    chosen = {"BLOCK_S": 1 << (splits - 1).bit_length(), "BLOCK_M": 16, "num_warps": 4}
    return configuration(kernel, chosen)
