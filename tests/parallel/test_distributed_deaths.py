"""Many ranks: what any of them saves any number of others load, bit for bit; damage and full disks
are the same to all; a rank that dies is named, and the run goes on from its checkpoint."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
from pathlib import Path

import checkpoint_runs
import distributed_runs
import pytest
import torch.distributed as dist
from checkpoint_runs import equal, fresh, loaded, make_shard, metrics, steps_in
from distributed_runs import finish, keep, launch, made, must_hold, trained
from safetensors import safe_open

from engine import checkpoint, train
from engine.data import LatentSet
from engine.errors import ModelFileError, NonFinite
from engine.parallel import liveness
from engine.train import loop

KILLS = 2
FOUR = {"fsdp": (1, 4), "replicas": (2, 2), "sequence": (1, 2, 2)}
TWO = {"fsdp": (1, 2), "replicas": (2, 1), "sequence": (1, 1, 2)}
MUON = {"fsdp": {"muon_lr": 0.02}}  # a moment more
DAMAGE = ("flip 0", "flip 1", "truncate 1", "missing 1", "foreign", "state", "manifest")


@pytest.fixture(scope="module")
def forks():
    return checkpoint_runs.forks()


def changes(name: str) -> dict:
    return MUON.get(name.split("-")[0], {})


def save_at_four(world, path: Path):
    shard = LatentSet(path / "shard.safetensors")
    for name, mesh in FOUR.items():
        keep(made(world, mesh, **changes(name)), path / f"{name}-4", shard)
    load_all(world, path, FOUR)


def load_all(world, path: Path, meshes: dict):
    for name, mesh in meshes.items():
        state = made(world, mesh, **changes(name))
        for saved in sorted(path.glob("*-[14]")):
            if changes(name) == changes(saved.name):
                load_into(state, saved)


def load_into(state, folder: Path):
    checkpoint.load(state, folder)
    must_hold(state, folder)


def at_two(world, path: Path):
    load_all(world, path, TWO)
    damaged_at_two(world, path)
    limited_at_two(world, path)


def damage(folder: Path, what: str) -> None:
    kind, _, index = what.partition(" ")
    file = folder / f"tensors-{int(index or 0):05d}-of-00004.safetensors"
    if kind in ("state", "manifest"):
        file, kind = folder / f"{kind}.json", "truncate"
    if kind == "foreign":
        (folder / "more").touch()
    elif kind == "missing":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data[:-1] if kind == "truncate" else data)


def damaged_at_two(world, path: Path):
    state = made(world, TWO["sequence"])
    for what in DAMAGE:
        folder = path / f"damaged {what}"
        if world.rank == 0:
            shutil.copytree(path / "sequence-4", folder)
            damage(folder / "step-00000002", what)
            shutil.copy(path / "sequence-4.1.safetensors", f"{folder}.1.safetensors")
        dist.barrier()
        state.step = 9
        checkpoint.load(state, folder)
        must_hold(state, folder, step=1)
    if world.rank == 0:
        damage(folder / "step-00000001", "flip 1")
    dist.barrier()
    with pytest.raises(ModelFileError, match="00000002/manifest.json.*00000001/tensors-00001"):
        checkpoint.load(state, folder)
    must_hold(state, folder, step=1)
    sys.stderr.flush()


def limited_at_two(world, path: Path):
    """Rank 1 cannot write its file."""
    folder, shard = path / "limited", LatentSet(path / "shard.safetensors")
    state = trained(made(world, TWO["fsdp"]), shard, 1)
    checkpoint.save(state, folder)
    free = resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.Saver(folder, world) as saver:
        if world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, free[1]))
        saver.save(trained(state, shard, 1))
        with pytest.raises(OSError, match="rank 1") as caught:
            saver.wait()
        assert caught.value.errno == errno.EFBIG
        assert steps_in(folder) == ["step-00000001"]
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        late_at_two(world, saver, state)
        saver.save(trained(state, shard, 1))
    assert steps_in(folder) == ["step-00000001", "step-00000003"]


def late_at_two(world, saver, state):
    """Rank 1 lives, but comes after rank 0 has given up."""
    timeout, liveness.TIMEOUT = liveness.TIMEOUT, 0
    for rank in range(2):
        if world.rank == rank:
            saver.save(state)
            with pytest.raises(TimeoutError, match="no answer from rank 1"):
                saver.wait()
        dist.barrier()
    liveness.TIMEOUT = timeout


def test_any_world_loads_what_any_world_saved(tmp_path, forks):
    shard = make_shard(tmp_path / "shard.safetensors")
    keep(fresh(**changes("fsdp")), tmp_path / "fsdp-1", shard)
    keep(fresh(), tmp_path / "sequence-1", shard)
    errors = tmp_path / "errors"
    finish(launch(forks, errors, 4, save_at_four, tmp_path), errors)
    for name in FOUR:
        files = sorted((tmp_path / f"{name}-4" / "step-00000002").glob("tensors-*"))
        assert len(files) == (2 if name == "replicas" else 4)
        with safe_open(files[1], "pt") as other:
            assert not any("norm" in key for key in other.keys())  # noqa: SIM118
        load_into(fresh(**changes(name)), tmp_path / f"{name}-4")
    finish(launch(forks, errors, 2, at_two, tmp_path), errors)


def test_a_run_of_two_ranks_killed_at_random_moments_is_bit_equal_and_names_the_dead(
    tmp_path, forks
):
    seconds = distributed_runs.kills(forks, tmp_path, KILLS, random.Random(1))
    assert len(seconds) == KILLS and max(seconds) < 10


def fit_until_asked(world, folder: Path, shard: Path, at: int):
    """Rank 1 gets SIGTERM while it trains step `at`."""
    state, data = made(world, (1, -1), steps=6), LatentSet(shard)
    advanced = loop.train_step

    def asked(state, batch):
        if world.rank == 1 and state.step == at - 1:
            signal.raise_signal(signal.SIGTERM)
        return advanced(state, batch)

    loop.train_step = asked
    with pytest.raises(checkpoint.Interrupted, match=f"SIGTERM after step {min(at + 1, 6)};"):
        train.fit(state, data, folder, save_every=100, log_every=1, progress=False)


@pytest.mark.parametrize("at", [2, 6])
def test_what_one_rank_is_asked_stops_all_at_the_same_step(at, tmp_path, forks):
    """Also what it is asked in its last step."""
    data, errors = tmp_path / "shard.safetensors", tmp_path / "errors"
    make_shard(data)
    finish(launch(forks, errors, 2, fit_until_asked, tmp_path / "cut", data, at), errors)
    state = loaded(tmp_path / "cut" / "checkpoint")
    assert state.step == min(at + 1, 6)


def fail_on_one(world, what: str):
    """Rank 1 ends with an error of its own, or waits in a save for one that is dead."""
    if what == "own":
        if world.rank == 1:
            raise NonFinite("train: the loss must be finite; got nan.")
        dist.barrier()
    if world.rank == 2:
        os.kill(os.getpid(), 9)
    world.peers.patience = 1.5
    world.peers.channel().hear("anything")
    world.peers.channel().tell("never")


def test_a_rank_that_fails_is_named_with_its_error_and_one_that_dies_in_a_save(tmp_path, forks):
    finish(launch(forks, tmp_path / "own", 2, fail_on_one, "own"), tmp_path / "own", [1, 1])
    finish(launch(forks, tmp_path / "save", 3, fail_on_one, "save"), tmp_path / "save", [1, 1, -9])
    for rank, said in (
        (0, "parallel: rank 1 failed: train: the loss"),
        (1, "NonFinite: train: the"),
    ):
        last = (tmp_path / "own" / f"stderr{rank}").read_text().splitlines()[-1]
        assert said in last
    for rank in (0, 1):
        last = (tmp_path / "save" / f"stderr{rank}").read_text().splitlines()[-1]
        said = "engine.parallel.liveness.LostRank: parallel: rank 2 stopped responding. Start again"
        assert last.startswith(said)


def test_torchrun_restarts_a_run_that_lost_a_rank_bit_equal(tmp_path, forks):
    data, errors = tmp_path / "shard.safetensors", tmp_path / "errors"
    make_shard(data)
    errors.mkdir()
    agent = forks(distributed_runs.agent, errors, tmp_path / "cut", data, 5)
    agent.join(90)
    said = (errors / "stderr").read_text()
    assert agent.exitcode == 0, said
    assert "rank 1 stopped responding. Start again" in said
    finish(launch(forks, errors, 2, distributed_runs.fit_rank, tmp_path / "whole", data, 6), errors)
    written = [json.loads(line)["step"] for line in metrics(tmp_path / "cut")]
    assert written == [1, 2, 3, 4, 5, 6]
    whole, cut = (loaded(tmp_path / name / "checkpoint") for name in ("whole", "cut"))
    assert cut.step == 6 and equal(whole, cut)
