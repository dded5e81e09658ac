"""Trajectories written ahead: the updates that they give, what a kill leaves, and what is not
read."""

import json
import random
import shutil
import signal
import time
from copy import deepcopy

import checkpoint_runs
import pytest
import torch
from checkpoint_runs import make_shard, write_ahead
from tiny_training import distilling as settings
from tiny_training import lively as network
from tiny_training import same

import engine
from engine import checkpoint, train
from engine.cli import main
from engine.errors import ModelFileError, UsageError
from engine.files.hashes import faults
from engine.planning import train_flops
from engine.train import distill, trajectories
from engine.train.trajectories import Trajectories
from engine.weights import save_pretrained


def state_of(teacher, **changes):
    return engine.TrainState.create(network(), settings(**changes), teacher=teacher)


@pytest.fixture
def shard(tmp_path):
    return make_shard(tmp_path / "shard.safetensors")


@pytest.fixture
def written(shard, tmp_path):
    distill.write_ahead(network(), shard, settings(student_steps=(4, 2)), tmp_path / "written")
    return tmp_path / "written"


@pytest.mark.parametrize("size", [0, 2])
def test_updates_are_those_of_a_teacher_that_runs_meanwhile(shard, tmp_path, size):
    how, folder = {"student_steps": (4, 2), "micro_batch_size": size}, tmp_path / "written"
    distill.write_ahead(network(), shard, settings(**how), folder)
    live, ahead = state_of(network(), **how), state_of(Trajectories(folder), **how)
    start = {name: p.detach().clone() for name, p in live.masters.items()}
    for step in range(3):
        batch = shard.batch(shard.indices(step, 4, live.config.seed))
        engine.train_step(live, batch)
        engine.train_step(ahead, batch | ahead.trajectories.batch(step))
    assert same(live.masters, ahead.masters) and not same(start, live.masters)


def test_a_run_goes_on_with_what_its_teacher_wrote(shard, written, tmp_path):
    """Half of it with the teacher, half of it without."""
    how, folder = {"student_steps": (4, 2)}, tmp_path / "run"
    whole, half = state_of(network(), **how), state_of(network(), **how)
    train.fit(whole, shard, tmp_path / "whole", progress=False)
    for step in range(3):
        engine.train_step(half, shard.batch(shard.indices(step, 4, half.config.seed)))
    half.data = shard.identity
    checkpoint.save(half, folder / "checkpoint")

    resumed = state_of(Trajectories(written), **how)
    checkpoint.load(resumed, folder / "checkpoint")
    train.fit(resumed, shard, folder, progress=False)
    assert resumed.step == 6 and same(whole.masters, resumed.masters)


def test_ranks_read_their_shares(written):
    found = Trajectories(written)
    whole, halves = found.batch(1), [found.batch(1, rank, 2) for rank in (0, 1)]
    for name, x in whole.items():
        assert len(x) == 4 and torch.equal(torch.cat([half[name] for half in halves]), x)


def test_verify_compares_them(written, capsys):
    assert main(["verify", str(written)]) == 0
    assert "every file is as it was written" in capsys.readouterr().out


def test_a_flipped_bit_is_seen_when_its_sample_is_read(shard, written):
    (file,) = written.glob("steps-*/trajectories.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "must have the SHA-256" in faults(file.parent, print)[0]
    found, wrong = Trajectories(written), []
    for step in range(6):
        for rank in range(4):
            try:
                found.batch(step, rank, 4)
            except ModelFileError as error:
                wrong.append(str(error))
    assert len(wrong) == 1 and "must have the SHA-256 that sha256.json says" in wrong[0]


def small_folders(monkeypatch):
    """Folders of two steps, so that there are several."""
    monkeypatch.setattr(trajectories, "MOST_SAMPLES", 8)


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_kills_change_no_byte(shard, tmp_path, monkeypatch):
    small_folders(monkeypatch)
    how = settings(student_steps=(4, 2), steps=8)
    distill.write_ahead(network(), shard, how, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    assert len(expected) == 2 + 2 * 4

    forks, dice, folder = checkpoint_runs.forks(), random.Random(0), tmp_path / "cut"
    for kills in range(3):
        before = len([*folder.glob("steps-*")])
        process = forks(write_ahead, folder, tmp_path / "shard.safetensors", 8)
        deadline = time.monotonic() + 60
        while len([*folder.glob("steps-*")]) == before and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.002)

        if kills < 2:
            time.sleep(dice.uniform(0, 0.1))
            process.kill()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if kills < 2 else 0)
        whole = {name: x for name, x in content(folder).items() if ".writing" not in name}
        assert whole.items() <= expected.items() and len(whole) >= 2 * (1 + before)
    assert content(folder) == expected


