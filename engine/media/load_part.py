"""Modules of ours, filled from the safetensors files that diffusers and transformers wrote.

Loading is strict: a file holds exactly the tensors that its configuration asks for, in the folder
itself. Nothing in the folder is run or unpickled.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from engine.errors import ModelFileError
from engine.files.manifest import check_sizes
from engine.files.reading import about, read_json
from engine.files.tensors import Entry, check_finite, read_safetensors, read_sharded

STEMS = "model", "diffusion_pytorch_model"
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

    Errors: ModelFileError for what is absent, damaged, missing, unexpected, of another shape, no
        floating-point number or none that is finite, and for a shard outside the folder.
    """
    module = on_meta(make, folder)
    with about(folder.name):
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
        check_finite(state[name], keys[0], folder)
    with about(folder.name):
        check_sizes(folder)
    module.load_state_dict(state, assign=True)
    return module.eval().requires_grad_(False)


def on_meta(make: Callable[[dict], nn.Module], folder: Path) -> nn.Module:
    """The module of the folder's configuration, without weights. Errors: ModelFileError."""
    file = folder / "config.json"
    with about(folder.name):
        config = read_json(file)
    try:
        if config.get("quantization_config"):
            raise ModelFileError("quantization_config must be left out: it is not followed.")
        with torch.device("meta"):
            return make(config)
    except (ModelFileError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise ModelFileError(
            f"{folder.name}: {file} must state the architecture: {line}"
        ) from error


def read_tensors(folder: Path) -> dict[str, Entry]:
    """The tensors of the folder, by their keys. Errors: ModelFileError."""
    for stem in STEMS:
        index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return read_sharded(index)
        if single.is_file():
            return read_safetensors(single)[0]
    raise ModelFileError(
        f"{folder}: must hold {' or '.join(f'{stem}.safetensors' for stem in STEMS)}, whole or in "
        "shards with an index; got neither. Download the folder again."
    )


def read_alike(
    folder: Path, keys: list[str], tensors: dict[str, Entry], shape: torch.Size
) -> Tensor:
    """The tensor of these keys. Errors: ModelFileError."""
    tensor = tensors[keys[0]].read()
    if tensor.shape != shape or tensor.dtype not in FLOATS:
        raise ModelFileError(
            f"{folder.name}: {keys[0]} in {folder} must be floats {list(shape)}, as its "
            f"config.json says; got {tensor.dtype} {list(tensor.shape)}. Download the folder again."
        )
    for key in keys[1:]:
        if not torch.equal(tensor, tensors[key].read()):
            raise ModelFileError(
                f"{folder.name}: {key} in {folder} must equal {keys[0]}; got other numbers. "
                "Download the folder again."
            )
    return tensor
