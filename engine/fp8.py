"""FP8: which products a model runs on e4m3 operands, how it is converted, and what that changes.

fp8      both products of the feed-forward experts, which hold half of a Wan-sized model's weights.
         Weights get a scale per output channel, once. Activations get theirs in every step, where
         they arise: a row that residual_adaln norms has one, a hidden row one per 128 columns
         (one in all with the backend fp8_ffn=torch).
bf16     (the model's dtype) attention and its projections, whose errors reach all rows and go
         through a softmax; cross-attention's K and V, computed once per prompt; embeddings and
         heads, whose errors enter or leave the model with no later layer to make up for them.
fp32     sums of products; residual stream, norms, modulation, gates, time path, as without fp8.

A converted model is for inference: none of its parameters takes gradients. A model that is trained
for it (`train_in_fp8`) keeps its weights: experts run forward as they would in fp8, and backward as
without, from the weights themselves (straight through).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UsageError
from engine.model import UniViGU
from univigu_kernels import Expert, Fp8Expert, quantize_rows, quantize_weight

FP8 = torch.float8_e4m3fn


class Fp8Weight(nn.Module):
    """A linear layer's weight [F, D] in e4m3, weight_scale [F] in fp32, bias [F] as it was."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight = linear.weight.detach()
        if weight.is_meta:  # quantising it imports torch._dynamo, which takes seconds
            values = torch.empty(weight.shape, dtype=FP8, device="meta")
            scale = torch.empty(len(weight), dtype=torch.float32, device="meta")
        else:
            values, scale = quantize_weight(weight)
        self.register_buffer("weight", values)
        self.register_buffer("weight_scale", scale)
        self.register_buffer("bias", linear.bias.detach())


class Fp8FeedForward(nn.Module):
    """The numbers of one modality's expert; `fp8_ffn` runs both."""

    def __init__(self, up: nn.Linear, down: nn.Linear):
        super().__init__()
        self.up, self.down = Fp8Weight(up), Fp8Weight(down)

    @property
    def expert(self) -> Fp8Expert:
        up, down = self.up, self.down
        return Fp8Expert(
            up.weight, up.weight_scale, up.bias, down.weight, down.weight_scale, down.bias
        )


def quantize(model: UniViGU) -> UniViGU:
    """Quantises the experts of `model` in place, one at a time, and returns it.

    Its kernels must be bound with precision="fp8" (UsageError); a model that is converted already
    is a UsageError too.
    """
    if model.ops.precision != "fp8":
        raise UsageError(
            f"fp8: kernels must be bound with precision='fp8'; got {model.ops.precision!r}. "
            "Use load_model(..., precision='fp8'), or pass kernels=bind(..., precision='fp8')."
        )
    if is_converted(model):
        raise UsageError("fp8: the model must not be quantised yet; got fp8. Use it as it is.")
    calls = model.ops.fp8_ffn, model.ops.text_row_fp8_ffn
    routes = [partial(_route, call, model.dtype) for call in calls]
    for block in model.blocks:
        block.ffn = Fp8FeedForward(block.ffn.up, block.ffn.down)
        block.ffn_t = Fp8FeedForward(block.ffn_t.up, block.ffn_t.down)
        block.ffn_input, (block.route, block.text_route) = FP8, routes
    return model.requires_grad_(False)


def is_converted(model: UniViGU) -> bool:
    return isinstance(model.blocks[0].ffn, Fp8FeedForward)


def _route(fp8_ffn: Callable, out_dtype: torch.dtype, h, video, text, video_rows: int) -> Tensor:
    """h: rows [B, L, D] and their scales [B, L], as residual_adaln quantises them."""
    return fp8_ffn(*h, video, text, video_rows, out_dtype)


class _StraightThrough(torch.autograd.Function):
    """fp8_ffn of what is quantised here, with the gradients of routed_ffn, which is computed again
    for them."""

    @staticmethod
    def forward(ctx, fp8_ffn: Callable, routed_ffn: Callable, video_rows: int, h, *weights):
        ctx.routed_ffn, ctx.video_rows = routed_ffn, video_rows
        ctx.save_for_backward(h, *weights)
        experts = []
        for up, up_bias, down, down_bias in (weights[:4], weights[4:]):
            narrow = *quantize_weight(up), up_bias, *quantize_weight(down), down_bias
            experts.append(Fp8Expert(*narrow))
        return fp8_ffn(*quantize_rows(h), *experts, video_rows, h.dtype)

    @staticmethod
    def backward(ctx, dy):
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            experts = Expert(*leaves[1:5]), Expert(*leaves[5:])
            y = ctx.routed_ffn(leaves[0], *experts, ctx.video_rows)
        return None, None, None, *torch.autograd.grad(y, leaves, dy)


def train_in_fp8(model: UniViGU) -> None:
    """Gives the experts' forward pass the roundings of a converted model from now on."""

    def route(h, video: Expert, text: Expert, video_rows: int) -> Tensor:
        ops = model.ops.fp8_ffn, model.ops.routed_ffn
        return _StraightThrough.apply(*ops, video_rows, h, *video, *text)

    for block in model.blocks:
        block.route = block.text_route = route


class Drift(NamedTuple):
    """How far a tensor is from another: cosine of the angle, |difference| / |it|. where: "block 3"
    for the residual stream after it, or the name of one of `Output`'s fields."""

    where: str
    cosine: float
    relative_error: float


def drift(model: UniViGU, converted: UniViGU, inputs: tuple) -> list[Drift]:
    """Compares all blocks and outputs of two models for the arguments `inputs` of `forward`.

    The first model's residual streams are kept in host memory: 4 bytes x rows x width x layers.
    """
    kept, found = [], []

    def keep(block, arguments, result):
        kept.append(result[0].cpu())

    def compare(block, arguments, result):
        where = f"block {len(found)}"
        found.append(_difference(where, kept[len(found)], result[0].cpu()))

    with torch.no_grad():
        with _after_each(model.blocks, keep):
            expected = model(*inputs)
        with _after_each(converted.blocks, compare):
            result = converted(*inputs)
    for name, a, b in zip(expected._fields, expected, result, strict=True):
        if a is not None:
            found.append(_difference(name, a.cpu(), b.cpu()))
    return found


@contextmanager
def _after_each(blocks: nn.ModuleList, call: Callable) -> Iterator[None]:
    handles = [block.register_forward_hook(call) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _difference(where: str, expected: Tensor, result: Tensor) -> Drift:
    a, b = expected.double().flatten(), result.double().flatten()
    if torch.equal(a, b):
        return Drift(where, 1.0, 0.0)
    cosine = (a @ b / (a.norm() * b.norm())).item()
    return Drift(where, cosine, ((a - b).norm() / a.norm()).item())
