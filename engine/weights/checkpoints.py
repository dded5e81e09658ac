"""A training checkpoint as a source of weights: found, checked, its parameters as entries.

See `engine.checkpoint.commit` for the files, which are made there.
"""

import hashlib
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from engine.errors import ModelFileError
from engine.files.reading import file_errors, read_bytes, read_json
from engine.files.tensors import Entry
from engine.weights.forms import say
from engine.weights.names import stock_names

FORMAT = 2
SCORE = "score."  # begins the names of what stage distill trains beside the model


def steps(folder: Path) -> dict[int, Path]:
    """The committed checkpoints by step, the newest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(n[5:]): folder / n for n in names if re.fullmatch(r"step-\d{8,}", n)}
    return dict(sorted(found.items(), reverse=True))


def as_text(record: dict) -> bytes:
    """A record as a checkpoint spells it."""
    return (json.dumps(record, indent=2) + "\n").encode()


def verify(path: Path, rank: int = 0, ranks: int = 1) -> None:
    """Reads every byte of one checkpoint, or this rank's share of its files. Errors: ModelFileError
    that names what is damaged."""

    def damaged(what: str, rule: str, got: object) -> ModelFileError:
        return ModelFileError(f"checkpoint: {path.name}/{what} must {rule}; got {got}.")

    try:
        written = read_bytes(path / "manifest.json")
        manifest = json.loads(written)
        files = manifest["files"]
        expected = {"format": FORMAT, "step": int(path.name[5:]), "files": files}
        if manifest != expected or written != as_text(manifest):
            raise ValueError("another format, step or spelling")
        present = sorted(os.listdir(path))
        if present != sorted([*files, "manifest.json"]):
            raise damaged("", "hold what its manifest lists", ", ".join(present))
        for name in sorted(files)[rank::ranks]:
            entry, size = files[name], (path / name).stat().st_size
            if size != entry["size"]:
                raise damaged(name, f"have {entry['size']} bytes", size)
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise damaged(name, "have the SHA-256 of its manifest", "another")
    except ModelFileError:
        raise
    except OSError as error:
        raise damaged(Path(error.filename or "").name, "be readable", error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged("manifest.json", "be as it was written", error) from error


def damage(path: Path) -> str:
    """What `verify` finds in one checkpoint, as text; "" where it is whole."""
    try:
        verify(path)
        return ""
    except ModelFileError as error:
        return str(error)


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, or the folder of a run's checkpoints."""
    both = (path / "state.json").is_file() and (path / "manifest.json").is_file()
    return both or bool(steps(path))


def is_partial(path: Path) -> bool:
    """Whether it is one, of a run that trained adapters or froze layers: it holds a part of the
    model. Hashes are not checked."""
    step = next(iter(steps(path).values()), path)
    return is_checkpoint(path) and bool(read_json(step / "state.json").get("base"))


def newest(path: Path) -> Path:
    """The checkpoint `path`, or the newest of a folder of them whose hashes are right; damaged ones
    that it passes over are named on stderr. Errors: ModelFileError."""
    found = list(steps(path).values())
    if not found:
        verify(path)
        return path

    damaged = []
    for step in found:
        if text := damage(step):
            damaged.append(text)
            continue
        if damaged:
            say(f"{' '.join(damaged)} {step} is read instead.")
        return step
    raise ModelFileError(
        f"{path}: must hold a whole checkpoint; got {' '.join(damaged)} "
        "Pass the model that the run saved."
    )


def read_record(path: Path) -> dict[str, Any]:
    """What a checkpoint says beside its tensors: its step, both configurations, what the run began
    with.

    path: one checkpoint, whose hashes are right.
    """
    return json.loads((path / "state.json").read_text())


def read_checkpoint(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A checkpoint's parameters under stock names, averaged where the run keeps an average, and the
    fields of its ModelConfig.

    path: a checkpoint, or a folder of them, of which the newest whole one is read.

    Errors: ModelFileError for a damaged one, and for one of a run that trained a part of a model,
    for the other part is not in it.
    """
    step = newest(path)
    record = read_record(step)
    if record["base"]:
        raise ModelFileError(
            f"{step}: must hold all parameters of a model; got those of adapters, or what was not "
            f"frozen. Run univigu convert --model-path {path} --output-path MODEL"
        )

    with file_errors(step):
        files = [safe_open(file, framework="pt") for file in sorted(step.glob("*.safetensors"))]
        names = set(files[0].keys())
        kind = "ema." if any(name.startswith("ema.") for name in names) else "model."
        entries: dict[str, Entry] = {}
        for name in sorted(names):
            if name.startswith(kind) and not name.startswith(kind + SCORE):
                split = name.removeprefix(kind) in record["rows"]
                entries |= _entries(name, kind, files if split else files[:1])
    return entries, record["model"]


def _entries(name: str, kind: str, files: list) -> dict[str, Entry]:
    """A parameter's stock tensors. files: those that have its rows, in order."""
    shapes = [file.get_slice(name).get_shape() for file in files]
    parts = stock_names(name.removeprefix(kind))
    dtype = files[0].get_slice(name).get_dtype()

    def read(part: int) -> torch.Tensor:
        pieces = [file.get_tensor(name) for file in files]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        return whole.chunk(len(parts))[part]

    rows = sum(shape[0] for shape in shapes) // len(parts) if shapes[0] else 0
    shape = (rows, *shapes[0][1:]) if shapes[0] else ()
    return {stock: Entry(stock, shape, dtype, partial(read, i)) for i, stock in enumerate(parts)}
