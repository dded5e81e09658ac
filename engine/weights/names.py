"""Tensor names: how each checkpoint layout maps to the stock one, and that to our parameters.

stock      the official Uni-ViGU names; the layout of every file that we write
ours       the stock names, with q, k, v (in cross-attention k, v) stacked into one matrix
diffusers  WanTransformer3DModel
original   the Wan2.1 release

The renames move values without looking at them: tensors and unread file entries.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch

from engine.config import ModelConfig
from engine.errors import ModelFileError, listed

ANCHOR = "patch_embedding.weight"  # [D, 16, 1, 2, 2] in every layout; no other part has one of 5-D
INV_FREQ = "rotary_emb_text.inv_freq"  # a constant in stock files; only its length says something

_STACKS = {
    ".attn1.to_qkv.": (".attn1.to_q.", ".attn1.to_k.", ".attn1.to_v."),
    ".attn2.to_kv.": (".attn2.to_k.", ".attn2.to_v."),
    ".to_out.": (".to_out.0.",),
    ".up.": (".net.0.proj.",),
    ".down.": (".net.2.",),
}

_DIFFUSERS = (
    (r"patch_embedding\.", r"patch_embedding."),
    (r"condition_embedder\.(time_embedder|time_proj)\.", r"time_embedding_v.\1."),
    (r"condition_embedder\.text_embedder\.", r"cond_text_embedder."),
    (r"scale_shift_table$", r"scale_shift_table_v"),
    (r"proj_out\.", r"video_head.proj_out."),
    (r"(blocks\.\d+\.(?:attn1|attn2|norm2|ffn)\.)", r"\1"),
    (r"(blocks\.\d+\.scale_shift_table)$", r"\1"),
)

# The affine norm before cross-attention is norm3 in the original, norm2 in diffusers and stock.
_ORIGINAL = (
    (r"patch_embedding\.", r"patch_embedding."),
    (r"text_embedding\.0\.", r"cond_text_embedder.linear_1."),
    (r"text_embedding\.2\.", r"cond_text_embedder.linear_2."),
    (r"time_embedding\.0\.", r"time_embedding_v.time_embedder.linear_1."),
    (r"time_embedding\.2\.", r"time_embedding_v.time_embedder.linear_2."),
    (r"time_projection\.1\.", r"time_embedding_v.time_proj."),
    (r"head\.modulation$", r"scale_shift_table_v"),
    (r"head\.head\.", r"video_head.proj_out."),
    (r"(blocks\.\d+)\.modulation$", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.", r"\1.attn1.to_\2."),
    (r"(blocks\.\d+)\.self_attn\.o\.", r"\1.attn1.to_out.0."),
    (r"(blocks\.\d+)\.self_attn\.norm_", r"\1.attn1.norm_"),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.", r"\1.attn2.to_\2."),
    (r"(blocks\.\d+)\.cross_attn\.o\.", r"\1.attn2.to_out.0."),
    (r"(blocks\.\d+)\.cross_attn\.norm_", r"\1.attn2.norm_"),
    (r"(blocks\.\d+)\.norm3\.", r"\1.norm2."),
    (r"(blocks\.\d+)\.ffn\.0\.", r"\1.ffn.net.0.proj."),
    (r"(blocks\.\d+)\.ffn\.2\.", r"\1.ffn.net.2."),
)

_TEXT_COPIES = (
    (".ffn.", ".ffn_t."),
    ("time_embedding_v.", "time_embedding_t."),
    ("scale_shift_table_v", "scale_shift_table_t"),
)

_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_orig_mod\.|_checkpoint_wrapped_module\.")

_OTHER_PARTS = (  # of files that hold a whole pipeline, as ComfyUI saves them
    "vae.",
    "first_stage_model.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
    "clip_vision.",
)


def layout_of(names: Iterable[str]) -> str:
    """Which layout a set of names is in: "diffusers", "original", or "stock" when it is neither."""
    for name in names:
        if name.startswith("condition_embedder."):
            return "diffusers"
        if name.startswith(("time_projection.", "head.modulation")):
            return "original"
    return "stock"


def precision_of(names: Iterable[str]) -> str:
    """fp8 where weights come with scales, as in our fp8 folders; else bf16, not quantised."""
    return "fp8" if any(name.endswith(".weight_scale") for name in names) else "bf16"


def unwrap(state: dict[str, Any]) -> dict[str, Any]:
    """Names without what FSDP, torch.compile and activation checkpointing put anywhere in them, and
    without the prefix that all of the transformer's have, such as "model.diffusion_model.".

    Names of other parts, such as a VAE in the same file, keep theirs: see `split_parts`.
    """

    def bare(name: str) -> str:
        return _WRAPPERS.sub("", name)

    state = _renamed(state, bare)
    ends = [n for n, x in state.items() if n.endswith("." + ANCHOR) and len(x.shape) == 5]
    if ANCHOR in state or not ends:
        return state

    if len(ends) > 1:
        raise ModelFileError(
            f"state dict: must hold one transformer; got {len(ends)}: {listed(ends)}. "
            "Save the one that you mean by itself."
        )
    prefix = ends[0].removesuffix(ANCHOR)
    return _renamed(state, lambda name: name.removeprefix(prefix))


def split_parts(state: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The transformer's tensors, and the names of a VAE's and of text encoders' beside it."""
    others = [name for name in state if name.startswith(_OTHER_PARTS)]
    return {name: x for name, x in state.items() if name not in set(others)}, others


