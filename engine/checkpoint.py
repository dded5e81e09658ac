"""Training state on disk: written beside, synced, then renamed into place, so a crash leaves the
old one or the new.

tensors.safetensors holds parameters, average and moments; state.json the step and the two
configurations.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.errors import ModelFileError

MOMENTS = ("exp_avg", "exp_avg_sq", "step", "momentum_buffer")


def _tensors(state) -> dict[str, torch.Tensor]:
    """Every tensor of the state under its name; moments exist from the first step on."""
    named = dict(state.model.named_parameters())
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.items()}
    for optimizer in state.optimizers:
        for name, p in named.items():
            moments = optimizer.state.get(p, {})
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    return tensors | {"skipped": state.skipped}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def save(state, path: Path) -> None:
    """Replaces the checkpoint folder `path`. The folder before it is removed only after the new one
    is in place."""
    fresh, old = path.with_name(path.name + ".writing"), path.with_name(path.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(
        {k: v.contiguous() for k, v in _tensors(state).items()}, fresh / "tensors.safetensors"
    )
    record = {"step": state.step, "train": asdict(state.config), "model": asdict(state.model.cfg)}
    (fresh / "state.json").write_text(json.dumps(record, indent=2))
    for file in (*fresh.iterdir(), fresh):
        _sync(file)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    _sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def load(state, path: Path) -> None:
    """Restores what `save` wrote into a state of the same model and configuration. Errors:
    ModelFileError."""
    if not path.exists() and path.with_name(path.name + ".old").exists():
        path = path.with_name(path.name + ".old")  # killed between the two renames
    try:
        record, tensors = (
            json.loads((path / "state.json").read_text()),
            load_file(path / "tensors.safetensors"),
        )
    except Exception as error:
        raise ModelFileError(
            f"checkpoint: {path} must be a whole checkpoint; got {error}."
        ) from error
    for what, ours in (("train", asdict(state.config)), ("model", asdict(state.model.cfg))):
        different = sorted(k for k in ours if record[what].get(k) != ours[k])
        if different:
            raise ModelFileError(
                f"checkpoint: {what} settings must be those of {path}; "
                f"got another {', '.join(different)}. "
                "Resume with the same flags, or choose another --output-path."
            )
    with torch.no_grad():
        for name, p in state.model.named_parameters():
            p.copy_(tensors[f"model.{name}"])
            state.ema[name].copy_(tensors[f"ema.{name}"])
        names = {p: name for name, p in state.model.named_parameters()}
        for optimizer in state.optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                saved = {key: tensors.get(f"{key}.{names[p]}") for key in MOMENTS}
                moments = {k: v.to(p.device) for k, v in saved.items() if v is not None}
                optimizer.state[p] = moments
        state.skipped.copy_(tensors["skipped"])
    state.step = record["step"]
