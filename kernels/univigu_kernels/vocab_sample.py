"""vocab_sample: text head and a categorical draw in one, without keeping the logits.

Formula  z = h weight^T + bias; token = argmax_n(z[n] + temperature * g[n]), g = -log(-log(u)),
         which draws from softmax(z / temperature); temperature 0 is argmax(z).
         u is Philox-4x32-10 of key seeds[b] and counter (n, t, step, DRAW).
         confidence = max softmax(z), whatever the temperature.
Gradient none.
Dtypes   matmul in the dtype of h with fp32 accumulation; z, g and confidence in fp32 (fp64 for
         fp64); u in fp64.
Saved    nothing.
Bytes    2D per row for bf16 h, 2DN for the weight, 12 per row out.
Bound    weight bandwidth below 300 rows on an H100 (295 FLOP per byte), tensor cores above.
Given up the reference holds the logits and draws of 64 rows of one sample.
Legend   B samples, T text rows, D width, N vocabulary rows.
"""

import torch
from torch import Tensor

from ._checks import compute_dtype, require
from ._philox import DRAW, philox_uniform
from ._spec import Backend, Op
from .vocab_loss import check_head, example_head, head_logits

CHUNK_ROWS = 64


def check_seeds(what: str, seeds: Tensor, batch: int) -> None:
    require(
        seeds.shape == (batch,) and seeds.dtype == torch.int64,
        f"{what}: seeds",
        f"[{batch}] int64",
        (list(seeds.shape), seeds.dtype),
        "Pass one seed per sample.",
    )


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


def example(device, dtype, generator):
    seeds = torch.tensor([7, -(2**40) - 3], device=device)
    return (*example_head(device, dtype, generator), seeds, 3), {"temperature": 0.8}


OP = Op(
    name="vocab_sample",
    backends=(Backend("reference", vocab_sample_reference),),
    example=example,
    bytes=lambda c: 2 * c["D"] * (c["B"] * c["T"] + c["N"]) + 12 * c["B"] * c["T"],
    flops=lambda c: 2 * c["B"] * c["T"] * c["D"] * c["N"],
    differentiable=False,
)
