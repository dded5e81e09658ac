"""What joint_attention and cross_attention share: the check of q, k and v, attention of one whole
problem in plain PyTorch and by its library, and what the compiler must know of their operators.

Legend   as in cross_attention.py.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._compiled import built
from ._triton import operator

SDPA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_heads(what: str, q: Tensor, k: Tensor, v: Tensor) -> None:
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


def attend_reference(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, repeats: int = 1) -> Tensor:
    """Explicit softmax attention over all keys; a query without any key gets zeros."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLHK, k_BCHK, v_BCHK))
    scores = (q @ k.mT).to(compute_dtype(q)) / math.sqrt(q.shape[-1])
    if repeats > 1:
        scores[..., -1] += math.log(repeats)
    return (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def aligned(t: Tensor) -> Tensor:
    """t, copied where a row does not begin at a multiple of 16 bytes: PyTorch's kernel for fp32 on
    a GPU ends with "no kernel found to launch" there, instead of another kernel."""
    elements = 16 // t.element_size()
    starts = (t.storage_offset(), *t.stride()[:-1])
    fits = t.stride(-1) == 1 and all(start % elements == 0 for start in starts)
    return t if fits else t.contiguous()


def attend_sdpa(q_BLHK: Tensor, k_BCHK: Tensor, v_BCHK: Tensor, mask: Tensor | None = None):
    """PyTorch's fused attention; `mask` is bool, True where a key is visible."""
    given = q_BLHK, k_BCHK, v_BCHK
    given = map(aligned, given) if q_BLHK.is_cuda else given
    q, k, v = (t.transpose(1, 2) for t in given)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def supports_sdpa(device: torch.device, dtype: torch.dtype) -> str | None:
    return None if dtype in SDPA_DTYPES else "needs float32, bfloat16 or float16"


def fake_forward(q, k, v, *_):
    B, L, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, L, dtype=torch.float32)


def fake_backward(q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def forward_op(name: str, forward: Callable, save: Callable, differentiate: Callable) -> Callable:
    """The operator `name` of a forward kernel, `forward(q, k, v, ...)` -> o, lse, with the gradient
    that the two others make for torch.library."""
    op = operator(name, forward)
    op.register_fake(fake_forward)
    op.register_autograd(differentiate, setup_context=save)
    return op


if built():
    torch.library.register_fake("univigu_C::attention")(fake_forward)
    torch.library.register_fake("univigu_C::attention_backward")(fake_backward)

    def _save_cpu(ctx, inputs, output):
        q, k, v, *ctx.geometry, lengths, _ = inputs
        ctx.save_for_backward(q, k, v, *output, lengths)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def _differentiate_cpu(ctx, do, _):
        if do is None:
            return (None,) * 8
        *saved, lengths = ctx.saved_tensors
        gradients = torch.ops.univigu_C.attention_backward(*saved, do, *ctx.geometry, lengths)
        return *gradients, None, None, None, None, None

    torch.library.register_autograd(
        "univigu_C::attention", _differentiate_cpu, setup_context=_save_cpu
    )
