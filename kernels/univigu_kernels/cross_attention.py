"""cross_attention: every row attends to the context rows of its sample, without a mask.

Formula  o = softmax(q k^T / sqrt(K)) v per head. Context rows past the prompt take part: Wan was
         trained so.
Gradient with P the softmax and D = rowsum(do * o): dv = P^T do; dS = P * (do v^T - D);
         dq = dS k / sqrt(K); dk = dS^T q / sqrt(K)
Dtypes   q, k, v of one dtype; matmuls in it, accumulation and softmax in fp32 (fp64 for fp64).
Saved    q, k, v, o and one fp32 log-sum-exp per row and head (the reference keeps P).
Bytes    4D per row for bf16 q and o, 4D per context row for k and v.
Bound    tensor cores: 4*C*D FLOP per row against 4D bytes.
Given up the reference stores the scores [B, H, L, C]; sdpa does not.
Legend   B samples, L query rows, C context rows, H heads, K head_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._spec import Backend, Op, joint_rows

SDPA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(what: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape
    fits = fits and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
    require(
        fits,
        f"{what}: q, k and v",
        "[B, rows, H, K] of the same B, H and K, k and v of one shape",
        [list(t.shape) for t in (q, k, v)],
        "Split the heads before attention.",
    )
    require(
        q.dtype == k.dtype == v.dtype,
        f"{what}: q, k and v",
        "of one dtype",
        (q.dtype, k.dtype, v.dtype),
        "Cast them to the matmul dtype.",
    )


def attend_reference(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor) -> Tensor:
    """Explicit softmax attention over all keys; a query without any key gets zeros."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLHK, k_BCHK, v_BCHK))
    scores = (q @ k.mT).to(compute_dtype(q)) / math.sqrt(q.shape[-1])
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def attend_sdpa(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, mask: Tensor | None = None):
    """PyTorch's fused attention; `mask` is bool, True where a key is visible."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLHK, k_BCHK, v_BCHK))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def supports_sdpa(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in SDPA_DTYPES else "needs float32, bfloat16 or float16"


def cross_attention_reference(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor) -> Tensor:
    """q [B, L, H, K], k and v [B, C, H, K] -> o [B, L, H, K]."""
    check("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    return attend_reference(q_BLHK, k_BCHK, v_BCHK)


def cross_attention_sdpa(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor) -> Tensor:
    check("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    return attend_sdpa(q_BLHK, k_BCHK, v_BCHK)


def example(device, dtype, generator):
    def randn(rows):
        x = torch.randn(2, rows, 2, 16, generator=generator, dtype=torch.float64)
        return x.to(device, dtype)

    return (randn(29), randn(11), randn(11)), {}


OP = Op(
    name="cross_attention",
    backends=(
        Backend("sdpa", cross_attention_sdpa, supports_sdpa),
        Backend("reference", cross_attention_reference),
    ),
    example=example,
    bytes=lambda c: 4 * c["D"] * (joint_rows(c) + c["B"] * c["C"]),
    flops=lambda c: 4 * joint_rows(c) * c["C"] * c["D"],
)
