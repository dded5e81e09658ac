"""A run's checkpoint as a model: whole, of adapters or of what was not frozen; and what a resumed
run may change."""

import json
import shutil

import pytest
import tiny_training
import torch
from checkpoint_runs import fresh, loaded, make_shard, save_two, step
from safetensors.torch import load_file

import engine
from engine import ModelFileError, checkpoint, load_model, save_pretrained
from engine.checkpoint import commit
from engine.cli import main
from engine.files.tensors import entries_of, file_chunks
from engine.files.writing import write_hashed
from engine.train.export import trained_model
from engine.weights import convert
from engine.weights.checkpoints import is_partial

FLAGS = "train --init-from base --data shard.safetensors --batch-size 2 --quiet --warmup 1 "
FLAGS += "--output-path run"


@pytest.fixture
def saved(tmp_path):
    """The checkpoint folder of a run that saved its steps 1 and 2."""
    shard = make_shard(tmp_path / "shard.safetensors")
    return save_two(tmp_path / "run" / "checkpoint", shard)


def prepare(folder, monkeypatch):
    """The working folder of commands: two shards, and a model to begin with."""
    make_shard(folder / "shard.safetensors")
    make_shard(folder / "other.safetensors")
    save_pretrained(tiny_training.model(), folder / "base")
    monkeypatch.setattr("engine.train.metrics.plot", lambda path: None)  # it takes 4 s
    monkeypatch.chdir(folder)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(line) -> (exit code, stdout, stderr), in a folder that holds shards and a model."""
    prepare(tmp_path, monkeypatch)

    def call(line: str) -> tuple[int, str, str]:
        return main(line.split()), *capsys.readouterr()

    return call


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_the_newest_checkpoint_is_the_averaged_model(saved):
    state = loaded(saved)
    model = load_model(saved, kernels="reference")
    assert model.cfg == state.model.cfg and same(model, state.ema_model(torch.float32))
    assert not same(load_model(saved / "step-00000001", kernels="reference"), model)
    assert not is_partial(saved)


def test_a_run_without_an_average_gives_its_parameters(tmp_path):
    shard = make_shard(tmp_path / "shard.safetensors")
    state = step(fresh(ema=0.0), shard, 2)
    checkpoint.save(state, tmp_path / "checkpoint")
    assert same(load_model(tmp_path / "checkpoint", kernels="reference"), state.model)


def test_every_road_reads_a_checkpoint(saved, tmp_path):
    convert(saved, tmp_path / "out", dtype=torch.bfloat16)
    again = load_model(tmp_path / "out", kernels="reference")
    read = load_model(saved, dtype=torch.bfloat16, kernels="reference")
    assert same(again.bfloat16(), read.bfloat16()) and again.cfg == read.cfg
    assert engine.weights.read_transformer(saved)[0] == read.cfg


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_or_refused(saved, capsys):
    good = load_model(saved / "step-00000001", kernels="reference")
    flip(saved / "step-00000002" / "tensors-00000-of-00001.safetensors")
    assert same(load_model(saved, kernels="reference"), good)
    assert "step-00000001 is read instead" in capsys.readouterr().err
    with pytest.raises(ModelFileError, match=r"step-00000002/tensors.* must have the SHA-256"):
        load_model(saved / "step-00000002")
    flip(saved / "step-00000001" / "state.json")
    with pytest.raises(ModelFileError, match="must hold a whole checkpoint"):
        load_model(saved)


def test_rows_of_several_files_are_put_together(saved, tmp_path):
    """As ranks write them: rows of each parameter, unevenly and down to none."""
    whole = load_model(saved, kernels="reference")
    file = saved / "step-00000002" / "tensors-00000-of-00001.safetensors"
    tensors = load_file(file)
    record = json.loads((file.parent / "state.json").read_text())

    def parameter(name):
        return name.partition(".")[2]

    total = {parameter(n): len(x) for n, x in tensors.items() if x.ndim > 1}
    starts = {n: [0, rows // 3, rows, rows] for n, rows in total.items()}  # the last rank has none
    spread = tmp_path / "step-00000003"
    spread.mkdir()
    files = {}
    for i in range(3):
        held = {n: x for n, x in tensors.items() if i == 0 or x.ndim > 1}
        for n, x in held.items():
            if x.ndim > 1:
                first, end = starts[parameter(n)][i : i + 2]
                held[n] = x[first:end].contiguous()
        name = f"tensors-{i:05d}-of-00003.safetensors"
        files[name] = write_hashed(spread / name, file_chunks(entries_of(held)))

    record |= {"step": 3, "rows": starts}
    files["state.json"] = write_hashed(spread / "state.json", [commit.as_text(record)])
    manifest = {"format": 2, "step": 3, "files": files}
    write_hashed(spread / "manifest.json", [commit.as_text(manifest)])
    assert same(load_model(spread, kernels="reference"), whole)


@pytest.mark.parametrize(
    "part,dtype",
    [
        ("--lora-rank 2", "float32"),
        ("--lora-rank 2", "bfloat16"),
        ("--freeze *attn*,blocks.*.ffn.*", "float32"),
        ("--lora-rank 2 --blind-video", "float32"),
    ],
)
def test_a_part_of_a_model_is_put_into_what_the_run_began_with(run, tmp_path, part, dtype):
    line = f"{FLAGS} --steps 2 --lr 1e-2 --dtype {dtype} {part}"
    assert run(line)[0] == 0
    assert is_partial(tmp_path / "run" / "checkpoint")
    with pytest.raises(ModelFileError, match="adapters, or what was not frozen.*univigu convert"):
        load_model("run/checkpoint")
    assert run("convert --model-path run/checkpoint --output-path out") == (0, "out\n", "")
    assert same(load_model("out"), load_model("run/model"))
    assert run("convert --model-path run/checkpoint --output-path q --precision fp8")[0] == 0
    assert load_model("q").ops.precision == "fp8"


def test_the_model_that_a_run_began_with_is_checked_and_may_be_named(run, tmp_path):
    assert run(f"{FLAGS} --steps 2 --lr 1e-2 --lora-rank 2")[0] == 0
    shutil.move("base", "moved")
    to = "convert --model-path run/checkpoint/step-00000002 --output-path out"
    code, _, err = run(to)
    assert code == 4 and str(tmp_path / "base") in err and "--base" in err
    assert run(f"{to} --base moved")[0] == 0
    assert same(load_model("out"), load_model("run/model"))
    base = load_model("moved")
    with torch.no_grad():
        base.patch_embedding.bias += 1
    save_pretrained(base, "other")
    code, _, err = run(f"{to} --base other")
    assert code == 4 and "frozen parameters must be those of" in err
    code, _, err = run("convert --model-path run/model --output-path out --base moved")
    assert code == 2 and "--base must go with the checkpoint" in err


def test_a_preset_that_adapters_were_trained_on_is_made_again(run, tmp_path):
    make_shard(tmp_path / "wide.safetensors", width=64)
    line = FLAGS.replace("--init-from base", "--preset tiny").replace("shard.", "wide.")
    assert run(f"{line} --steps 1 --lora-rank 2")[0] == 0
    assert same(trained_model("run/checkpoint"), load_model("run/model"))


def test_a_checkpoint_without_its_origin_asks_for_the_base(run, tmp_path):
    """As those that were saved before origins were."""
    state = fresh(lora_rank=2)
    checkpoint.save(state, tmp_path / "old")
    with pytest.raises(ModelFileError, match="must be known.*--base PATH"):
        trained_model("old")
    assert same(trained_model("old", "base"), state.ema_model(torch.float32))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that ended after 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        prepare(folder, patch)
        assert main(f"{FLAGS} --steps 2 --lr 1e-3".split()) == 0
    return folder / "run"


@pytest.fixture
def again(run, finished, tmp_path):
    """again(flags) -> as run, of the finished run's line with --resume."""
    shutil.copytree(finished, tmp_path / "run")
    return lambda flags: run(f"{FLAGS} --lr 1e-3 --resume {flags}")


