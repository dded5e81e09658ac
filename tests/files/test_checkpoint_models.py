"""A run's checkpoint as a model: whole, of adapters or of what was not frozen; and what a resumed
run may change."""

import json
import shutil

import pytest
import torch
from checkpoint_runs import fresh, loaded, make_shard, save_two, step
from safetensors.torch import load_file

import engine
from engine import ModelFileError, checkpoint, load_model, save_pretrained
from engine.cli import main
from engine.train.export import trained_model
from engine.weights import convert
from engine.weights.checkpoints import is_partial

FLAGS = "train --data shard.safetensors --batch-size 4 --quiet --warmup 1 --save-every 2"


@pytest.fixture
def saved(tmp_path):
    """The checkpoint folder of a run that saved its steps 1 and 2."""
    shard = make_shard(tmp_path / "shard.safetensors")
    return save_two(tmp_path / "run" / "checkpoint", shard)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(line) -> (exit code, stdout, stderr), in a folder that holds a shard."""
    make_shard(tmp_path / "shard.safetensors", width=64)
    make_shard(tmp_path / "other.safetensors", width=64)
    monkeypatch.chdir(tmp_path)

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
    assert same(again, read.to(torch.float32)) or again.cfg == read.cfg
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
    """As ranks write them: matrices split by rows, unevenly and down to none."""
    from engine.checkpoint import commit
    from engine.parallel.liveness import Channel

    whole = saved / "step-00000002"
    tensors = load_file(whole / "tensors-00000-of-00001.safetensors")
    record = json.loads((whole / "state.json").read_text()) | {"step": 3}
    names = [n.removeprefix("model.") for n, x in tensors.items() if n.startswith("model.")]
    split = [n for n in names if tensors[f"model.{n}"].ndim == 2]
    cut = {n: len(tensors[f"model.{n}"]) for n in split}
    bounds = [{n: (0, 2, rows, rows)[i] for n, rows in cut.items()} for i in range(4)]

    fresh_folder = tmp_path / "step-00000003"
    fresh_folder.mkdir()
    files = {}
    for i in range(3):
        rows = {n: slice(bounds[i][n], bounds[i + 1][n]) for n in split}
        own = {
            n: x[rows[n.partition(".")[2]]] if n.partition(".")[2] in rows else x
            for n, x in tensors.items()
            if i == 0 or n.partition(".")[2] in rows
        }
        name = f"tensors-{i:05d}-of-00003.safetensors"
        own = {n: x.contiguous() for n, x in own.items()}
        files[name] = commit._write(fresh_folder / name, commit._safetensors(own))
    record["rows"] = {n: [bounds[i][n] for i in range(3)] + [cut[n]] for n in split}
    text = commit.as_text(record)
    files["state.json"] = commit._write(fresh_folder / "state.json", [text])
    manifest = commit.as_text({"format": 2, "step": 3, "files": files})
    commit._write(fresh_folder / "manifest.json", [manifest])
    assert same(
        load_model(fresh_folder, kernels="reference"), load_model(whole, kernels="reference")
    )
    assert Channel().rank == 0


@pytest.mark.parametrize("part", ["--lora-rank 2", "--freeze *attn*,blocks.*.ffn.*"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_part_of_a_model_is_put_into_what_the_run_began_with(run, tmp_path, part, dtype):
    line = f"{FLAGS} --preset tiny --steps 2 --lr 1e-2 --dtype {dtype} --output-path run {part}"
    assert run(line)[0] == 0
    assert is_partial(tmp_path / "run" / "checkpoint")
    with pytest.raises(ModelFileError, match="adapters, or what was not frozen.*univigu convert"):
        load_model("run/checkpoint")
    assert run("convert --model-path run/checkpoint --output-path out") == (0, "out\n", "")
    assert same(load_model("out"), load_model("run/model"))
    assert run("convert --model-path run/checkpoint --output-path q --precision fp8")[0] == 0
    assert load_model("q").ops.precision == "fp8"


def test_the_model_that_a_run_began_with_is_checked_and_may_be_named(run, tmp_path):
    torch.manual_seed(5)
    base = engine.UniViGU(engine.ModelConfig.preset("tiny"))
    save_pretrained(base, "base")
    line = f"{FLAGS} --init-from base --steps 2 --lr 1e-2 --output-path run --lora-rank 2"
    assert run(line)[0] == 0
    shutil.move("base", "moved")
    to = "convert --model-path run/checkpoint/step-00000002 --output-path out"
    code, _, err = run(to)
    assert code == 4 and str(tmp_path / "base") in err and "--base" in err
    assert run(f"{to} --base moved")[0] == 0
    assert same(load_model("out"), load_model("run/model"))
    with torch.no_grad():
        base.patch_embedding.bias += 1
    save_pretrained(base, "other")
    code, _, err = run(f"{to} --base other")
    assert code == 4 and "frozen parameters must be those of" in err
    code, _, err = run("convert --model-path run/model --output-path out --base moved")
    assert code == 2 and "--base must go with the checkpoint" in err


def test_a_run_of_before_origins_were_kept_asks_for_its_base(run, tmp_path):
    assert run(f"{FLAGS} --preset tiny --steps 2 --output-path run --lora-rank 2")[0] == 0
    state = checkpoint.state
    record = {"base": "x", "train": {}, "model": {}}
    with pytest.raises(ModelFileError, match="must be known.*--base PATH"):
        from engine.train.export import _begun_with

        _begun_with(record, tmp_path, None, 0)
    assert state.CHOICES == {"lr": ("lr", "muon_lr")}
    assert trained_model("run/checkpoint").cfg.heads == 3


def test_a_finished_run_is_lengthened(run, tmp_path):
    line = f"{FLAGS} --preset tiny --output-path run"
    assert run(f"{line} --steps 2")[0] == 0
    code, out, err = run(f"{line} --steps 4 --resume")
    assert (code, out) == (0, "run/model\n")
    assert err == "checkpoint: from step 2 on with steps 4 instead of 2.\n"
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 4
    code, _, err = run(f"{line} --steps 3 --resume")
    assert code == 4 and "another steps" in err


def test_another_rate_is_a_stated_choice(run, tmp_path):
    line = f"{FLAGS} --preset tiny --output-path run"
    assert run(f"{line} --steps 2 --lr 1e-3")[0] == 0
    longer = f"{line} --steps 4 --lr 1e-5 --resume"
    code, _, err = run(longer)
    assert code == 4 and "another lr." in err and "--resume-with lr" in err
    code, _, err = run(f"{longer} --resume-with lr")
    assert code == 0 and "lr 1e-05 instead of 0.001" in err and "steps 4 instead of 2" in err
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 4 and last["lr"] < 1e-5
    assert run(longer) == (0, "run/model\n", "")  # it is the run's own from now on


def test_other_data_is_a_stated_choice(run):
    line = f"{FLAGS} --preset tiny --output-path run"
    assert run(f"{line} --steps 2")[0] == 0
    other = line.replace("shard.safetensors", "other.safetensors") + " --steps 4 --resume"
    code, _, err = run(other)
    assert code == 2 and "data must be the shards of the run" in err
    code, _, err = run(f"{other} --resume-with data")
    assert code == 0 and "other.safetensors (12) instead of shard.safetensors (12)" in err
    assert run(other)[0] == 0


@pytest.mark.parametrize(
    "more,code,said",
    [
        ("--resume --resume-with lr --batch-size 2", 4, "another batch_size"),
        ("--resume --resume-with data --lr 1e-5", 4, "another lr"),
        ("--resume --resume-with lr --seed 1", 4, "another seed"),
        ("--resume-with lr", 2, "--resume-with must go with --resume"),
        ("--resume --resume-with warmup", 2, "resume-with"),
    ],
)
def test_everything_else_is_refused(run, tmp_path, more, code, said):
    line = f"{FLAGS} --preset tiny --steps 2 --output-path run"
    assert run(line)[0] == 0
    before = sorted((tmp_path / "run" / "checkpoint").iterdir())
    found, _, err = run(f"{line} {more}")
    assert found == code and said in err
    assert sorted((tmp_path / "run" / "checkpoint").iterdir()) == before


def test_a_state_is_resumed_with_another_rate_in_python(saved, capsys):
    with pytest.raises(ModelFileError, match="another lr"):
        loaded(saved, lr=1e-3)
    state = fresh(lr=1e-3)
    engine.load_checkpoint(state, saved, changed=("lr",))
    assert state.step == 2 and "lr 0.001 instead of 0.01" in capsys.readouterr().err
    engine.save_checkpoint(state, saved)
    assert loaded(saved, lr=1e-3).step == 2
