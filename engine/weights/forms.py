"""Forms of files in which models are published: which part of a torch file is the model, and which
forms are refused, each by its name and with the way out of it. Nothing is unpickled."""

import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelFileError, listed
from engine.weights.names import ANCHOR

NESTINGS = (  # keys under which trainers put a state dict, the preferred one first
    "generator_ema",
    "ema",
    "model_ema",
    "ema_model",
    "generator",
    "model",
    "state_dict",
    "module",
)
_DEEPEST = 4

_LORA_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
)

_FROM_DCP = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch {} model.pth"
_FROM_PICKLE = (
    'python -c "import torch; d = torch.load({!r}, weights_only=False, map_location={!r}); '
    "torch.save(d['model'], 'model.pth')\""
)
_FROM_LEGACY = (
    "python -c \"import torch; torch.save(torch.load({!r}, weights_only=True), 'model.pth')\""
)


@cache
def say(text: str) -> None:
    """Prints a notice on stderr, once in a process and on the first of several ranks alone."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(text, file=sys.stderr)


def refuse_file(path: Path) -> None:
    """Errors: ModelFileError for a GGUF file, by its first bytes or its name; OSError."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"GGUF" or path.suffix == ".gguf":
        raise _gguf_error(path)


def refuse_folder(path: Path) -> None:
    """Errors: ModelFileError for a folder whose files say that it is no model of ours to read."""
    names = sorted(os.listdir(path))
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        raise ModelFileError(
            f"{path}: must hold a model that can be read without running code; got a "
            "torch.distributed.checkpoint folder, whose .metadata is a pickle. If you trust it, "
            f"run {_FROM_DCP.format(path)} and pass model.pth."
        )
    if any(name in _LORA_FILES for name in names):
        raise adapter_error(path, [name for name in names if name in _LORA_FILES])
    if "checkpoint" in names and "config.json" not in names:
        raise ModelFileError(
            f"{path}: must hold a model; got the folder of a training run. "
            f"Pass {path / 'checkpoint'}, or {path / 'model'} once the run has ended."
        )
    quantised = [name for name in names if name.endswith(".gguf")]
    if quantised and not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise _gguf_error(path / quantised[0])


def adapter_error(path: Path, found: list[str]) -> ModelFileError:
    return ModelFileError(
        f"{path}: must hold a whole model; got a LoRA adapter ({listed(found)}). "
        f"Pass the model that it was made for, and the adapter beside it: --lora {path}"
    )


def _gguf_error(path: Path) -> ModelFileError:
    return ModelFileError(
        f"{path}: must hold floating-point tensors; got a GGUF file, quantised in blocks. "
        "Pass the safetensors file that it was made from, or let diffusers write one: "
        "WanTransformer3DModel.from_single_file(FILE, quantization_config="
        "GGUFQuantizationConfig(torch.bfloat16)).dequantize().save_pretrained(FOLDER)"
    )


def pickled_error(path: Path, error: Exception) -> ModelFileError:
    """What to do about a torch file that the reader which runs no code does not take."""
    with path.open("rb") as file:
        magic = file.read(4)
    what = f"{path}: must be an undamaged torch file (zip format) that holds only tensors; "

    if type(error).__name__ == "UnpicklingError" and magic[:2] == b"PK":
        kinds = re.findall(r"GLOBAL (\S+)", str(error)) or [type(error).__name__]
        way = _FROM_PICKLE.format(str(path), "cpu")
        return ModelFileError(
            f"{what}got pickled objects too ({listed(kinds)}). No code in it was run. If you "
            f"trust its author, run {way} with the key of the state dict, and pass model.pth."
        )
    if isinstance(error, RuntimeError) and "mmap can only be used" in str(error):
        return ModelFileError(
            f"{what}got torch's format before 1.6, or no torch file ({path.stat().st_size} bytes). "
            f"No code in it was run. Run {_FROM_LEGACY.format(str(path))} and pass model.pth."
        )
    return ModelFileError(
        f"{what}got {type(error).__name__}. No code in it was run. Download it again, or have its "
        "author save the state dict as safetensors."
    )


def state_dict_of(data: Any, path: Path) -> dict[str, Any]:
    """The state dict in what a torch file holds: at the top, or nested under one or several keys.

    Of several models the first in the order of NESTINGS is taken, averages before what they are
    averages of, and that is said once.

    Errors: ModelFileError where there is none, or several that no known key tells apart.
    """
    if not isinstance(data, dict):
        raise _no_state_dict(path, data)
    found = {} if _is_model(data) else dict(_models(data, ()))
    if not found:
        inner = next((data[key] for key in NESTINGS if key in data), data)
        if not isinstance(inner, dict):
            raise _no_state_dict(path, inner)
        return inner

    ranked = sorted(found, key=_rank)
    names = [".".join(keys) for keys in ranked]
    if len(ranked) > 1 and _rank(ranked[0]) == _rank(ranked[1]):
        raise ModelFileError(
            f"{path}: must hold one model, or known ones ({', '.join(NESTINGS)}); got "
            f"{listed(names)}. Save the state dict that you mean by itself."
        )
    if len(ranked) > 1:
        say(
            f"{path}: holds {listed(sorted(names))}; {names[0]} is read. "
            "To have another, save its state dict by itself."
        )
    return found[ranked[0]]


def _is_model(state: dict) -> bool:
    ends = ("." + ANCHOR, ANCHOR)
    return any(
        isinstance(key, str) and key.endswith(ends) and isinstance(value, torch.Tensor)
        for key, value in state.items()
    )


def _models(data: dict, above: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict]]:
    """(keys, state dict) of each model nested in `data`."""
    for key, value in data.items():
        if not isinstance(key, str) or not isinstance(value, dict):
            continue
        if _is_model(value):
            yield (*above, key), value
        elif len(above) < _DEEPEST:
            yield from _models(value, (*above, key))


def _rank(keys: tuple[str, ...]) -> int:
    return min((NESTINGS.index(key) for key in keys if key in NESTINGS), default=len(NESTINGS))


def _no_state_dict(path: Path, got: Any) -> ModelFileError:
    return ModelFileError(
        f"{path}: must hold a state dict, at the top or under {', '.join(NESTINGS)}; "
        f"got {type(got).__name__}. Save model.state_dict() instead."
    )
