"""What model a file holds: every supported layout under one set of names, and the architecture that
names, shapes and the configuration imply. Headers alone are read."""

import re
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.config import ModelConfig
from engine.errors import ModelFileError, UsageError, listed
from engine.files.reading import about
from engine.files.tensors import Entry
from engine.weights.adapters import form_of, is_adapter
from engine.weights.checkpoints import is_checkpoint, read_checkpoint
from engine.weights.files import FORMAT, find_model, inventory, model_folder
from engine.weights.forms import adapter_error, say
from engine.weights.index import read_index
from engine.weights.names import (
    INV_FREQ,
    from_diffusers,
    from_original,
    layout_of,
    precision_of,
    split_parts,
    text_copies,
    unwrap,
)
from engine.weights.quantised import SCALED, dequantised
from engine.weights.variants import refuse_expert, refuse_variant

WAN_VOCAB = 256384  # rows of the umT5 embedding matrix
WAN_HEAD_DIM = 128
_CONFIG_NAMES = {
    "num_attention_heads": "heads",
    "num_heads": "heads",
    "attention_head_dim": "head_dim",
    "num_layers": "layers",
    "masked": "mask_source",
}


def open_model(path: Path, vocab: int = WAN_VOCAB) -> tuple[ModelConfig, dict[str, Entry]]:
    """The inventory of any supported file under stock names, and the architecture that it implies.

    path: also the id of a model in Hugging Face's cache, or a training checkpoint.
    vocab: rows of the text embedding which a Wan model is given.
    """
    path = find_model(path)
    if is_checkpoint(path):
        stock, config = read_checkpoint(path)
        return _infer(stock, config), stock

    read_index(path)
    entries, config = inventory(path)
    if is_adapter(entries):
        raise adapter_error(path, [form_of(entries)])
    with about(model_folder(path)):
        stock, others = split_parts(unwrap(entries))
        if others:
            say(f"{path}: {len(others)} tensors of other parts are ignored: {listed(others)}")
        layout = layout_of(stock)
        ours = layout == "stock" and (_is_ours(config) or precision_of(stock) == "fp8")
        if not ours or any(name.endswith(SCALED) for name in stock):
            stock = dequantised(stock)
        refuse_variant(stock, config)
        if layout != "stock":
            refuse_expert(path)
            rename = from_diffusers if layout == "diffusers" else from_original
            stock = _with_text_branch(rename(stock), vocab)

        found = precision_of(stock)
        if config.get("precision", found) != found:
            raise ModelFileError(
                f"config: precision must be {found}, as in the tensors; "
                f"got {config['precision']!r}. Use the config.json that belongs to these weights."
            )
        return _infer(stock, config), stock


def _is_ours(config: dict[str, Any]) -> bool:
    return config.get("format") == FORMAT["format"]


def _with_text_branch(video: dict[str, Entry], vocab: int) -> dict[str, Entry]:
    """A Wan model's entries plus the initial text branch, which no Wan file has."""
    dim = _shape(video, "patch_embedding.weight", 5)[0]

    def embeddings() -> torch.Tensor:
        return torch.empty(vocab, dim).normal_(0, 0.02, generator=torch.Generator().manual_seed(0))

    made = {
        "vocab_embed.weight": ((vocab, dim), embeddings),
        "text_head.norm_final.weight": ((dim,), partial(torch.ones, dim)),
        "text_head.linear.weight": ((vocab, dim), partial(torch.zeros, vocab, dim)),
        "text_head.linear.bias": ((vocab,), partial(torch.zeros, vocab)),
    }
    new = {name: Entry(name, shape, "F32", read) for name, (shape, read) in made.items()}
    return video | text_copies(video) | new


def _infer(stock: dict[str, Entry], config: dict[str, Any]) -> ModelConfig:
    """The architecture from shapes; the config adds what they do not say and must agree with them.

    head_dim comes from inv_freq, else from the config, else it is 128.
    """
    stated = _stated(config)
    dim = _shape(stock, "patch_embedding.weight", 5)[0]
    rows = _shape(stock, "vocab_embed.weight", 2)[0]
    head_rows = _shape(stock, "text_head.linear.weight", 2)[0]

    if INV_FREQ in stock:
        head_dim = 2 * _shape(stock, INV_FREQ, 1)[0]
    elif "heads" in stated and "head_dim" not in stated:
        head_dim = dim // stated["heads"]
    else:
        head_dim = stated.get("head_dim", WAN_HEAD_DIM)
    if head_dim == 0 or dim % head_dim:
        raise ModelFileError(
            f"patch_embedding.weight: rows must be a multiple of head_dim {head_dim}; got {dim}. "
            "Load a folder whose config.json states heads and head_dim."
        )

    found = {
        "heads": dim // head_dim,
        "head_dim": head_dim,
        "layers": len({m[1] for name in stock if (m := re.match(r"blocks\.(\d+)\.", name))}),
        "ffn_dim": _shape(stock, "blocks.0.ffn.net.0.proj.weight", 2)[0],
        "text_dim": _shape(stock, "cond_text_embedder.linear_1.weight", 2)[1],
        "freq_dim": _shape(stock, "time_embedding_v.time_embedder.linear_1.weight", 2)[1],
        "vocab": rows - stated.get("mask_source", False),
    }
    for name, value in found.items():
        if stated.get(name, value) != value:
            raise ModelFileError(
                f"config: {name} must be {value}, as in the tensors; got {stated[name]}. "
                "Use the config.json that belongs to these weights."
            )

    flow = "embedding" if head_rows == dim != rows else "discrete"
    try:
        return ModelConfig(**({"text_flow": flow} | stated | found))
    except UsageError as error:
        raise ModelFileError(str(error)) from error


def _stated(config: dict[str, Any]) -> dict[str, Any]:
    """The ModelConfig fields that a config of ours, of diffusers or of original Wan states."""
    types = {field.name: field.type for field in fields(ModelConfig)}
    if config.get("format_version", 1) != FORMAT["format_version"]:
        raise ModelFileError(
            f"config: format_version must be {FORMAT['format_version']}; "
            f"got {config['format_version']!r}. Update the engine."
        )

    unknown = config.keys() - types.keys() - FORMAT.keys() - {"precision"}
    if _is_ours(config) and unknown:
        raise ModelFileError(
            f"config: keys must be fields of ModelConfig; got {listed(sorted(unknown))}. "
            "Update the engine."
        )

    if config.get("eps", 1e-6) != 1e-6:
        raise ModelFileError(
            f"config: eps must be 1e-6; got {config['eps']!r}. Pass a Wan2.1 transformer."
        )

    stated = {}
    for key, value in config.items():
        name = _CONFIG_NAMES.get(key, key)
        if name not in types:
            continue
        if type(value) is not types[name] or (types[name] is int and value < 1):
            raise ModelFileError(
                f"config: {key} must be a {types[name].__name__}, numbers positive; got {value!r}. "
                "Use the config.json that belongs to these weights."
            )
        stated[name] = value
    return stated


def _shape(stock: dict[str, Entry], name: str, rank: int) -> tuple[int, ...]:
    if name not in stock:
        raise ModelFileError(
            f"{name} must be in the file; got {len(stock)} tensors: {listed(stock)}. "
            "Pass a Uni-ViGU or Wan2.1 text-to-video transformer."
        )
    entry = stock[name]
    if len(entry.shape) != rank:
        raise ModelFileError(
            f"{entry.key} must have {rank} dimensions; got shape {list(entry.shape)}. "
            "Pass a Uni-ViGU or Wan2.1 text-to-video transformer."
        )
    return entry.shape
