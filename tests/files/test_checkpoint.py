"""Checkpoints: damage of any kind is found before a tensor is used, what does not fit is refused,
and a save is a copy that another thread writes."""

import json
import os
import random
import shutil
import threading
from pathlib import Path

import pytest
import torch
from checkpoint_runs import equal, fresh, loaded, make_shard, save_two, step, steps_in
from safetensors.torch import load_file
from tiny_training import same

from engine import checkpoint, train
from engine.checkpoint import commit
from engine.checkpoint.state import _tensors
from engine.errors import ModelFileError, NonFinite
from engine.parallel.liveness import Channel

MUTANTS = 500
TENSORS = "tensors-00000-of-00001.safetensors"


@pytest.fixture
def shard(tmp_path):
    return make_shard(tmp_path / "shard.safetensors")


@pytest.fixture
def saved(shard, tmp_path):
    return save_two(tmp_path / "run" / "checkpoint", shard)


def mutants(path: Path, kind: str):
    """(file, damaged bytes), each file in turn."""
    dice = random.Random(0)
    files = sorted(path.iterdir())
    whole = [file.read_bytes() for file in files]
    for i in range(MUTANTS):
        file, data = files[i % len(files)], bytearray(whole[i % len(files)])
        at = dice.randrange(len(data))
        if kind == "flip":
            data[at] ^= 1 << dice.randrange(8)
        yield file, data if kind == "flip" else data[:at], whole[i % len(files)]


@pytest.mark.parametrize("kind", ["flip", "truncation"])
def test_every_flipped_bit_and_truncation_is_found(saved, kind):
    path, missed = saved / "step-00000002", []
    for file, damaged, whole in mutants(path, kind):
        file.write_bytes(damaged)
        try:
            commit.verify(path)
            missed.append(file.name)
        except ModelFileError:
            file.write_bytes(whole)
    commit.verify(path)
    assert not missed


@pytest.mark.parametrize("damage", ["missing", "extra", "swapped", "renamed", "manifest"])
def test_other_files_than_those_written_are_found(saved, damage):
    old, new = saved / "step-00000001", saved / "step-00000002"
    if damage == "missing":
        (new / "state.json").unlink()
    elif damage == "extra":
        (new / "more").touch()
    elif damage == "swapped":
        shutil.copy(old / TENSORS, new)
    elif damage == "renamed":
        new = new.rename(saved / "step-00000003")
    else:
        (new / "manifest.json").write_text("[1, {}]")
    with pytest.raises(ModelFileError, match=f"{new.name}/.* must .*; got "):
        commit.verify(new)


def test_a_damaged_checkpoint_gives_way_to_the_last_good_one(saved, shard, tmp_path, capsys):
    file = saved / "step-00000002" / TENSORS
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    state = loaded(saved)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"step-00000002/{TENSORS} must" in line and "step-00000001 instead" in line
    checkpoint.save(step(state, shard, 3), saved)
    assert steps_in(saved) == ["step-00000001", "step-00000004"]  # the damaged one is no second
    assert loaded(saved).step == 4 and not capsys.readouterr().err


def test_a_run_goes_on_over_a_damaged_checkpoint_of_a_step_it_repeats(
    saved, shard, tmp_path, capsys
):
    (saved / "step-00000002" / "manifest.json").unlink()
    state = loaded(saved)
    assert "step-00000001 instead" in capsys.readouterr().err
    train.fit(state, shard, saved.parent, save_every=1, progress=False)
    assert not capsys.readouterr().err
    train.fit(fresh(), shard, tmp_path / "whole", progress=False)
    assert equal(loaded(saved), loaded(tmp_path / "whole" / "checkpoint"))
    assert steps_in(saved) == ["step-00000005", "step-00000006"]


def test_no_good_checkpoint_names_each(saved, tmp_path):
    for name in ("step-00000001", "step-00000002"):
        (saved / name / "state.json").write_text("{}")
    with pytest.raises(ModelFileError, match="00000002/state.json.* 2. .*00000001/state.json"):
        loaded(saved)
    (saved / "step-00000003.writing").mkdir()
    shutil.rmtree(saved / "step-00000001")
    shutil.rmtree(saved / "step-00000002")
    with pytest.raises(ModelFileError, match="got step-00000003.writing"):
        loaded(saved)
    with pytest.raises(ModelFileError, match="got nothing"):
        loaded(tmp_path / "nowhere")


