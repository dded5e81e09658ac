"""Tiny training runs of the checkpoint tests, and the processes that they die in."""

import os
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_training import config, distilling, lively, model, same
from tqdm import tqdm

import engine
from engine import checkpoint, train
from engine.checkpoint import commit
from engine.checkpoint.state import _tensors
from engine.data import LatentSet
from engine.train import distill, trajectories


def make_shard(path: Path, width: int = 8) -> LatentSet:
    g = torch.Generator().manual_seed(0)
    rows = (12, 7)
    tensors = {
        "latents": torch.randn(12, 16, 2, 4, 4, generator=g).half(),
        "prompt_tokens": torch.randint(37, rows, generator=g),
        "prompt_lengths": torch.randint(2, 7, (12,), generator=g),
        "caption_tokens": torch.randint(37, rows, generator=g),
        "context_index": torch.randint(3, (12,), generator=g),
        "contexts": torch.randn(3, 5, width, generator=g),
        "null_context": torch.randn(5, width, generator=g),
    }
    save_file(tensors, path, {"info": "{}"})
    return LatentSet(path)


def fresh(**changes):
    """A new state; of stage distill with a teacher that is as the student, and with matching, so
    that there is a second network to lose."""
    if changes.get("stage") != "distill":
        return engine.TrainState.create(model(), config(**changes))
    return engine.TrainState.create(lively(), distilling(matching=0.5, **changes), teacher=lively())


def loaded(folder: Path, **changes):
    state = fresh(**changes)
    checkpoint.load(state, folder)
    return state


def step(state, shard, count=1):
    for _ in range(count):
        indices = shard.indices(state.step, 4, state.config.seed)
        engine.train_step(state, shard.batch(indices))
    return state


def equal(a, b) -> bool:
    ours, theirs = _tensors(a), _tensors(b)
    return a.step == b.step and ours.keys() == theirs.keys() and same(ours, theirs)


def fit(folder: Path, shard: Path, steps: int, save_every: int = 1, stage: str = "refine"):
    """A run in a process of its own, resumed from what the folder holds."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that would outlive a kill
    state = fresh(steps=steps, stage=stage)
    if commit.steps(folder / "checkpoint"):
        checkpoint.load(state, folder / "checkpoint")
    train.fit(state, LatentSet(shard), folder, save_every, log_every=1, progress=False)


def write_ahead(folder: Path, shard: Path, steps: int):
    """A teacher's trajectories, two training steps in a folder, each in 50 ms at the least."""
    torch.set_num_threads(1)
    trajectories.MOST_SAMPLES = 8

    def slowly(asked: list[int]):
        for number in asked:
            time.sleep(0.05)
            yield number

    how = distilling(student_steps=(4, 2), steps=steps)
    distill.write_ahead(lively(), LatentSet(shard), how, folder, slowly)


def save_two(folder: Path, shard: LatentSet) -> Path:
    """The folder of a run that saved its steps 1 and 2."""
    state = fresh()
    for _ in range(2):
        checkpoint.save(step(state, shard), folder)
    return folder


def steps_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics(folder: Path) -> list[str]:
    file = folder / "metrics.jsonl"
    return file.read_text().splitlines() if file.exists() else []


def forks():
    """start(target, *arguments) -> Process, forked from one that has imported the engine."""
    context = get_context("forkserver")
    modules = ["test_checkpoint_deaths", "pytest", "engine.cli.commands", "torch._dynamo"]
    modules += ["checkpoint_runs"]
    context.set_forkserver_preload(modules)

    def start(target, *args):
        process = context.Process(target=target, args=args)
        process.start()
        return process

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("OMP_NUM_THREADS", "1")
        start(int).join()
    return start
