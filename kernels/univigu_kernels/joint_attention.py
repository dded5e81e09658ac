"""joint_attention: bidirectional attention over [video ; text] with per-sample text lengths.

Formula  o = softmax(q k^T / sqrt(K)) v per head, over the V video keys and the first
         text_lengths[b] text keys. Padded text keys are never read (they may hold NaN) and padded
         query rows give zeros. video_sees_text=False keeps video queries on video keys.
Gradient as in cross_attention; zero for padded rows.
Dtypes   q, k, v of one dtype; matmuls in it, accumulation and softmax in fp32 (fp64 for fp64).
Saved    q, k, v, o and one fp32 log-sum-exp per row and head (the reference keeps the softmax).
Bytes    8D per row: bf16 q, k, v in, o out.
Bound    tensor cores: 4*L*D FLOP per row; 70% of a 1.3B forward. 14*L*D backward in Triton, 10*L*D
         on the CPU.
Gluon    the forward for Hopper (_flash_hopper.py), with Triton's backward. It takes bf16 and fp16
         of head_dim 64 or 128, heads side by side, rows and base at multiples of 16 bytes, as TMA
         wants them; any other call goes to Triton's forward. A trial admits it, nothing else.
Given up the reference stores the scores. With lengths it and the libraries (cuDNN, flash-attn,
         xformers) run sample by sample, and wait for lengths that lie on a device: no graph can
         capture that. sdpa with lengths takes a mask, which excludes the flash kernel on a GPU, so
         that nothing synchronises. Triton and the CPU as in cross_attention; lengths on a device
         that are out of range are clamped there, not reported.
Legend   B samples, L key rows = V video + T text, Q query rows, H heads, K head_dim.
Queries  the last Q of the L rows; or, with video_queries given, that many video rows and then the
         last Q - video_queries text rows.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
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
from ._checks import check_video_rows, readable, require
from ._compiled import supports_cpu
from ._flash import Geometry
from ._flash_hopper import forward_kernels, supports_hopper
from ._libraries import LIBRARIES
from ._problems_attention import joint_attention_trials
from ._spec import Backend, Op
from ._triton import operator, supports_triton


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    video_rows: int,
    text_lengths: Tensor | None,
    video_queries: int | None,
) -> None:
    what = "joint_attention"
    check_heads(what, q, k, v)
    check_video_rows(what, video_rows, k.shape[1])

    require(
        q.shape[1] <= k.shape[1],
        f"{what}: q",
        f"at most the {k.shape[1]} joint rows long",
        q.shape[1],
        "Pass the last rows of the joint sequence.",
    )

    if video_queries is not None:
        text_rows = k.shape[1] - video_rows
        least, most = max(0, q.shape[1] - text_rows), min(video_rows, q.shape[1])
        require(
            least <= video_queries <= most,
            f"{what}: video_queries",
            f"between {least} and {most}: of {q.shape[1]} queries, up to {text_rows} are text",
            video_queries,
            "Pass how many leading rows of q are video rows.",
        )

    if text_lengths is not None:
        integral = not text_lengths.is_floating_point()
        require(
            integral and text_lengths.shape == (k.shape[0],),
            f"{what}: text_lengths",
            f"[{k.shape[0]}] integers",
            (text_lengths.dtype, list(text_lengths.shape)),
            "Pass one length per sample.",
        )
        if readable(text_lengths):
            check_lengths(text_lengths.tolist(), k.shape[1] - video_rows)


def check_lengths(lengths: list[int], text_rows: int) -> None:
    for b, length in enumerate(lengths):
        require(
            0 <= length <= text_rows,
            f"joint_attention: text_lengths[{b}]",
            f"between 0 and the {text_rows} text rows",
            length,
            "Count the unpadded tokens.",
        )


class Rows(NamedTuple):
    """Which rows are video, and who sees whom; see `joint_attention_by`.

    video_queries: leading rows of q that are video, counted.
    """

    video_rows: int
    text_lengths: Tensor | None
    video_sees_text: bool
    video_queries: int


def _whole(attend: Callable, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """Attention without padding, by an `attend` that takes no mask."""
    if rows.video_sees_text or rows.video_queries == 0:
        return attend(q, k, v)
    video = attend(q[:, : rows.video_queries], k[:, : rows.video_rows], v[:, : rows.video_rows])
    if rows.video_queries == q.shape[1]:
        return video
    return torch.cat([video, attend(q[:, rows.video_queries :], k, v)], 1)


def by_slices(attend: Callable, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """One call of `attend` for each sample with lengths, on exactly its rows; waits for lengths on
    a device."""
    if rows.text_lengths is None or len(rows.text_lengths) == 0:
        return _whole(attend, q, k, v, rows)
    outputs = []
    lengths, text_rows = rows.text_lengths.tolist(), k.shape[1] - rows.video_rows
    check_lengths(lengths, text_rows)

    for b, length in enumerate(lengths):
        padding = text_rows - length
        keys, queries = k.shape[1] - padding, max(rows.video_queries, q.shape[1] - padding)
        sample = (q[b : b + 1, :queries], k[b : b + 1, :keys], v[b : b + 1, :keys])
        o = _whole(attend, *sample, rows)
        outputs.append(F.pad(o, (0, 0, 0, 0, 0, q.shape[1] - queries)))
    return torch.cat(outputs)


def by_mask(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """With lengths one masked call; the padding is zeroed first, for 0 * NaN is NaN in a matmul."""
    if rows.text_lengths is None or len(rows.text_lengths) == 0:
        return _whole(attend_sdpa, q, k, v, rows)
    video_rows, video_queries = rows.video_rows, rows.video_queries
    lengths = rows.text_lengths.to(k.device)
    seen_BL = torch.arange(k.shape[1], device=k.device) < video_rows + lengths[:, None]
    k, v = (torch.where(seen_BL[..., None, None], x, 0) for x in (k, v))
    live_B1 = (video_rows + lengths[:, None] - k.shape[1] + q.shape[1]).clamp(min=video_queries)
    real_BQ = (torch.arange(q.shape[1], device=k.device) < live_B1)[..., None, None]
    q = torch.where(real_BQ, q, 0)

    # A sample without any key would divide by zero: it sees its zeroed keys, and outputs zeros.
    mask_B11L = (seen_BL | (video_rows + lengths == 0)[:, None])[:, None, None]
    split = 0 if rows.video_sees_text else video_queries
    o = attend_sdpa(q[:, split:], k, v, mask_B11L)
    if split:
        video = attend_sdpa(q[:, :split], k[:, :video_rows], v[:, :video_rows])
        o = torch.cat([video, o], 1)
    return torch.where(real_BQ, o, 0)


def by_kernel(op: Callable, q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """One of the operators of this file; raises ValueError for a head_dim over 128."""
    _flash.check_width("joint_attention", q.shape[-1])
    return op(q, k, v, *rows)[0]


def by_cpu(q: Tensor, k: Tensor, v: Tensor, rows: Rows) -> Tensor:
    """In fp32 and bf16; raises RuntimeError for a head_dim over 256."""
    return torch.ops.univigu_C.attention(q, k, v, *_geometry(k, *rows))[0]


def joint_attention_by(
    way: Callable,
    q_BQHK: Tensor,
    k_BLHK: Tensor,
    v_BLHK: Tensor,
    video_rows: int,
    text_lengths: Tensor | None = None,
    video_sees_text: bool = True,
    video_queries: int | None = None,
) -> Tensor:
    """q [B, Q, H, K], k and v [B, L, H, K], text_lengths [B] int or None -> o [B, Q, H, K].

    way: one of `by_slices`, `by_mask`, `by_kernel` and `by_cpu`, down to (q, k, v, rows).

    q holds the last Q joint rows. Or, with `video_queries`, that many video rows and then the last
    text rows: video rows alone still attend to the text.
    """
    check(q_BQHK, k_BLHK, v_BLHK, video_rows, text_lengths, video_queries)
    if video_queries is None:
        video_queries = max(0, video_rows - (k_BLHK.shape[1] - q_BQHK.shape[1]))
    rows = Rows(video_rows, text_lengths, video_sees_text, video_queries)
    return way(q_BQHK, k_BLHK, v_BLHK, rows)


def _geometry(k, video_rows, text_lengths, video_sees_text, video_queries) -> Geometry:
    if text_lengths is not None:
        text_lengths = text_lengths.to(k.device)
    video_keys = k.shape[1] if video_sees_text else video_rows
    return Geometry(video_queries, video_rows, video_keys, text_lengths)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    do: Tensor,
    video_rows: int,
    text_lengths: Tensor | None,
    video_sees_text: bool,
    video_queries: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns dq, dk, dv."""
    geometry = _geometry(k, video_rows, text_lengths, video_sees_text, video_queries)
    return _flash_backward.attend_backward(q, k, v, o, lse, do, geometry)