def test_what_is_there_is_not_written_again(shard, tmp_path, monkeypatch):
    small_folders(monkeypatch)
    folder, how, steps = tmp_path / "written", settings(), []

    def noted(asked):
        steps.append(list(asked))
        return asked

    distill.write_ahead(network(), shard, how, folder, noted)
    before = content(folder)
    shutil.rmtree(folder / "steps-00000002")
    (folder / "steps-00000004").rename(folder / "steps-00000004.writing")
    with pytest.raises(ModelFileError, match="all 6 training steps; got none from step 2"):
        Trajectories(folder)
    distill.write_ahead(network(), shard, how, folder, noted)
    assert steps == [[0, 1, 2, 3, 4, 5], [2, 3, 4, 5]] and content(folder) == before


@pytest.mark.parametrize(
    "change, said",
    [
        ({"seed": 4}, "seed must be that of .*, 3; got 4"),
        ({"batch_size": 2}, "batch_size must be that of"),
        ({"student_steps": (2, 4)}, "student_steps must be that of"),
        ({"teacher_steps": 8}, "teacher_steps must be that of"),
        ({"guidance_scale": 4.0}, "guidance_scale must be that of"),
        ({"flow_shift": 4.0}, "flow_shift must be that of"),
        ({"t2v_share": 0.3}, "t2v_share must be that of"),
        ({"v2t_share": 0.3}, "v2t_share must be that of"),
        ({"steps": 7}, "steps must be at most the 6 of"),
    ],
)
def test_a_training_of_other_runs_is_refused(shard, written, tmp_path, change, said):
    with pytest.raises(UsageError, match=said):
        state_of(Trajectories(written), **{"student_steps": (4, 2)} | change)
    other = settings(**{"student_steps": (4, 2)} | change)
    with pytest.raises(UsageError, match="must be a new folder, or one of the same"):
        distill.write_ahead(network(), shard, other, written)


def test_other_data_teachers_and_batches_are_refused(shard, written, tmp_path):
    how = {"student_steps": (4, 2)}
    state = state_of(Trajectories(written), **how)
    again = make_shard(tmp_path / "another.safetensors")
    with pytest.raises(UsageError, match="data must be those of .*shard.safetensors"):
        train.fit(state, again, tmp_path / "run", progress=False)
    with pytest.raises(UsageError, match="a batch must hold path and told"):
        engine.train_step(state, shard.batch(shard.indices(0, 4, 3)))
    with pytest.raises(UsageError, match="vocab must be that of the teacher, 37; got 38"):
        engine.TrainState.create(network(vocab=38), settings(**how), teacher=Trajectories(written))

    other = deepcopy(network())
    with torch.no_grad():
        other.video_head.proj_out.bias.add_(1)
    with pytest.raises(UsageError, match="one of the same teacher"):
        distill.write_ahead(other, shard, settings(**how), written)


@pytest.mark.parametrize("name, value", [("steps", "6"), ("model", []), ("format_version", 2)])
def test_a_record_that_is_another_is_refused(written, name, value):
    path = written / "trajectories.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ModelFileError, match="must be as univigu trajectories wrote it"):
        Trajectories(written)


def test_flops_are_of_the_student_alone():
    cfg, sizes = network().cfg, {"samples": 4, "video_rows": 8, "text_rows": 7, "context_rows": 5}
    chosen = settings(student_steps=(4, 2), teacher_steps=8)
    assert distill.step_flops(cfg, None, chosen, 0, **sizes) == 4 * train_flops(cfg, **sizes)


def test_the_command_writes_and_training_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make_shard(tmp_path / "shard.safetensors")
    save_pretrained(network(), tmp_path / "base")
    how = "--student-steps 2 --teacher-steps 4 --steps 3 --batch-size 4 --seed 5 --quiet"
    how += " --data shard.safetensors"
    assert main(f"trajectories --teacher base --output-path ahead {how}".split()) == 0
    assert capsys.readouterr().out == "ahead\n"

    line = f"train --stage distill --init-from base {how}"
    for output, given in (("live", "--teacher base"), ("read", "--trajectories ahead")):
        assert main(f"{line} {given} --output-path {output}".split()) == 0
    live, read = ((tmp_path / name / "model").iterdir() for name in ("live", "read"))
    live, read = ({path.name: path.read_bytes() for path in paths} for paths in (live, read))
    assert live == read and "pipeline.json" in live


@pytest.mark.parametrize(
    "given, said",
    [
        ("--stage distill --teacher a --trajectories b", "one of --teacher and --trajectories"),
        ("--stage refine --trajectories b", "got --stage refine and --trajectories b"),
        ("--stage distill --trajectories b --dry-run", "must be left out with --dry-run"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, given, said):
    line = f"train --preset tiny --student-steps 2 --data x --output-path {tmp_path}/run"
    assert main(f"{line} {given}".split()) == 2 and said in capsys.readouterr().err
