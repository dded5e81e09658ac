"""The one writer of model folders: config.json, safetensors shards and their hashes, all of them or
none."""

import json
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.errors import NonFinite, UsageError, listed
from engine.files.manifest import NAME as MANIFEST
from engine.files.manifest import Manifest, hash_groups
from engine.files.reading import read_json
from engine.files.tensors import CODES, Entry, file_chunks, is_finite
from engine.files.writing import publish, save_errors, write_hashed
from engine.weights.files import FORMAT, INDEX, SINGLE

_OUR_FILES = (
    r"(config|sha256)\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
)


def write_folder(
    entries: dict[str, Entry],
    dtypes: dict[str, torch.dtype],
    config: dict[str, Any],
    path: Path,
    max_shard_bytes: int,
) -> None:
    """Writes config.json, safetensors shards, each tensor in the dtype given under its name, and
    their hashes; one tensor is in memory at a time.

    Everything new is on disk, in a temporary folder inside `path`, before anything old is touched.
    Then config.json leaves first and comes back last, so that a folder which an interruption leaves
    between two models is refused by `inventory`. UsageError when `path` holds any other model.
    """
    old = _replaceable(path)
    made = {name: _cast(name, entry, dtypes[name]) for name, entry in entries.items()}
    with save_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
            shards, files, digests = _shards(made, max_shard_bytes), {}, {}
            for file, names in shards.items():
                metadata = {"format": "pt", "config": json.dumps(config)}
                chunks = file_chunks({n: made[n] for n in names}, metadata, digests)
                files[file] = write_hashed(Path(new, file), chunks)

            documents = {"config.json": FORMAT | config}
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                documents = {INDEX: {"metadata": {}, "weight_map": weight_map}, **documents}
            for file, content in documents.items():
                text = (json.dumps(content, indent=2) + "\n").encode()
                files[file] = write_hashed(Path(new, file), [text])
            manifest = Manifest(files, hash_groups(digests.items()))
            write_hashed(Path(new, MANIFEST), [manifest.text()])

            for file in old:
                (path / file).unlink()
            for file in [*shards, MANIFEST, *documents]:
                publish(Path(new, file), path / file)


def _cast(name: str, entry: Entry, dtype: torch.dtype) -> Entry:
    """The entry, read onto the CPU in `dtype`. Errors, of reading: NonFinite; UsageError where
    finite numbers overflow in it."""

    def read() -> torch.Tensor:
        value = entry.read().to("cpu")
        cast = value.to(dtype)
        if is_finite(cast):
            return cast
        if is_finite(value):
            raise UsageError(
                f"save: {name} must fit in {str(dtype).removeprefix('torch.')}; "
                f"got {value.abs().max():.4g}. Use bfloat16 or float32."
            )
        raise NonFinite(f"save: {name} must be finite; got NaN or infinity. Nothing is saved.")

    return replace(entry, dtype=CODES[dtype], read=read)


def _shards(entries: dict[str, Entry], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name to tensor names, filled in order; a tensor over the limit gets a file to itself."""
    groups: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, entry in entries.items():
        size = entry.nbytes
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
    if "pipeline.json" in foreign and read_json(path / "pipeline.json").keys() == {"sampling"}:
        foreign.remove("pipeline.json")  # of a student: it says how the model is sampled, no more
    config = read_json(path / "config.json") if "config.json" in models else {}
    if not path.is_dir() or foreign or (models and config.get("format") != FORMAT["format"]):
        raise UsageError(
            f"save: {path} must be a new folder, or one that holds only a model of this engine; "
            f"got {listed(foreign or models or names)}. Choose another folder."
        )
    return models
