"""Runs of several ranks that save, load and die. As a program, `python tests/distributed_runs.py
30` kills a rank of two that often."""

import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from checkpoint_runs import equal, forks, fresh, loaded, make_shard, metrics
from safetensors.torch import load_file, save_file
from tiny_training import config, model
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

import engine
from engine import checkpoint, train
from engine.checkpoint.state import _parameter, _tensors
from engine.config import MeshConfig
from engine.data import LatentSet
from engine.parallel import World
from engine.parallel.liveness import LostRank

STEPS = 40


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def rank_main(errors: Path, rank: int, size: int, port: int, target, *args):
    """In a process of its own: target(world, ...), stderr in a file."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore that would outlive a kill
    sys.stderr = (errors / f"stderr{rank}").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = World.start(MeshConfig(), "cpu", timeout=60)
    with world.named_failures():
        target(world, *args)
    world.stop()


def launch(start, errors: Path, size: int, target, *args) -> list:
    """The processes of a world. start: of `checkpoint_runs.forks`."""
    errors.mkdir(exist_ok=True)
    at = port()
    return [start(rank_main, errors, r, size, at, target, *args) for r in range(size)]


def finish(processes: list, errors: Path, codes=None) -> None:
    for process in processes:
        process.join(90)
    found = [process.exitcode for process in processes]
    said = "".join(file.read_text() for file in sorted(errors.glob("stderr*")))
    assert found == (codes or [0] * len(processes)), (found, said)


def made(world, mesh, **changes):
    world = world and replace(world, config=MeshConfig(*MeshConfig(*mesh).shape(world.size)))
    return engine.TrainState.create(model(), config(**changes), world)


@torch.no_grad()
def whole(state) -> dict[str, torch.Tensor]:
    """All rows of every tensor of the state; every rank must call it."""
    tensors = _tensors(state)
    if state.sharding is None:
        return {name: x.clone() for name, x in tensors.items()}
    return {name: state.sharding.whole(_parameter(name), x).clone() for name, x in tensors.items()}


def trained(state, shard: LatentSet, steps: int):
    world = state.world
    share = (0, 1) if world is None else (world.data_rank, world.data_size)
    for _ in range(steps):
        indices = shard.indices(state.step, 4, state.config.seed, *share)
        engine.train_step(state, shard.batch(indices))
    return state


def keep(state, folder: Path, shard: LatentSet) -> None:
    """Saves steps 1 and 2, and beside them all that a load must find."""
    for step in (1, 2):
        checkpoint.save(trained(state, shard, 1), folder)
        tensors = whole(state)
        if state.world is None or state.world.rank == 0:
            save_file(tensors, folder.with_name(f"{folder.name}.{step}.safetensors"))


def must_hold(state, folder: Path, step: int = 2) -> None:
    reference = load_file(folder.with_name(f"{folder.name}.{step}.safetensors"))
    found = whole(state)
    assert state.step == step and found.keys() == reference.keys()
    different = [name for name in found if not torch.equal(found[name], reference[name])]
    assert not different, different


def fit_rank(world, folder: Path, shard: Path, steps: int, die_at: int = 0):
    """Trains, resumed from what the folder holds. die_at: the step before which rank 1 kills
    itself, in torchrun's first attempt."""
    state, data = made(world, (1, -1), steps=steps), LatentSet(shard)
    checkpoint.load(state, folder / "checkpoint", required=False)
    first, batch = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0", data.batch

    def dying(indices):
        dying.calls += 1
        if first and world.rank == 1 and dying.calls == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(indices)

    dying.calls, data.batch = 0, dying
    train.fit(state, data, folder, 1, log_every=1, progress=False)


def kills(start, path: Path, count: int, dice: random.Random) -> list[float]:
    """Kills one of two ranks `count` times, at random moments, and resumes; every run that comes to
    its end must be bit-equal to one that was left alone. -> seconds until the other rank ended."""
    make_shard(path / "shard.safetensors")
    errors, target = path / "errors", (fit_rank, path / "whole", path / "shard.safetensors", STEPS)
    finish(launch(start, errors, 2, *target), errors)
    reference = loaded(path / "whole" / "checkpoint", steps=STEPS)
    assert reference.step == STEPS

    seconds, inside, ends, folder = [], 0, 0, path / "cut0"
    while len(seconds) < count or ends == 0:
        before = len(metrics(folder))
        ranks = launch(start, errors, 2, fit_rank, folder, path / "shard.safetensors", STEPS)
        while len(metrics(folder)) == before and all(rank.is_alive() for rank in ranks):
            time.sleep(0.002)

        if len(seconds) < count:
            time.sleep(dice.uniform(0, 0.3))
            dead = dice.randrange(2)
            ranks[dead].kill()
            since = time.monotonic()
        for rank in ranks:
            rank.join(60)
        took, codes = time.monotonic() - since, [rank.exitcode for rank in ranks]
        if -signal.SIGKILL in codes:
            seconds.append(took)
            inside += any(folder.glob("checkpoint/*ing"))
            said = (errors / f"stderr{1 - dead}").read_text()
            assert f"rank {dead} stopped responding" in said or codes[1 - dead] == 0, said

        state = fresh(steps=STEPS)
        # Nothing is there where the first save was killed.
        checkpoint.load(state, folder / "checkpoint", required=False)
        if state.step == STEPS:
            assert equal(reference, state)
            ends, folder = ends + 1, path / f"cut{ends + 1}"

    print(
        f"{count} kills, {inside} of them inside a save, {ends} runs to the end, bit-equal; the "
        f"other rank ended within {max(seconds):.1f} s"
    )
    return seconds


def agent(errors: Path, folder: Path, shard: Path, die_at: int):
    """What `torchrun --nproc-per-node 2 --max-restarts 1` runs, its store included, which outlives
    an attempt; but the ranks are forked from this process, which spares them their imports."""
    sys.stderr = (errors / "stderr").open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 2)
    settings = LaunchConfig(
        1,
        1,
        2,
        run_id="test",
        rdzv_backend="static",
        rdzv_endpoint=f"127.0.0.1:{port()}",
        rdzv_configs={"rank": 0},
        max_restarts=1,
        start_method="fork",
    )
    elastic_launch(settings, agent_rank)(folder, shard, die_at)


def agent_rank(folder: Path, shard: Path, die_at: int):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    world = World.start(MeshConfig(), "cpu", timeout=60)
    try:
        with world.named_failures():
            fit_rank(world, folder, shard, 6, die_at)
    except LostRank as error:
        print(error, file=sys.stderr)
        raise
    world.stop()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as path:
        kills(forks(), Path(path), int(sys.argv[1]), random.Random(0))
