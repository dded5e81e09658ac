"""Adapters that training saves: what diffusers and the pipeline make of them, and going on."""

import json
import re

import adapter_files as made
import parallel_runs as runs
import pytest
import tiny_training as tiny
import torch
from checkpoint_runs import make_shard
from safetensors import safe_open

from engine.cli import main
from engine.weights import load_model, save_pretrained
from engine.weights.names import from_diffusers, to_stock

TRAIN = "train --data shard.safetensors --batch-size 4 --quiet --warmup 0 --ema 0 --lr 0.05"


def stock(path, **options) -> dict[str, torch.Tensor]:
    model = load_model(path, kernels="reference", **options)
    return {name: t.detach() for name, t in to_stock(model.state_dict(), model.cfg).items()}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(flags) -> (exit code, stderr), in a folder with a shard and a base model."""
    make_shard(tmp_path / "shard.safetensors", width=20)
    monkeypatch.chdir(tmp_path)
    wan = made.make_wan()
    wan.save_pretrained(tmp_path / "wan")
    sizes = {"layers": 2, "heads": 2, "head_dim": 12, "ffn_dim": 40, "freq_dim": 16}
    model = tiny.model(text_dim=20, **sizes)
    state = model.state_dict()
    for name, tensor in stock(tmp_path / "wan").items():  # the text keeps its small vocabulary
        if name in state and tensor.shape == state[name].shape:
            state[name].copy_(tensor)
    model.text_head.linear.weight.data.normal_(0, 0.05)  # a zero head gives the text no gradient
    save_pretrained(model, tmp_path / "base")

    def call(more: str) -> tuple[int, str]:
        return main([*TRAIN.split(), *more.split()]), capsys.readouterr().err

    return call


def test_a_trained_adapter_is_the_merged_model_here_and_in_diffusers(run, tmp_path):
    from diffusers import WanPipeline, WanTransformer3DModel

    assert run("--init-from base --lora-rank 2 --steps 3 --output-path out") == (0, "")
    merged, base = stock(tmp_path / "out" / "model"), stock(tmp_path / "base")
    found = stock(tmp_path / "base", lora=[(tmp_path / "out" / "adapter", 1.0)])
    moved = [name for name in base if not torch.equal(merged[name], base[name])]
    assert len(moved) == 24 and "blocks.1.ffn_t.net.2.weight" in moved
    assert max((found[name] - merged[name]).abs().max() for name in base) <= 1e-5

    theirs = WanTransformer3DModel(**made.SHAPE)
    names = from_diffusers({name: name for name, _ in theirs.named_parameters()})
    theirs.load_state_dict({diffusers: base[ours] for ours, diffusers in names.items()})
    pipe = WanPipeline(None, None, None, None, theirs)
    pipe.load_lora_weights(tmp_path / "out" / "adapter")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    state = theirs.state_dict()
    assert max((state[d] - merged[o]).abs().max() for o, d in names.items()) <= 1e-5
    assert max((state[d] - base[o]).abs().max() for o, d in names.items()) > 1e-3

    with safe_open(tmp_path / "out/adapter/pytorch_lora_weights.safetensors", "pt") as file:
        said = file.metadata()
    ours, peft = json.loads(said["univigu"]), json.loads(said["lora_adapter_metadata"])
    assert ours["rank"] == peft["transformer.r"] == peft["transformer.lora_alpha"] == 2
    assert len(ours["base"]) == 64


def test_training_goes_on_from_an_adapter(run, tmp_path):
    first = "--init-from base --lora-rank 2 --steps 3 --output-path first"
    assert run(first) == (0, "")
    adapter = "--init-lora first/adapter --init-from base"
    assert run(f"{adapter} --lora-rank 2 --steps 1 --lr 1e-9 --output-path second") == (0, "")
    one, two = (stock(tmp_path / x / "model") for x in ("first", "second"))
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-6
    assert run(f"{adapter} --lora-rank 2 --steps 2 --output-path third") == (0, "")
    three = stock(tmp_path / "third" / "model")
    assert max((one[name] - three[name]).abs().max() for name in one) > 1e-3


def test_an_adapter_of_another_run_is_refused(run, tmp_path):
    assert run("--init-from base --lora-rank 2 --steps 1 --output-path first")[0] == 0
    made.write(
        tmp_path / "a.safetensors",
        made.tensors(made.factors(made.make_wan(), rank=2), "kohya"),
    )

    base, rank = "--init-from base", "--lora-rank 2"
    for adapter, flags, said in (
        ("first/adapter", base, "--init-lora must go with --lora-rank; got first/adapter alone"),
        ("first/adapter", f"{base} --lora-rank 3", "got 3 instead of 2 at blocks.0"),
        ("first/adapter", f"--init-from first/model {rank}", "trained on this base.*got another"),
        ("first/adapter", f"{base} {rank} --dtype bfloat16", "in this --dtype; got another"),
        ("a.safetensors", f"{base} {rank}", "says of none: a.safetensors.*convert --lora"),
    ):
        code, err = run(f"--init-lora {adapter} --steps 1 --output-path out {flags}")
        assert code == 2 and re.search(said, err), err


def test_ranks_save_whole_factors(tmp_path):
    """Each has a shard of them, and rank 0 writes."""
    for process in runs.start_world(2, runs.adapter_program, tmp_path):
        process.join(120)
        assert process.exitcode == 0
    base = runs.make_state({}, {}, None).model
    save_pretrained(base, tmp_path / "base")
    merged = stock(tmp_path / "model")
    found = stock(tmp_path / "base", lora=[(tmp_path / "adapter", 1.0)])
    assert max((found[name] - merged[name]).abs().max() for name in merged) <= 1e-6
    before = stock(tmp_path / "base")
    assert max((before[name] - merged[name]).abs().max() for name in merged) > 1e-3
