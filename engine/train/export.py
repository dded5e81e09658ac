"""The model in the checkpoint of a run that trained a part of it: adapters, or what it did not
freeze. What the run began with is made or loaded again, and must be the same, bit for bit.

A checkpoint that holds all parameters needs none of this: `engine.weights` reads it as it is.
"""

from copy import deepcopy
from pathlib import Path

import torch

from engine.checkpoint.state import restore
from engine.config import ModelConfig, TrainConfig
from engine.errors import ModelFileError
from engine.model import UniViGU
from engine.parallel.liveness import Channel
from engine.train.step import TrainState
from engine.weights import load_model
from engine.weights.checkpoints import SCORE, newest, read_record


def trained_model(
    path: str | Path, base: str | Path | None = None, verify: bool = False
) -> UniViGU:
    """The model of a checkpoint in fp32 on the CPU, averaged where the run keeps an average, its
    adapters merged.

    path: a checkpoint, or a folder of them, of which the newest whole one is read.
    base: the model that the run began with, where it is no longer where it was.
    verify: compare its bytes with its hashes, as `load_model` does.

    Errors: ModelFileError.
    """
    step = newest(Path(path))
    record = read_record(step)
    config = TrainConfig(**record["train"])
    model = _begun_with(record, step, base, config.seed, verify)
    if not record["model"]["video_sees_text"]:
        model.hide_text_from_video()

    teacher = None
    if config.matching:  # never run; what is restored beside the model has its form
        teacher = UniViGU(ModelConfig(**record["networks"][SCORE]), dtype=model.dtype)
    elif config.stage == "distill":
        teacher = deepcopy(model)  # never run
    state = TrainState.create(model, config, teacher=teacher)
    state.teacher = record.get("teacher", "")
    restore(state, step, Channel())
    return state.ema_model(torch.float32)


def _begun_with(
    record: dict, step: Path, base: str | Path | None, seed: int, verify: bool
) -> UniViGU:
    origin = record.get("origin", {})
    dtype = getattr(torch, origin.get("dtype", "float32"))
    source = base or origin.get("init_from")
    if source is None and "preset" not in origin:
        raise ModelFileError(
            f"{step}: the model that the run began with must be known, for the checkpoint holds "
            "what was trained alone; got none. Name it: --base PATH"
        )

    if source is not None and not base and not Path(source).exists():
        raise ModelFileError(
            f"{step}: the model that the run began with must be at {source}; got none there. "
            "Name its new place: --base PATH"
        )
    if source is not None:
        return load_model(source, dtype=dtype, precision="bf16", verify=verify)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UniViGU(ModelConfig.preset(origin["preset"]), dtype=dtype)
