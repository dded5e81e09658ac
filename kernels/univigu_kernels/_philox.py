"""Philox-4x32-10, the counter-based generator of Random123 (Salmon et al., SC 2011).

A draw is a pure function of (seed, counter), so it is the same on every device, in every batch
and at any launch shape. Counter words used here: (vocabulary row, text row, step, purpose).
"""

import torch
from torch import Tensor

from ._checks import require

DRAW, JUMP = 0, 1  # purposes: a categorical draw (vocab_sample), a jump decision (flow_step)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    # int64 wraps modulo 2^64, so the mask recovers the unsigned high word.
    product = b * a
    return (product >> 32) & _WORD, product & _WORD


def philox_words(key0, key1, c0, c1, c2, c3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words held in int64. Arguments are ints or int64 tensors that broadcast.

    Counter words stay unexpanded until they mix: two of the ten rounds cost next to nothing.
    """
    words = [torch.as_tensor(word, dtype=torch.int64) for word in (c0, c1, c2, c3)]
    for _ in range(10):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], words[0])
        high1, low1 = _mulhilo(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ key0, low1, high0 ^ words[3] ^ key1, low0]
        key0, key1 = (key0 + _WEYL[0]) & _WORD, (key1 + _WEYL[1]) & _WORD
    return tuple(words)


def philox_uniform(seed: Tensor, c0, c1, c2, c3) -> Tensor:
    """((word0 >> 8) + 0.5) * 2^-24 in fp64, in (0, 1); the key is the 64-bit seed [...] int64.

    fp64 because fp32 would round the largest value to 1. An fp32 kernel gets the same -log(u) near
    1 from log1p of -((2^24 - 1 - (word0 >> 8)) + 0.5) * 2^-24, which is exact there.
    """
    word0 = philox_words(seed & _WORD, (seed >> 32) & _WORD, c0, c1, c2, c3)[0]
    return ((word0 >> 8).double() + 0.5) * 2.0**-24


def check_seeds(what: str, seeds: Tensor, batch: int) -> None:
    require(
        seeds.shape == (batch,) and seeds.dtype == torch.int64,
        f"{what}: seeds",
        f"[{batch}] int64",
        (list(seeds.shape), seeds.dtype),
        "Pass one seed per sample.",
    )
