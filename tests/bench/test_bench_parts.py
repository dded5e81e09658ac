"""Benchmarks of the models beside the network and of single backends."""

from dataclasses import replace

import pytest
import torch

from bench import around, labs, ops
from bench.harness import models
from bench.harness.groups import last
from univigu_kernels import OPS

QUICK = replace(models.default("cpu", quick=True), rounds=2)


@pytest.mark.parametrize(
    "case, dtype, names",
    [
        (around.DECODE, "float32", ["diffusers, bf16", "engine", "engine, tiling"]),
        (around.ENCODE, "bfloat16", ["diffusers", "engine"]),
    ],
)
def test_what_stands_around_is_checked_and_timed(case, dtype, names):
    """Against the same weights in fp32: other numbers in bf16 would show."""
    pytest.importorskip("diffusers")
    group = last(around.measure(case, dtype, QUICK))
    assert group.refused == {} and list(group.times) == names
    assert group.errors.pop(around.TILED, None) is None
    assert all(error < 5e-2 for error in group.errors.values())
    assert any(error > 1e-4 for error in group.errors.values())


def test_both_sizes_of_the_encoder_are_wans_on_a_gpu(monkeypatch):
    """Without making them: 6 billion numbers."""
    made = []
    monkeypatch.setattr(around, "filled", lambda make, s, dtype: made.append(make))
    wan = replace(QUICK, device="cuda", preset="wan2.1-1.3b")
    around.encoder_of(wan, torch.bfloat16)
    around.vae_of(wan)
    with torch.device("meta"):
        encoder, vae = (make() for make in made)
    assert sum(p.numel() for p in encoder.parameters()) == 5_680_910_336
    assert sum(p.numel() for p in vae.parameters()) == 126_892_531


@pytest.mark.parametrize("op", labs.JUDGED)
def test_every_backend_has_its_turns(op):
    told = list(labs.measure(op, "bfloat16", QUICK))
    names, group = [x for x in told if isinstance(x, str)], told[-1]
    inputs = ops.arguments(op, ops.shapes(QUICK), "cpu", torch.bfloat16)
    assert names == list(labs.candidates(op, QUICK, torch.bfloat16, inputs))
    assert list(group.times) == names and group.refused == {}
    assert all(len(times) == QUICK.rounds for times in group.times.values())
    assert group.flops == OPS[op].flops(ops.shapes(QUICK))


def test_one_that_is_to_be_left_out_is_not_run():
    told = list(labs.measure("joint_attention", "bfloat16", QUICK, without=("plain PyTorch",)))
    assert "plain PyTorch" not in told and "plain PyTorch" not in told[-1].times
    assert "SDPA, math" in told[-1].times


def test_a_wrong_backend_is_refused_and_not_timed(monkeypatch):
    def wrong(*args):
        return 1.1 * OPS["routed_ffn"].reference(*args)

    op = OPS["routed_ffn"]
    changed = replace(op, backends=(ops.Backend("mine", wrong), *op.backends))
    monkeypatch.setattr(ops, "OPS", {**OPS, "routed_ffn": changed})
    group = last(labs.measure("routed_ffn", "bfloat16", QUICK))
    assert "engine, mine" not in group.times and "plain PyTorch" in group.times
    assert "differs by 1" in group.refused["engine, mine"]
