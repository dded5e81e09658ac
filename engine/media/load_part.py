"""Modules of ours, filled from the safetensors files that diffusers and transformers wrote.

Loading is strict: a file holds exactly the tensors that its configuration asks for, in the folder
itself. Nothing in the folder is run or unpickled.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from engine.errors import ModelFileError

STEMS = "model", "diffusion_pytorch_model"
SHARD = re.compile(r"[\w.-]+\.safetensors")
FLOATS = torch.float64, torch.float32, torch.float16, torch.bfloat16


def load_part(
    make: Callable[[dict], nn.Module],
    folder: Path,
    device: torch.device | str,
    dtype_of: Callable[[str], torch.dtype],
    keys_of: Callable[[str], tuple[str, ...]] = lambda name: (name,),
) -> nn.Module:
    """The frozen module that `make` builds from config.json, with the folder's weights.

    make: from the fields of config.json.
    folder: holds config.json and one .safetensors file, or shards and their index.
    device: where the weights go, tensor by tensor.
    dtype_of: a parameter's dtype by its name.
    keys_of: the names by which a file may hold a parameter, by its name; equal, where it has
        several.

    Errors: ModelFileError for what is absent, damaged, missing, unexpected, of another shape or no
        floating-point number, and for a shard outside the folder.
    """
    module = on_meta(make, folder)
    state, tensors = module.state_dict(), read_tensors(folder)
    found = {name: [key for key in keys_of(name) if key in tensors] for name in state}

    missing = [keys_of(name)[0] for name, keys in found.items() if not keys]
    unexpected = sorted(tensors.keys() - {key for keys in found.values() for key in keys})
    if missing or unexpected:
        first = f"no {missing[0]}" if missing else f"{unexpected[0]} besides"
        raise ModelFileError(
            f"{folder.name}: {folder} must hold the weights of its config.json and no others; got "
            f"{first} ({len(missing)} missing, {len(unexpected)} unexpected). "
            "Download the folder again."
        )

    for name, keys in found.items():
        tensor = read_alike(folder, keys, tensors, state[name].shape)
        state[name] = tensor.to(device, dtype_of(name), copy=True)  # it reads a mapped file
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def on_meta(make: Callable[[dict], nn.Module], folder: Path) -> nn.Module:
    """The module of the folder's configuration, without weights. Errors: ModelFileError."""
    config = read_json(folder / "config.json")
    faults = LookupError, AttributeError, TypeError, ValueError, ArithmeticError, RuntimeError
    try:
        with torch.device("meta"):
            return make(config)
    except ModelFileError:
        raise
    except faults as error:
        raise ModelFileError(
            f"{folder.name}: {folder / 'config.json'} must state the architecture; "
            f"got {type(error).__name__}: {error}. Download the folder again."
        ) from error


def read_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of the folder, by its key. Errors: ModelFileError."""
    tensors: dict[str, Callable[[], Tensor]] = {}
    for file, keys in weight_files(folder).items():
        with file_errors(file):
            shard = safe_open(file, framework="pt")
            held = set(shard.keys())
        if keys is not None and keys != held:
            raise ModelFileError(
                f"{folder.name}: {file} must hold what its index says; got "
                f"{sorted(keys ^ held)[0]} in one of them alone. Download both again."
            )
        tensors |= {key: reader(file, shard, key) for key in held}
    return tensors


def reader(file: Path, shard, key: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with file_errors(file):
            return shard.get_tensor(key)

    return read


def read_alike(
    folder: Path, keys: list[str], tensors: dict[str, Callable[[], Tensor]], shape: torch.Size
) -> Tensor:
    """The tensor of these keys. Errors: ModelFileError."""
    tensor = tensors[keys[0]]()
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise ModelFileError(
            f"{folder.name}: {keys[0]} in {folder} must be floats {list(shape)}, as the config "
            f"says; got {tensor.dtype} {list(tensor.shape)}. Download the folder again."
        )
    for key in keys[1:]:
        if not torch.equal(tensor, tensors[key]()):
            raise ModelFileError(
                f"{folder.name}: {key} in {folder} must equal {keys[0]}; got other numbers. "
                "Download the folder again."
            )
    return tensor


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """The folder's .safetensors file, or its shards with the keys that their index gives each."""
    for stem in STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return shards(index)
        if single.is_file():
            return {single: None}
    raise ModelFileError(
        f"{folder.name}: {folder} must hold {' or '.join(f'{stem}.safetensors' for stem in STEMS)}"
        ", whole or in shards with an index; got neither. Download the folder again."
    )


def shards(index: Path) -> dict[Path, set[str]]:
    places = read_json(index).get("weight_map")
    plain = isinstance(places, dict) and all(isinstance(p, str) for p in places.values())
    outside = [p for p in places.values() if not SHARD.fullmatch(p)] if plain else ["no weight_map"]
    if outside:
        raise ModelFileError(
            f"{index.parent.name}: {index} must map every weight to the plain name of a "
            f".safetensors file beside it; got {outside[0]!r}. Do not use this folder."
        )
    files: dict[Path, set[str]] = {}
    for key, place in places.items():
        files.setdefault(index.parent / place, set()).add(key)
    return files


def read_json(path: Path) -> dict:
    """A JSON object. Errors: ModelFileError."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error
    if not isinstance(found, dict):
        raise unreadable(path, f"a {type(found).__name__} in place of an object")
    return found


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns what reading raises into a ModelFileError that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, found: object) -> ModelFileError:
    line = " ".join(str(found).split())
    return ModelFileError(
        f"{path.parent.name}: {path} must be complete and readable; got {line[:160]}. "
        "Download the folder again."
    )
