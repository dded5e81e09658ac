"""The one writer of model folders: config.json and safetensors shards, all of them or none."""

import json
import math
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.errors import UsageError
from engine.weights.files import FORMAT, INDEX, SINGLE, Entry, file_errors, read_json
from engine.weights.names import listed

_OUR_FILES = r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"


def write_folder(
    entries: dict[str, Entry],
    dtypes: dict[str, torch.dtype],
    config: dict[str, Any],
    path: Path,
    max_shard_bytes: int,
) -> None:
    """Writes config.json and safetensors shards, each tensor in the dtype given under its name.

    Everything new is on disk, in a temporary folder inside `path`, before anything old is touched.
    Then config.json leaves first and comes back last, so that a folder which an interruption leaves
    between two models is refused by `inventory`. UsageError when `path` holds any other model.
    """
    old = _replaceable(path)
    with file_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
            shards = _shards(entries, dtypes, max_shard_bytes)
            for file, names in shards.items():
                tensors = _apart({n: _cast(n, entries[n], dtypes[n]) for n in names})
                metadata = {"format": "pt", "config": json.dumps(config)}
                save_file(tensors, Path(new, file), metadata)

            documents = {"config.json": FORMAT | config}
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                documents = {INDEX: {"metadata": {}, "weight_map": weight_map}, **documents}
            for file, content in documents.items():
                Path(new, file).write_text(json.dumps(content, indent=2) + "\n")
            for file in (files := [*shards, *documents]):
                _sync(Path(new, file))

            for file in old:
                (path / file).unlink()
            for file in files:
                os.replace(Path(new, file), path / file)
        _sync(path)


def _cast(name: str, entry: Entry, dtype: torch.dtype) -> torch.Tensor:
    """The tensor on the CPU in `dtype`. Errors: UsageError where finite numbers overflow in it."""
    value = entry.read().to("cpu")
    cast = value.to(dtype).contiguous()
    if dtype == torch.float16 and cast.isinf().sum() > value.isinf().sum():
        raise UsageError(
            f"save: {name} must fit in float16, whose largest number is 65504; "
            f"got {value.abs().max():.4g}. Use bfloat16 or float32."
        )
    return cast


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in storage of its own: safetensors refuses to write one that another shares, as
    a Wan model's text tensors do with the video tensors that they start from."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)
    return tensors


def _shards(
    entries: dict[str, Entry], dtypes: dict[str, torch.dtype], max_shard_bytes: int
) -> dict[str, list[str]]:
    """File name to tensor names, filled in order; a tensor over the limit gets a file to itself."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, entry in entries.items():
        size = math.prod(entry.shape) * dtypes[name].itemsize
        if size > room and groups[-1]:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _replaceable(path: Path) -> list[str]:
    """Our files in `path`, config.json first. UsageError when it is a file or has another model."""
    if not path.exists():
        return []
    names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    models = [n for n in names if n.endswith((".json", ".safetensors")) or n == "transformer"]
    foreign = [n for n in models if not re.fullmatch(_OUR_FILES, n)]
    config = read_json(path / "config.json") if "config.json" in models else {}
    if not path.is_dir() or foreign or (models and config.get("format") != FORMAT["format"]):
        raise UsageError(
            f"save: {path} must be a new folder, or one that holds only a model of this engine; "
            f"got {listed(foreign or models or names)}. Choose another folder."
        )
    return models


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
