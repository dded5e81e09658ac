"""Activation checkpointing: what a block keeps for its backward pass, and what it computes twice.

none       everything that a backward formula reads is kept.
attention  a block keeps its input and, of both attentions, output and log-sum-exp: the most
           expensive rows to compute and two of the cheapest to keep. The rest runs twice.
block      a block keeps its input alone.
"""

from collections.abc import Callable
from functools import partial

from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

KEPT = (
    "univigu::joint_attention",
    "univigu::cross_attention",
    "univigu_C::attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "xformers_flash::flash_fwd",
    "xformers::efficient_attention_forward_cutlass",
)


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op.name().partition(".")[0] in KEPT
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _everything(block: Callable, *arguments):
    return block(*arguments)


# Nothing in a block draws random numbers, so no state of a generator is kept.
_again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
_but_attention = partial(
    _again, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention)
)

POLICIES: dict[str, Callable] = {
    "none": _everything,
    "attention": _but_attention,
    "block": _again,
}