@pytest.mark.parametrize("foreign", ["name", "missing", "shape", "dtype", "moment"])
def test_tensors_that_are_not_this_models_are_refused(saved, shard, foreign):
    tensors = load_file(saved / "step-00000002" / TENSORS)
    name = next(n for n in tensors if n.startswith("ema.") and tensors[n].ndim == 1)
    if foreign == "name":
        tensors["model.nonsense"] = torch.zeros(2)
        name = "model.nonsense"
    elif foreign == "missing":
        del tensors[name]
    elif foreign == "moment":
        name = name.replace("ema.", "exp_avg_sq.")
        del tensors[name]
    else:
        tensors[name] = tensors[name][:-1] if foreign == "shape" else tensors[name].half()

    record = json.loads((saved / "step-00000002" / "state.json").read_text())
    part = commit.FilePart(0, 1, tensors, {})
    commit.commit(saved, record | {"step": 3}, part, None, set(), Channel(), 1)

    state, untouched = fresh(), fresh()
    with pytest.raises(ModelFileError, match=name):
        checkpoint.load(state, saved)
    assert equal(state, untouched)


def test_other_settings_are_refused_not_passed_over(saved, capsys):
    with pytest.raises(ModelFileError, match="lr"):
        loaded(saved, lr=1e-3)
    assert not capsys.readouterr().err


def test_the_state_may_change_while_it_is_written_and_saves_never_overlap(
    shard, tmp_path, monkeypatch
):
    write, release, running, most = commit.commit, threading.Event(), [], []

    def slow(*args):
        running.append(args)
        release.wait(10)
        write(*args)
        most.append(len(running))
        running.pop()

    monkeypatch.setattr("engine.checkpoint.state.commit", slow)
    folder, state = tmp_path / "checkpoint", step(fresh(), shard)
    before = {name: x.clone() for name, x in _tensors(state).items()}
    threading.Timer(0.2, release.set).start()
    with checkpoint.Saver(folder) as saver:
        saver.save(state)
        assert running and not folder.exists()
        step(state, shard)
        assert not same(before, _tensors(state))
        saver.save(step(state, shard))
        assert same(before, load_file(folder / "step-00000001" / TENSORS))
        for _ in range(2):
            saver.save(step(state, shard))
    assert most == [1] * 4 and equal(loaded(folder), state)


def test_every_file_and_folder_is_synced_before_the_rename(shard, tmp_path, monkeypatch):
    """A kill loses nothing that the kernel has; a power cut does."""
    done, fsync, rename = [], os.fsync, Path.rename

    def synced(descriptor):
        done.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path, target):
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    checkpoint.save(step(fresh(), shard), tmp_path / "checkpoint")
    files = [TENSORS, "state.json", "manifest.json", "step-00000001.writing"]
    assert done == [tmp_path.name, *files, "rename", "checkpoint"]


def test_an_error_that_is_no_disks_ends_the_run(shard, tmp_path):
    state = step(fresh(), shard)
    state.skipped = state.skipped.to(torch.complex64)
    saver = checkpoint.Saver(tmp_path / "checkpoint")
    saver.save(state)
    with pytest.raises(KeyError, match="complex64"):
        saver.save(state)


@pytest.mark.parametrize("kind", ["model", "ema", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_never_saved(shard, saved, kind, value):
    """The last checkpoint stays the last, be it a setting or training that made the number."""
    state = step(loaded(saved), shard)
    name, tensor = [(k, x) for k, x in _tensors(state).items() if k.startswith(f"{kind}.")][-1]
    tensor.view(-1)[-1] = value

    with pytest.raises(NonFinite, match=f"got NaN or infinity in {name} and 0 more after step 3"):
        checkpoint.save(state, saved)
    assert steps_in(saved) == ["step-00000001", "step-00000002"]