def from_diffusers(state: dict[str, Any]) -> dict[str, Any]:
    """WanTransformer3DModel names to stock names. ModelFileError names what has no counterpart."""
    return _by_rules(state, _DIFFUSERS, "diffusers Wan")


def from_original(state: dict[str, Any]) -> dict[str, Any]:
    """Wan2.1 release names to stock names. ModelFileError names what has no counterpart."""
    return _by_rules(state, _ORIGINAL, "original Wan")


def text_copies(state: dict[str, Any]) -> dict[str, Any]:
    """The stock text tensors that start as copies of their video twins: ffn_t, text time, table."""
    copies = {}
    for name, value in state.items():
        for video, text in _TEXT_COPIES:
            if video in name:
                copies[name.replace(video, text)] = value
    return copies


def stock_names(ours: str) -> tuple[str, ...]:
    """The stock tensors that make up one of our parameters, in the order of their rows."""
    for stack, parts in _STACKS.items():
        if stack in ours:
            return tuple(ours.replace(stack, part) for part in parts)
    return (ours,)


def to_stock(state: dict[str, torch.Tensor], cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Our state dict under stock names: stacks split into views, inv_freq [head_dim/2] added."""
    stock = {}
    for ours, tensor in state.items():
        parts = stock_names(ours)
        stock.update(zip(parts, tensor.chunk(len(parts)), strict=True))
    stock[INV_FREQ] = 1.0 / 10000.0 ** (torch.arange(0, cfg.head_dim, 2).float() / cfg.head_dim)
    return stock


def from_stock(state: dict[str, torch.Tensor], cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """Stock tensors under our names, q, k, v stacked on dim 0; the inverse of `to_stock`.

    ModelFileError when part of a stack is missing or inv_freq is not [cfg.head_dim/2].
    """
    ours: dict[str, torch.Tensor] = {}

    for name, tensor in state.items():
        if name == INV_FREQ:
            if tensor.shape != (cfg.head_dim // 2,):
                raise ModelFileError(
                    f"state dict: {INV_FREQ} must be [{cfg.head_dim // 2}]; "
                    f"got {list(tensor.shape)}. Pass the weights' own ModelConfig."
                )
            continue
        target = _our_name(name)
        parts = stock_names(target)
        if missing := [part for part in parts if part not in state]:
            raise ModelFileError(
                f"state dict: {target} must be stacked from {listed(parts)}; "
                f"got no {listed(missing)}. Pass the complete state dict."
            )
        if target not in ours:
            ours[target] = tensor if len(parts) == 1 else torch.cat([state[p] for p in parts])
    return ours


def _our_name(stock: str) -> str:
    for stack, parts in _STACKS.items():
        for part in parts:
            if part in stock:
                return stock.replace(part, stack)
    return stock


def _by_rules(
    state: dict[str, Any], rules: tuple[tuple[str, str], ...], layout: str
) -> dict[str, Any]:
    """Renames by the first rule that matches at the start; a name without a rule is an error."""

    def rename(name: str) -> str | None:
        for pattern, target in rules:
            if match := re.match(pattern, name):
                return match.expand(target) + name[match.end() :]
        return None

    if unknown := [name for name in state if rename(name) is None]:
        raise ModelFileError(
            f"{layout} tensors: names must be those of a Wan2.1 text-to-video transformer; "
            f"got unexpected {len(unknown)}: {listed(unknown)}. "
            "Its model is none that the engine knows; use a T2V checkpoint."
        )
    return _renamed(state, rename)


def _renamed(state: dict[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        if rename(name) in renamed:
            raise ModelFileError(
                f"state dict: names must be unique; got two tensors for {rename(name)}, "
                f"one of them {name}. Save the checkpoint again without the duplicate."
            )
        renamed[rename(name)] = value
    return renamed
