"""cross_attention: every row attends to the context rows of its sample, without a mask.

Formula  o = softmax(q k^T / sqrt(K)) v per head. Context rows past the prompt take part: Wan was
         trained so. They are equal, so one of them may stand for all: the last key counts `repeats`
         times, its score grows by log(repeats).
Gradient with P the softmax and D = rowsum(do * o): dv = P^T do; dS = P * (do v^T - D);
         dq = dS k / sqrt(K); dk = dS^T q / sqrt(K)
Dtypes   q, k, v of one dtype; matmuls in it, accumulation and softmax in fp32 (fp64 for fp64).
Saved    q, k, v, o and one fp32 log-sum-exp per row and head (the reference keeps P).
Bytes    4D per row for bf16 q and o, 4D per context row for k and v.
Bound    tensor cores: 4*C*D FLOP per row against 4D bytes; 14*C*D backward in Triton, 10*C*D on the
         CPU, where keys and values are packed once a call (forward, of up to 48 queries a part at a
         time, where it is used) and P stays in the second cache.
Gluon    as in joint_attention: the same kernel, by the same rule.
Given up the reference stores the scores [B, H, L, C]; the others do not. Libraries copy k and v
         where the last key counts more than once. Triton and the CPU round P to the matmul dtype
         before they divide by the sum. Triton takes head_dim up to 128, holds it as a power of two
         (96 costs as much as 128), and has no tensor cores for fp32. The CPU takes head_dim up to
         256; its backward sums dq in fp32 in memory, once for each part of the keys, in 4 parts or,
         of many keys, 16 in all.
Legend   B samples, L query rows, C context rows, H heads, K head_dim.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from . import _flash, _flash_backward, _flash_hopper
from ._attention import (
    attend_reference,
    attend_sdpa,
    check_heads,
    fake_backward,
    forward_op,
    supports_sdpa,
)
from ._checks import require
from ._compiled import supports_cpu
from ._flash import Geometry
from ._flash_hopper import forward_kernels, supports_hopper
from ._libraries import LIBRARIES
from ._problems_attention import cross_attention_trials
from ._spec import Backend, Op, joint_rows
from ._triton import operator, supports_triton


def check_repeats(k: Tensor, repeats: int) -> None:
    require(
        repeats >= 1 and (repeats == 1 or k.shape[1] > 0),
        "cross_attention: repeats",
        "at least 1, of a key that there is",
        repeats,
        "Pass how many times the last key counts.",
    )
    require(
        repeats == 1 or not (torch.is_grad_enabled() and k.requires_grad),
        "cross_attention: repeats",
        "1 where gradients are wanted",
        repeats,
        "Pass every key, or use torch.no_grad().",
    )


def cross_attention_reference(
    q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, repeats: int = 1
) -> Tensor:
    """q [B, L, H, K], k and v [B, C, H, K] -> o [B, L, H, K]. Forward only for repeats > 1."""
    check_heads("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    check_repeats(k_BCHK, repeats)
    return attend_reference(q_BLHK, k_BCHK, v_BCHK, repeats)


def repeated(x_BCHK: Tensor, repeats: int) -> Tensor:
    """x with its last row as often as it counts, for libraries that have no other way."""
    if repeats == 1:
        return x_BCHK
    return torch.cat([x_BCHK, x_BCHK[:, -1:].expand(-1, repeats - 1, -1, -1)], 1)


def cross_attention_by(
    attend: Callable, q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, repeats: int = 1
) -> Tensor:
    """As `cross_attention_reference`, by the `attend` of a library."""
    check_heads("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    check_repeats(k_BCHK, repeats)
    return attend(q_BLHK, repeated(k_BCHK, repeats), repeated(v_BCHK, repeats))


cross_attention_sdpa = partial(cross_attention_by, attend_sdpa)


def _geometry(q: Tensor, k: Tensor) -> Geometry:
    """Every query sees every key."""
    return Geometry(q.shape[1], k.shape[1], k.shape[1])


def _backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv."""
    return _flash_backward.attend_backward(q, k, v, o, lse, do, _geometry(q, k))


backward_op = operator("univigu::cross_attention_backward", _backward)
backward_op.register_fake(fake_backward)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 4
    return *backward_op(*ctx.saved_tensors, do), None


def _forward_op(name: str, attend: Callable) -> Callable:
    """The operator `name` of a forward kernel: `attend` of _flash or of _flash_hopper."""

    def forward(q: Tensor, k: Tensor, v: Tensor, repeats: int = 1) -> tuple[Tensor, Tensor]:
        """Returns o, lse [B, H, L] fp32."""
        return attend(q, k, v, _geometry(q, k), repeats)

    return forward_op(name, forward, _save, _differentiate)


triton_op = _forward_op("univigu::cross_attention", _flash.attend)
hopper_op = _forward_op("univigu::cross_attention_hopper", _flash_hopper.attend)


def cross_attention_by_kernel(
    op: Callable, q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, repeats: int = 1
) -> Tensor:
    """As `cross_attention_reference`, by one of the operators of this file; raises ValueError for a
    head_dim over 128."""
    check_heads("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    check_repeats(k_BCHK, repeats)
    _flash.check_width("cross_attention", q_BLHK.shape[-1])
    return op(q_BLHK, k_BCHK, v_BCHK, repeats)[0]


def cross_attention_cpu(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, repeats: int = 1) -> Tensor:
    """As `cross_attention_reference` in fp32 and bf16; raises RuntimeError for a head_dim over
    256."""
    check_heads("cross_attention", q_BLHK, k_BCHK, v_BCHK)
    check_repeats(k_BCHK, repeats)
    L, C = q_BLHK.shape[1], k_BCHK.shape[1]
    return torch.ops.univigu_C.attention(q_BLHK, k_BCHK, v_BCHK, L, C, C, None, repeats)[0]


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors, bf16."""
    B, L, C, H, K = case["B"], case["V"] + case["T"], case["C"], case["H"], case["K"]
    q, k = (torch.empty(B, n, H, K, dtype=torch.bfloat16, device="meta") for n in (L, C))
    few = k[:, :64]
    for attend in forward_kernels(q.device):
        o, lse = attend(q, k, k, _geometry(q, k))
        attend(q, few, few, _geometry(q, few), C - 63)
    _backward(q, k, k, o, lse, q)


def example(device, dtype, generator):
    def randn(rows):
        x = torch.randn(2, rows, 2, 16, generator=generator, dtype=torch.float64)
        return x.to(device, dtype)

    return (randn(29), randn(11), randn(11)), {}


OP = Op(
    name="cross_attention",
    backends=(
        Backend(
            "triton", partial(cross_attention_by_kernel, triton_op), supports_triton, ("cuda",)
        ),
        Backend("gluon", partial(cross_attention_by_kernel, hopper_op), supports_hopper, ()),
        Backend("cpu", cross_attention_cpu, supports_cpu),
        *(
            Backend(name, partial(cross_attention_by, attend), supports, auto_on=())
            for name, attend, supports in LIBRARIES
        ),
        Backend("sdpa", cross_attention_sdpa, supports_sdpa),
        Backend("reference", cross_attention_reference),
    ),
    example=example,
    bytes=lambda c: 4 * c["D"] * (joint_rows(c) + c["B"] * c["C"]),
    flops=lambda c: 4 * joint_rows(c) * c["C"] * c["D"],
    rehearse=rehearse,
    trials=cross_attention_trials(cross_attention_reference),
)
