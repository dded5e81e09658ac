"""A run may die at any moment, on any disk: what is loaded is whole, and the resumed run is
bit-equal to one that nothing happened to.

Deaths are real: a process is forked from one that has the engine imported, runs, and is killed.
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import checkpoint_runs
import pytest
import torch
from checkpoint_runs import equal, fit, fresh, loaded, make_shard, metrics, save_two, step, steps_in
from safetensors.torch import load_file
from tiny_training import same

from engine import checkpoint, train
from engine.cli import main
from engine.data import LatentSet

KILLS = {"refine": 10, "distill": 3}
STEPS = 40
PATIENCE = 300.0  # seconds that a run may take on a machine with more to do


@pytest.fixture
def shard(tmp_path):
    return make_shard(tmp_path / "shard.safetensors")


@pytest.fixture
def saved(shard, tmp_path):
    return save_two(tmp_path / "run" / "checkpoint", shard)


@pytest.fixture(scope="module")
def forks():
    return checkpoint_runs.forks()


@pytest.mark.parametrize("stage, kills", KILLS.items())
def test_a_run_killed_at_random_moments_is_bit_equal(shard, tmp_path, forks, stage, kills):
    die_and_resume(shard, tmp_path, forks, stage, kills)


@pytest.mark.soak
def test_a_distillation_survives_twenty_kills(shard, tmp_path, forks):
    die_and_resume(shard, tmp_path, forks, "distill", 20)


def die_and_resume(shard, tmp_path, forks, stage, kills):
    path, how = tmp_path / "shard.safetensors", {"steps": STEPS, "stage": stage}
    forks(fit, tmp_path / "whole", path, STEPS, 1, stage).join(PATIENCE)
    whole = loaded(tmp_path / "whole" / "checkpoint", **how)
    assert whole.step == STEPS

    dice, folder = random.Random(0), tmp_path / "cut"
    killed = inside = ends = 0
    while killed < kills or ends == 0:
        before, process = len(metrics(folder)), forks(fit, folder, path, STEPS, 1, stage)

        def has_moved(folder=folder, before=before) -> bool:
            return len(metrics(folder)) > before and any(folder.glob("checkpoint/step-*[0-9]"))

        deadline = time.monotonic() + PATIENCE
        while not has_moved() and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)

        if killed < kills:
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        process.join(PATIENCE)
        assert process.exitcode in (0, -signal.SIGKILL)
        killed += process.exitcode != 0
        inside += any(folder.glob("checkpoint/*ing"))

        state = loaded(folder / "checkpoint", **how)
        if process.exitcode == 0:
            assert equal(whole, state)
            ends, folder = ends + 1, tmp_path / f"cut{ends}"

    print(f"{killed} kills, {inside} of them inside a save, {ends} runs to the end")


def dying_save(folder: Path, shard: Path, event: int, limit: int, log: Path):
    """Resumes, takes a step and saves. Dies by SIGKILL at the event-th operation of the writer on
    files and folders, or by SIGXFSZ inside the write that passes `limit` bytes."""
    torch.set_num_threads(1)
    state = step(loaded(folder), LatentSet(shard))
    names, operations = [], {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}

    def hook(name, args):
        if name in operations and threading.current_thread().name.startswith("checkpoint"):
            names.append(name)
            if len(names) == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    checkpoint.save(state, folder)
    log.write_text(json.dumps(names))


def test_death_at_every_point_of_a_save(shard, tmp_path, forks):
    before = save_two(tmp_path / "before", shard)

    def dies(event, limit=0) -> tuple[int, Path]:
        folder = tmp_path / f"at{event}.{limit}"
        shutil.copytree(before, folder)
        args = folder, tmp_path / "shard.safetensors", event, limit, tmp_path / "log"
        process = forks(dying_save, *args)
        process.join(60)
        return process.exitcode, folder

    assert dies(0) == (0, tmp_path / "at0.0")
    known = {2: loaded(before), 3: loaded(tmp_path / "at0.0")}
    assert steps_in(tmp_path / "at0.0") == ["step-00000002", "step-00000003"]
    operations = json.loads((tmp_path / "log").read_text())
    assert operations.count("os.rename") == 2 and operations.count("os.remove") == 3
    size = (before / "step-00000002" / "tensors-00000-of-00001.safetensors").stat().st_size
    deaths = [(event, 0) for event in range(1, len(operations) + 1)]
    deaths += [(0, limit) for limit in (1, size // 2, size - 1)]
    seen = set()
    for event, limit in deaths:
        code, folder = dies(event, limit)
        assert code == (-signal.SIGXFSZ if limit else -signal.SIGKILL)
        state = loaded(folder)
        seen.add(state.step)
        committed = event > operations.index("os.rename") + 1
        assert state.step == (3 if committed else 2) and equal(state, known[state.step])
        checkpoint.save(step(state, shard), folder)
        last = [f"step-{n:08d}" for n in (state.step - 1, state.step)]
        assert steps_in(folder) == last and loaded(folder).step == state.step
    assert seen == {2, 3}


@pytest.fixture
def disk(tmp_path):
    """mount(folder, size): a file system of its own."""
    mounted = []

    def mount(folder: Path, size: int, *options: str):
        folder.mkdir(parents=True, exist_ok=True)
        line = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
        if subprocess.run(line, capture_output=True).returncode:
            pytest.skip("mount needs root")
        mounted.extend([folder] if "remount" not in options else [])

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def bytes_of(path: Path) -> int:
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in path.iterdir())


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_going(
    saved, shard, tmp_path, disk, capsys
):
    size, folder = bytes_of(saved / "step-00000002"), tmp_path / "full" / "checkpoint"
    disk(folder, size * 5 // 2)
    with pytest.raises(OSError) as caught:
        train.fit(fresh(), shard, folder.parent, save_every=1, log_every=1, progress=False)
    assert caught.value.errno == errno.ENOSPC and "step-00000006" in str(caught.value)
    assert len(metrics(folder.parent)) == 6
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("No space left" in line for line in lines)
    assert steps_in(folder) == ["step-00000001", "step-00000002"]
    disk(folder, size * 4, "remount")
    state = loaded(folder)
    assert state.step == 2
    train.fit(state, shard, folder.parent, progress=False)
    train.fit(fresh(), shard, tmp_path / "whole", progress=False)
    assert equal(loaded(folder), loaded(tmp_path / "whole" / "checkpoint"))


def test_a_disk_that_has_room_again_is_no_error(saved, shard, tmp_path, disk, capsys):
    size, folder = bytes_of(saved / "step-00000002"), tmp_path / "full" / "checkpoint"
    disk(folder, size * 4)
    ballast = folder / "ballast"
    ballast.write_bytes(bytes(size * 3 + size // 2))
    batch, shard.calls = shard.batch, 0

    def cleared(indices):
        shard.calls += 1
        if shard.calls == 4:
            ballast.unlink()
        return batch(indices)

    shard.batch = cleared
    train.fit(fresh(), shard, folder.parent, save_every=1, progress=False)
    assert loaded(folder).step == 6 and "No space left" in capsys.readouterr().err


def test_a_read_only_disk_leaves_the_last_checkpoint(saved, shard, tmp_path, disk):
    size, folder = bytes_of(saved / "step-00000002"), tmp_path / "read" / "checkpoint"
    disk(folder, size * 9)
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    disk(folder, size * 9, "remount", "ro")
    state = loaded(folder)
    with pytest.raises(OSError) as caught:
        checkpoint.save(step(state, shard), folder)
    assert caught.value.errno == errno.EROFS and loaded(folder).step == 2


def limited_save(folder: Path, shard: Path, limit: int):
    torch.set_num_threads(1)
    state = step(loaded(folder), LatentSet(shard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(state, folder)
    except OSError as error:
        sys.exit(error.errno)


def test_a_file_size_limit_leaves_the_last_checkpoint(saved, tmp_path, forks):
    before = loaded(saved)
    process = forks(limited_save, saved, tmp_path / "shard.safetensors", 50_000)
    process.join(60)
    assert process.exitcode == errno.EFBIG and equal(loaded(saved), before)
    assert steps_in(saved) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_the_step_and_stops(shard, tmp_path, number, code):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    batch = shard.batch

    def interrupted(indices):
        shard.batch = batch  # once, for the next batch is read while the first is trained on
        signal.raise_signal(number)
        return batch(indices)

    shard.batch = interrupted
    with pytest.raises(checkpoint.Interrupted, match="after step 1; .*--resume") as caught:
        train.fit(fresh(), shard, tmp_path / "cut", progress=False)
    assert caught.value.exit_code == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    state = loaded(tmp_path / "cut" / "checkpoint")
    assert state.step == 1
    worker = threading.Thread(
        target=train.fit, args=(state, shard, tmp_path / "cut"), kwargs={"progress": False}
    )
    worker.start()
    worker.join()
    train.fit(fresh(), shard, tmp_path / "whole", progress=False)
    assert state.step == 6 and equal(state, loaded(tmp_path / "whole" / "checkpoint"))


def command_line(errors: Path, *argv):
    torch.set_num_threads(1)
    with errors.open("w") as sys.stderr, open(os.devnull, "w") as sys.stdout:
        code = main([str(token) for token in argv])
    os._exit(code)


def test_sigterm_of_the_command_exits_143_and_resumes(tmp_path, forks):
    make_shard(tmp_path / "shard.safetensors", width=64)
    line = ["train", "--data", tmp_path / "shard.safetensors", "--preset", "tiny", "--quiet"]
    line += ["--steps", "30", "--batch-size", "2", "--save-every", "2", "--output-path"]
    line, errors = [command_line, tmp_path / "errors", *line], tmp_path / "errors"
    forks(*line, tmp_path / "whole").join(60)
    process = forks(*line, tmp_path / "cut")
    while process.is_alive() and not any(tmp_path.glob("cut/checkpoint/step-*[0-9]")):
        time.sleep(0.002)
    process.terminate()
    process.join(60)
    assert process.exitcode == 143
    assert errors.read_text().startswith("univigu: train: stopped by SIGTERM after step ")
    assert not (tmp_path / "cut" / "model").exists()
    resumed = forks(*line, tmp_path / "cut", "--resume")
    resumed.join(60)
    assert resumed.exitcode == 0
    whole, cut = (load_file(tmp_path / n / "model" / "model.safetensors") for n in ("whole", "cut"))
    assert whole.keys() == cut.keys() and same(whole, cut)
