"""routed_ffn: two feed-forward experts, chosen by modality: video rows one, text rows the other.

Formula  y = down(gelu(up(h))), gelu the tanh approximation; hard assignment, no router.
Gradient with a = up(h): da = (dy down_weight) * gelu'(a); dh = da up_weight;
         dup_weight = da^T h; ddown_weight = dy^T gelu(a); biases sum their rows
Dtypes   matmuls in the dtype of h with fp32 accumulation; bias and gelu in that dtype.
Saved    h and a (gelu is recomputed by its own backward).
Bytes    4D + 4F per row in bf16 (h, the hidden row out and in, y), 8DF for the two experts.
Bound    tensor cores: 4DF FLOP per row.
Given up the reference launches four GEMMs and a cat, and keeps the hidden rows in memory.
Legend   B samples, L joint rows [video ; text], D width, F hidden width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import check_video_rows, require, segments
from ._spec import Backend, Op, joint_rows


class Expert(NamedTuple):
    """up_weight [F, D], up_bias [F], down_weight [D, F], down_bias [D]."""

    up_weight: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def check(h: Tensor, video: Expert, text: Expert, video_rows: int) -> None:
    require(h.ndim == 3, "routed_ffn: h", "[B, L, D]", list(h.shape), "Add the batch dimension.")
    check_video_rows("routed_ffn", video_rows, h.shape[1])
    for name, expert in (("video", video), ("text", text)):
        hidden, width = expert.up_weight.shape
        expected = [(hidden, width), (hidden,), (width, hidden), (width,)]
        require(
            width == h.shape[2] and [tuple(p.shape) for p in expert] == expected,
            f"routed_ffn: {name} expert",
            f"[F, {h.shape[2]}], [F], [{h.shape[2]}, F], [D]",
            [list(p.shape) for p in expert],
            "Pass up_weight, up_bias, down_weight, down_bias.",
        )


def _feed_forward(h: Tensor, expert: Expert) -> Tensor:
    hidden = F.gelu(F.linear(h, expert.up_weight, expert.up_bias), approximate="tanh")
    return F.linear(hidden, expert.down_weight, expert.down_bias)


def routed_ffn_reference(h_BLD: Tensor, video: Expert, text: Expert, video_rows: int) -> Tensor:
    """h [B, L, D] -> y [B, L, D] in the same dtype."""
    check(h_BLD, video, text, video_rows)
    if video_rows == 0:
        return _feed_forward(h_BLD, text)
    if video_rows == h_BLD.shape[1]:
        return _feed_forward(h_BLD, video)
    h_video, h_text = segments(h_BLD, video_rows)
    return torch.cat([_feed_forward(h_video, video), _feed_forward(h_text, text)], 1)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def expert():
        up, down = randn(48, 32) / 32**0.5, randn(32, 48) / 48**0.5
        return Expert(up, randn(48), down, randn(32))

    return (randn(2, 29, 32), expert(), expert(), 24), {}


OP = Op(
    name="routed_ffn",
    backends=(Backend("reference", routed_ffn_reference),),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * (c["D"] + c["F"]) + 8 * c["D"] * c["F"],
    flops=lambda c: 4 * joint_rows(c) * c["D"] * c["F"],
)