backward_op = operator("univigu::joint_attention_backward", _backward)
backward_op.register_fake(fake_backward)


def _save(ctx, inputs, output):
    q, k, v, ctx.video_rows, text_lengths, *ctx.who = inputs
    ctx.save_for_backward(q, k, v, *output, text_lengths)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, do, _):
    if do is None:
        return (None,) * 7
    *saved, lengths = ctx.saved_tensors
    gradients = backward_op(*saved, do, ctx.video_rows, lengths, *ctx.who)
    return *gradients, None, None, None, None


def _forward_op(name: str, attend: Callable) -> Callable:
    """The operator `name` of a forward kernel: `attend` of _flash or of _flash_hopper."""

    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        video_rows: int,
        text_lengths: Tensor | None,
        video_sees_text: bool,
        video_queries: int,
    ) -> tuple[Tensor, Tensor]:
        """Returns o, lse [B, H, Q] fp32; -inf where a query is padding."""
        geometry = _geometry(k, video_rows, text_lengths, video_sees_text, video_queries)
        return attend(q, k, v, geometry)

    return forward_op(name, forward, _save, _differentiate)


triton_op = _forward_op("univigu::joint_attention", _flash.attend)
hopper_op = _forward_op("univigu::joint_attention_hopper", _flash_hopper.attend)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors, bf16: all rows, forward and backward, with
    and without lengths, then the text rows alone against all keys."""
    B, V, T, H, K = (case[name] for name in "BVTHK")
    qkv = torch.empty(3, B, V + T, H, K, dtype=torch.bfloat16, device="meta").unbind()
    lengths = torch.empty(B, dtype=torch.int64, device="meta")
    for attend in forward_kernels(lengths.device):
        attend(*qkv, Geometry(V, V, V + T))
        o, lse = attend(*qkv, Geometry(V, V, V + T, lengths))
        attend(qkv[0][:, V:], *qkv[1:], Geometry(0, V, V + T, lengths))
    _backward(*qkv, o, lse, qkv[0], V, lengths, True, V)


def example(device, dtype, generator):
    def randn():
        x = torch.randn(2, 29, 2, 16, generator=generator, dtype=torch.float64)
        return x.to(device, dtype)

    lengths = torch.tensor([5, 2], device=device)
    return (randn(), randn(), randn(), 24), {"text_lengths": lengths, "video_sees_text": False}


def _backend(name: str, way: Callable, *rest) -> Backend:
    return Backend(name, partial(joint_attention_by, way), *rest)


REFERENCE = _backend("reference", partial(by_slices, attend_reference))

OP = Op(
    name="joint_attention",
    backends=(
        _backend("triton", partial(by_kernel, triton_op), supports_triton, ("cuda",)),
        _backend("gluon", partial(by_kernel, hopper_op), supports_hopper, ()),
        _backend("cpu", by_cpu, supports_cpu),
        *(
            _backend(name, partial(by_slices, attend), supports, ())
            for name, attend, supports in LIBRARIES
        ),
        _backend("sdpa", by_mask, supports_sdpa),
        REFERENCE,
    ),
    example=example,
    bytes=lambda c: 8 * c["B"] * (c["V"] + c["T"]) * c["D"],
    flops=lambda c: 4 * c["B"] * (c["V"] + c["T"]) ** 2 * c["D"],
    rehearse=rehearse,
    trials=joint_attention_trials(REFERENCE.call),
)
