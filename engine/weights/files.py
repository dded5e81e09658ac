"""Model files without their meaning: inventories of what a file holds, and our folder's form.

An inventory is every tensor's name, shape and dtype, taken from headers; data is read later, tensor
by tensor, through `Entry.read`. Sources: folders (one file, or shards with an index), .safetensors
files, and torch .pth files with weights_only. Anything wrong is a ModelFileError naming the file.
"""

import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from engine.errors import ModelFileError, UsageError
from engine.weights.names import listed

FORMAT = {"format": "univigu", "format_version": 1}
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CODES = {dtype: code for code, dtype in FLOATS.items()}
FP8_CODE = "F8_E4M3"
DTYPES = FLOATS | {FP8_CODE: torch.float8_e4m3fn}

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = (
    _INDEX,
    _SINGLE,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_OUR_FILES = r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"


@dataclass(frozen=True)
class Entry:
    """One tensor, not yet read: its key in the file, shape, safetensors dtype code, how to read."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def inventory(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A folder's or file's entries, and its config (config.json; of a .safetensors, metadata)."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ModelFileError(
            f"{path}: the model path must be an existing folder or file; got neither. "
            "Check the spelling, or download the model first."
        )
    if path.suffix == ".safetensors":
        entries, metadata = _read_safetensors(path)
        return entries, _parse_json(metadata.get("config", "{}"), f"{path}: metadata config")
    if path.suffix in (".pth", ".pt"):
        return _read_torch(path), {}
    raise ModelFileError(
        f"{path}: a model file must end in .safetensors, .pth or .pt; got {path.suffix!r}. "
        "Pass the folder or one of these files."
    )


def _read_folder(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    config_file = path / "config.json"
    if not config_file.is_file() and (path / "transformer").is_dir():
        return _read_folder(path / "transformer")
    found = [name for name in _WEIGHT_FILES if (path / name).is_file()]
    if len(found) != 1:
        raise ModelFileError(
            f"{path}: a model folder must hold exactly one of {', '.join(_WEIGHT_FILES)}; "
            f"got {listed(found) or 'none'}. Pass a .pth or .safetensors file by its own name."
        )
    if not config_file.is_file() and found[0] in (_SINGLE, _INDEX):
        raise ModelFileError(
            f"{path}: the folder must hold config.json beside {found[0]}; got none. "
            "A save was interrupted; save or convert the model again."
        )
    config = _read_json(config_file) if config_file.is_file() else {}
    if found[0].endswith(".json"):
        return _read_sharded(path / found[0]), config
    return _read_safetensors(path / found[0])[0], config


def _read_sharded(index: Path) -> dict[str, Entry]:
    """The entries of all shards; every shard must hold exactly the tensors that the index says."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelFileError(
            f"{index}: weight_map must map tensor names to file names; got something else. "
            "Download the index again."
        )
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ModelFileError(
                f"{index}: a shard must be the plain name of a .safetensors file beside the index; "
                f"got {file!r}. Do not use this index."
            )
        if not (index.parent / file).is_file():
            raise ModelFileError(
                f"{index}: every shard must be in the folder; got no {file}. Download it again."
            )
    entries: dict[str, Entry] = {}
    for file in files:
        shard, _ = _read_safetensors(index.parent / file)
        said = {name for name, where in weight_map.items() if where == file}
        if shard.keys() != said:
            raise ModelFileError(
                f"{index.parent / file}: a shard must hold exactly what the index says; "
                f"got missing: {listed(sorted(said - shard.keys())) or 'none'}, "
                f"unexpected: {listed(sorted(shard.keys() - said)) or 'none'}. "
                "Download index and shards from one version."
            )
        entries |= shard
    return entries


def _read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    def read(key: str) -> torch.Tensor:
        with _file_errors(path):
            return file.get_tensor(key)

    entries = {}
    with _file_errors(path):
        file = safe_open(path, framework="pt")
        for key in file.keys():
            view = file.get_slice(key)
            entries[key] = Entry(key, tuple(view.get_shape()), view.get_dtype(), partial(read, key))
        return entries, file.metadata() or {}


def _read_torch(path: Path) -> dict[str, Entry]:
    """A torch file's entries: the state dict under `model`, or at the top as in original Wan."""
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on bad bytes the restricted unpickler raises a dozen types
        raise ModelFileError(
            f"{path}: must be an undamaged torch file (zip format) that holds only tensors; "
            f"got {type(error).__name__}. No code in it was run. Download it again, or have its "
            "author save the state dict as safetensors."
        ) from error
    state = data.get("model", data) if isinstance(data, dict) else data
    if not isinstance(state, dict):
        raise ModelFileError(
            f"{path}: must hold a state dict, at the top or under `model`; "
            f"got {type(state).__name__}. Save model.state_dict() instead."
        )
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ModelFileError(
                f"{path}: every value must be a dense tensor; got {key!r}: {type(value).__name__}. "
                "Save model.state_dict() under `model`."
            )
    return entries_of(state)


def _is_plain(value: object) -> bool:
    """A dense tensor whose storage holds all its elements; an expanded view costs no bytes."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def entries_of(tensors: dict[str, torch.Tensor]) -> dict[str, Entry]:
    """Tensors that are at hand, as entries."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    return {
        name: Entry(name, tuple(t.shape), codes.get(t.dtype, str(t.dtype)), t.detach)
        for name, t in tensors.items()
    }


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
    with _file_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as new:
            shards = _shards(entries, dtypes, max_shard_bytes)
            for file, names in shards.items():
                tensors = {n: entries[n].read().to("cpu", dtypes[n]).contiguous() for n in names}
                metadata = {"format": "pt", "config": json.dumps(config)}
                save_file(tensors, Path(new, file), metadata)
            documents = {"config.json": FORMAT | config}
            if len(shards) > 1:
                weight_map = {name: file for file, names in shards.items() for name in names}
                documents = {_INDEX: {"metadata": {}, "weight_map": weight_map}, **documents}
            for file, content in documents.items():
                Path(new, file).write_text(json.dumps(content, indent=2) + "\n")
            for file in (files := [*shards, *documents]):
                _sync(Path(new, file))
            for file in old:
                (path / file).unlink()
            for file in files:
                os.replace(Path(new, file), path / file)
        _sync(path)


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
        return {_SINGLE: groups[0]}
    count = len(groups)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": g for i, g in enumerate(groups, 1)}


def _replaceable(path: Path) -> list[str]:
    """Our files in `path`, config.json first. UsageError when it is a file or has another model."""
    if not path.exists():
        return []
    names = sorted(os.listdir(path)) if path.is_dir() else [path.name]
    models = [n for n in names if n.endswith((".json", ".safetensors")) or n == "transformer"]
    foreign = [n for n in models if not re.fullmatch(_OUR_FILES, n)]
    config = _read_json(path / "config.json") if "config.json" in models else {}
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


def _read_json(path: Path) -> dict[str, Any]:
    with _file_errors(path):
        content = path.read_bytes()
    return _parse_json(content, str(path))


def _parse_json(content: str | bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what}: must be JSON; got {error}. Download it again.") from error
    if not isinstance(parsed, dict):
        raise ModelFileError(
            f"{what}: must be a JSON object; got {type(parsed).__name__}. Download it again."
        )
    return parsed


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    """Turns what the file system and safetensors raise into a ModelFileError naming the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path}: must be complete, readable and, to save, writable; got {error}. "
            "Check space and permissions, or download it again."
        ) from error
