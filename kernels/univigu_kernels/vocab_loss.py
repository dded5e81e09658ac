"""vocab_loss: text head and cross-entropy in one, per row, without keeping the logits.

Formula  loss = logsumexp(z) - z[target], z = h weight^T + bias; 0 where target is ignore_index.
Gradient with p = softmax(z): dz = dloss * (p - onehot(target)), 0 where ignored;
         dh = dz weight; dweight = dz^T h; dbias = sum_rows dz
Dtypes   matmul in the dtype of h with fp32 accumulation; softmax and loss in fp32 (fp64 for fp64).
Saved    h, weight, bias, targets; the logits of a chunk are computed again in backward. Up to
         1024 rows the reference keeps them.
Bytes    2D per row for bf16 h, 2DN for the weight, once per chunk.
Bound    tensor cores: 2DN FLOP per row forward, three times that with the recomputed backward.
Given up nothing in value; the reference computes the head twice above 1024 rows.
Legend   B samples, T text rows, M = B*T, D width, N vocabulary rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._checks import compute_dtype, require
from ._spec import Backend, Op

CHUNK_ROWS = 1024


def check_head(what: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    require(
        h.ndim == 3 and weight.ndim == 2 and h.shape[2] == weight.shape[1],
        f"{what}: h and weight",
        "[B, T, D] and [N, D]",
        (list(h.shape), list(weight.shape)),
        "Pass the text rows only.",
    )
    require(
        bias is None or bias.shape == weight.shape[:1],
        f"{what}: bias",
        f"[{weight.shape[0]}] or None",
        None if bias is None else list(bias.shape),
        "Pass one bias per vocabulary row.",
    )


def check(h: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_head("vocab_loss", h, weight, bias)
    require(
        targets.shape == h.shape[:2] and targets.dtype == torch.int64,
        "vocab_loss: targets",
        f"{list(h.shape[:2])} int64",
        (list(targets.shape), targets.dtype),
        "Pass one token id per text row.",
    )


def head_logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """h [..., D] -> logits [..., N] in float32 (float64 for float64)."""
    bias = None if bias is None else bias.to(h.dtype)
    return F.linear(h, weight, bias).to(compute_dtype(h))


def _chunk_loss(h_MD, weight_ND, bias_N, targets_M, ignore_index: int) -> Tensor:
    logits = head_logits(h_MD, weight_ND, bias_N)
    return F.cross_entropy(logits, targets_M, reduction="none", ignore_index=ignore_index)


def vocab_loss_reference(
    h_BTD: Tensor,
    weight_ND: Tensor,
    bias_N: Tensor | None,
    targets_BT: Tensor,
    ignore_index: int = -100,
) -> Tensor:
    """h [B, T, D], weight [N, D], bias [N] or None, targets [B, T] int64 -> loss [B, T] fp32."""
    check(h_BTD, weight_ND, bias_N, targets_BT)
    h_MD, targets_M = h_BTD.flatten(0, 1), targets_BT.flatten()
    if len(h_MD) <= CHUNK_ROWS:
        loss = _chunk_loss(h_MD, weight_ND, bias_N, targets_M, ignore_index)
        return loss.view(targets_BT.shape)
    losses = []
    for h, targets in zip(h_MD.split(CHUNK_ROWS), targets_M.split(CHUNK_ROWS), strict=True):
        arguments = (h, weight_ND, bias_N, targets, ignore_index)
        losses.append(
            checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(losses).view(targets_BT.shape)


def example_head(device, dtype, generator):
    """h [2, 5, 32], weight [97, 32], bias [97]."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return randn(2, 5, 32), randn(97, 32) / 4, randn(97)


def example(device, dtype, generator):
    targets = torch.randint(97, (2, 5), generator=generator)
    targets[0, 1] = -100
    return (*example_head(device, dtype, generator), targets.to(device)), {}


OP = Op(
    name="vocab_loss",
    backends=(Backend("reference", vocab_loss_reference),),
    example=example,
    bytes=lambda c: 2 * c["D"] * (c["B"] * c["T"] + c["N"]),
    flops=lambda c: 2 * c["B"] * c["T"] * c["D"] * c["N"],
)
