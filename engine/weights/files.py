"""Model files without their meaning: inventories of what a file holds.

An inventory is every tensor's name, shape and dtype, taken from headers; data is read later, tensor
by tensor, through `Entry.read`. Sources: folders (one file, or shards with an index), safetensors
files, and torch files through the reader that unpickles no code. `engine.weights.forms` names the
forms that are not read. Anything wrong is a ModelFileError naming the file.
"""

import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import ModelFileError
from engine.media.parts import HUB_ID, find_folder
from engine.weights.forms import pickled_error, refuse_file, refuse_folder, state_dict_of
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

SAFETENSORS, TORCH = (".safetensors", ".sft"), (".pth", ".pt", ".bin", ".ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = (
    INDEX,
    SINGLE,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_BIN_FILES = (  # of older releases; read where there is no safetensors file beside them
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


@dataclass(frozen=True)
class Entry:
    """One tensor, not yet read: its key in the file, shape, safetensors dtype code, how to read."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


def find_model(path: str | Path) -> Path:
    """The file or folder `path`, or the folder of the model with this id in Hugging Face's cache.

    Errors: ModelFileError; MissingPackage where an id needs huggingface_hub.
    """
    path = Path(path)
    if path.exists():
        return path
    if path.suffix not in SAFETENSORS + TORCH and HUB_ID.fullmatch(str(path)):
        return find_folder(path)
    raise ModelFileError(
        f"{path}: the model path must be an existing folder or file; got neither. "
        "Check the spelling, or download the model first."
    )


def inventory(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A folder's or file's entries, and its config (config.json; of a safetensors, metadata)."""
    if path.is_dir():
        return _read_folder(path)
    with file_errors(path):
        refuse_file(path)
    if path.suffix in SAFETENSORS:
        entries, metadata = _read_safetensors(path)
        return entries, parse_json(metadata.get("config", "{}"), f"{path}: metadata config")
    if path.suffix in TORCH:
        return _read_torch(path), {}
    raise ModelFileError(
        f"{path}: a model file must end in {', '.join(SAFETENSORS + TORCH)}; "
        f"got {path.suffix!r}. Pass the folder or one of these files."
    )


def _read_folder(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    config_file = path / "config.json"
    if not config_file.is_file() and (path / "transformer").is_dir():
        return _read_folder(path / "transformer")

    refuse_folder(path)
    found = [name for name in _WEIGHT_FILES if (path / name).is_file()]
    found = found or [name for name in _BIN_FILES if (path / name).is_file()]
    if len(found) != 1:
        held = sorted(p.name for p in path.iterdir() if p.suffix in SAFETENSORS + TORCH)
        got = found or held
        raise ModelFileError(
            f"{path}: a model folder must hold exactly one of "
            f"{', '.join(_WEIGHT_FILES + _BIN_FILES)}; got {listed(got) or 'none'}. "
            "Pass a .safetensors, .pth or .bin file by its own name."
        )
    if not config_file.is_file() and found[0] in (SINGLE, INDEX):
        raise ModelFileError(
            f"{path}: the folder must hold config.json beside {found[0]}; got none. "
            "A save was interrupted; save or convert the model again."
        )
    config = read_json(config_file) if config_file.is_file() else {}
    if found[0].endswith(".json"):
        return _read_sharded(path / found[0]), config
    return _read_weights(path / found[0]), config


def _read_sharded(index: Path) -> dict[str, Entry]:
    """The entries of all shards; every shard must hold exactly the tensors that the index says."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelFileError(
            f"{index}: weight_map must map tensor names to file names; got something else. "
            "Download the index again."
        )
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]+\.(safetensors|bin)", file):
            raise ModelFileError(
                f"{index}: a shard must be the plain name of a .safetensors or .bin file beside "
                f"the index; got {file!r}. Do not use this index."
            )
        if not (index.parent / file).is_file():
            raise ModelFileError(
                f"{index}: every shard must be in the folder; got no {file}. Download it again."
            )

    entries: dict[str, Entry] = {}
    for file in files:
        shard = _read_weights(index.parent / file)
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


def _read_weights(path: Path) -> dict[str, Entry]:
    return _read_torch(path) if path.suffix in TORCH else _read_safetensors(path)[0]


def _read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    def read(key: str) -> torch.Tensor:
        with file_errors(path):
            return file.get_tensor(key)

    entries = {}
    with file_errors(path):
        file = safe_open(path, framework="pt")
        for key in file.keys():
            view = file.get_slice(key)
            entries[key] = Entry(key, tuple(view.get_shape()), view.get_dtype(), partial(read, key))
        return entries, file.metadata() or {}


def _read_torch(path: Path) -> dict[str, Entry]:
    """A torch file's entries: its state dict at the top, or in the nesting of a trainer."""
    _refuse_compressed(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on bad bytes the restricted unpickler raises a dozen types
        raise pickled_error(path, error) from error
    state = state_dict_of(data, path)
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ModelFileError(
                f"{path}: every value must be a dense tensor; got {key!r}: {type(value).__name__}. "
                "Save model.state_dict() under `model`."
            )
    return entries_of(state)


def _refuse_compressed(path: Path) -> None:
    """Errors: ModelFileError where a zip's member is compressed, as torch.save never does: a
    mebibyte could take gibibytes of memory before anything is known of it."""
    try:
        with file_errors(path), zipfile.ZipFile(path) as file:
            members = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no zip, or a damaged one: torch says so
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        largest = max(packed, key=lambda member: member.file_size)
        raise ModelFileError(
            f"{path}: must be as torch.save writes it, uncompressed; got {largest.filename} "
            f"of {largest.file_size} bytes in {largest.compress_size}. Do not use this file."
        )


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
    codes = {dtype: code for code, dtype in DTYPES.items()} | {torch.float8_e5m2: "F8_E5M2"}
    return {
        name: Entry(name, tuple(t.shape), codes.get(t.dtype, str(t.dtype)), t.detach)
        for name, t in tensors.items()
    }


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Errors: ModelFileError."""
    with file_errors(path):
        content = path.read_bytes()
    return parse_json(content, str(path))


def parse_json(content: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. Errors: ModelFileError, which begins with `what`."""
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
def file_errors(path: Path) -> Iterator[None]:
    """Turns what the file system and safetensors raise into a ModelFileError naming the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path}: must be complete, readable and, to save, writable; got {error}. "
            "Check space and permissions, or download it again."
        ) from error