def test_a_finished_run_is_lengthened(again, tmp_path):
    code, out, err = again("--steps 3")
    assert (code, out) == (0, "run/model\n")
    assert err == "checkpoint: from step 2 on with steps 3 instead of 2.\n"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    code, _, err = again("--steps 2")
    assert code == 4 and "another steps" in err


def test_another_rate_is_a_stated_choice(again, tmp_path):
    code, _, err = again("--steps 3 --lr 1e-5")
    assert code == 4 and "another lr." in err and "--resume-with lr" in err
    code, _, err = again("--steps 3 --lr 1e-5 --resume-with lr")
    assert code == 0 and "lr 1e-05 instead of 0.001" in err and "steps 3 instead of 2" in err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and last["lr"] < 1e-5
    assert again("--steps 3 --lr 1e-5") == (0, "run/model\n", "")  # it is the run's own by now


def test_other_data_is_a_stated_choice(again):
    other = "--steps 3 --data other.safetensors"
    code, _, err = again(other)
    assert code == 2 and "data must be the shards of the run" in err
    code, _, err = again(f"{other} --resume-with data")
    assert code == 0 and "other.safetensors (12) instead of shard.safetensors (12)" in err


def test_everything_else_is_refused(again, run, tmp_path):
    before = sorted((tmp_path / "run" / "checkpoint").iterdir())
    for more, code, said in (
        ("--resume-with lr --batch-size 4", 4, "another batch_size"),
        ("--resume-with data --lr 1e-5", 4, "another lr"),
        ("--resume-with lr --seed 1", 4, "another seed"),
        ("--resume-with warmup", 2, "resume-with"),
    ):
        found, _, err = again(f"--steps 3 {more}")
        assert found == code and said in err
    code, _, err = run(f"{FLAGS} --steps 3 --resume-with lr")
    assert code == 2 and "--resume-with must go with --resume" in err
    assert sorted((tmp_path / "run" / "checkpoint").iterdir()) == before


def test_a_state_is_resumed_with_another_rate_in_python(saved, capsys):
    with pytest.raises(ModelFileError, match="another lr"):
        loaded(saved, lr=1e-3)
    state = fresh(lr=1e-3)
    engine.load_checkpoint(state, saved, changed=("lr",))
    assert state.step == 2 and "lr 0.001 instead of 0.01" in capsys.readouterr().err
    engine.save_checkpoint(state, saved)
    assert loaded(saved, lr=1e-3).step == 2
