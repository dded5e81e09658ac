"""The bench of operations: what it checks before it times, what it says it did, and what developers
run of it."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import developers, ops, roofline
from bench.harness import rivals
from bench.harness.groups import attempt
from bench.harness.inputs import arguments
from bench.harness.models import default
from bench.harness.rivals import Peer
from engine.errors import UsageError
from univigu_kernels import OPS

ROOT = Path(__file__).resolve().parents[2]
QUICK = default("cpu", quick=True)
PRESET = replace(QUICK, preset="wan2.1-1.3b", latent=(21, 60, 104), text_rows=256, context_rows=512)


def by_pass(op, dtype="float32"):
    return {group.more["pass"]: group for group in ops.measure(op, dtype, QUICK)}


def with_backend(monkeypatch, op, call):
    """The registry with one backend more, ahead of the others."""
    mine = ops.Backend("mine", call)
    changed = replace(OPS[op], backends=(mine, *OPS[op].backends))
    monkeypatch.setattr(ops, "OPS", {**OPS, op: changed})


@pytest.mark.parametrize(("op", "dtype"), ops.cases(QUICK))
def test_every_operation_is_checked_and_timed(op, dtype):
    groups = list(ops.measure(op, dtype, QUICK))
    passes = ["forward", "backward"] if OPS[op].differentiable else ["forward"]
    assert [group.more for group in groups] == [{"pass": which} for which in passes]
    for group in groups:
        assert (group.case, group.dtype, group.refused) == (op, dtype, {})
        assert next(iter(group.times)) == "plain PyTorch"
        assert group.times.keys() == group.errors.keys() == group.parts.keys()
        assert all(len(times) == QUICK.rounds for times in group.times.values())
        assert all(error <= ops.limit_of(op, dtype) for error in group.errors.values())


def test_every_operation_and_dtype_has_a_case():
    assert {op for op, _ in ops.cases(QUICK)} == set(OPS)
    assert {d for op, d in ops.cases(QUICK) if op == "adaln"} == {"bfloat16", "float32"}
    assert {d for _, d in ops.cases(replace(QUICK, device="cuda"))} == {"bfloat16"}


def test_compiled_backends_are_timed_and_the_reference_once():
    times = by_pass("rms_norm")["forward"].times
    assert ("engine, cpu" in times) == any(
        b.name == "cpu" and b.supports(torch.device("cpu"), torch.float32) is None
        for b in OPS["rms_norm"].backends
    )
    assert not {"reference", "engine, reference", "engine, triton"} & times.keys()
    attention = by_pass("joint_attention")["forward"].times
    assert "SDPA, math" in attention
    assert not {"sdpa", "engine, sdpa", "engine, reference"} & attention.keys()


def wrong(call, *args, **kwargs):
    return 1.01 * call(*args, **kwargs)


def test_wrong_results_are_refused(monkeypatch):
    with_backend(monkeypatch, "rms_norm", partial(wrong, OPS["rms_norm"].reference))
    for group in by_pass("rms_norm").values():
        assert "engine, mine" not in group.times and "plain PyTorch" in group.times
    assert "differs by 1" in by_pass("rms_norm")["forward"].refused["engine, mine"]


def test_wrong_gradients_are_refused(monkeypatch):
    def halved(x, weight):
        return OPS["rms_norm"].reference((x + x.detach()) / 2, weight)

    with_backend(monkeypatch, "rms_norm", halved)
    groups = by_pass("rms_norm")
    assert "engine, mine" in groups["forward"].times
    assert "engine, mine" not in groups["backward"].times
    assert groups["backward"].refused["engine, mine"].startswith("backward: differs by")


def test_other_tokens_are_refused(monkeypatch):
    def off(*args):
        tokens, confidence = OPS["vocab_sample"].reference(*args)
        return tokens + 1, confidence

    with_backend(monkeypatch, "vocab_sample", off)
    group = by_pass("vocab_sample")["forward"]
    assert group.errors["engine, mine"] == 1 and "engine, mine" not in group.times


def test_a_peer_that_raises_is_a_line(monkeypatch):
    def absent(args, kwargs):
        from no_such_package import kernel  # noqa: F401

    def broken(args, kwargs):
        def call(*_):
            raise RuntimeError("no kernel image\nmore")

        return call

    mine = Peer("linear", "absent", absent), Peer("linear", "broken", broken)
    monkeypatch.setattr(rivals, "PEERS", [p._replace(cuda=False) for p in mine])
    groups = by_pass("linear")
    assert groups["forward"].refused == {
        "absent": "ModuleNotFoundError: No module named 'no_such_package'",
        "broken": "RuntimeError: no kernel image",
    }
    assert groups["backward"].refused == {} and "plain PyTorch" in groups["backward"].times


def test_without_a_truth_nothing_is_timed(monkeypatch):
    def fails(*_):
        raise MemoryError("too large")

    monkeypatch.setattr(ops, "exact", lambda op, s: fails)
    group = by_pass("linear")["forward"]
    assert group.times == {} and "too large" in group.refused["plain PyTorch in fp32"]


def test_peers_are_offered_where_they_are(monkeypatch):
    absent = {p.name for p in rivals.PEERS if not rivals._installed(p.module)}
    offered = {p.name for op in OPS for p in rivals.offered(op, "cpu")}
    assert offered.isdisjoint(absent)
    assert offered == {"F.layer_norm, then modulated", "F.rms_norm", "SDPA, math"}
    assert {p.op for p in rivals.PEERS} <= set(OPS)
    for peer in rivals.PEERS:  # what a package's absence says
        if peer.name in absent:
            failed = {}
            inputs = arguments(peer.op, ops.shapes(QUICK), "cpu", torch.bfloat16)
            assert attempt(peer.name, failed, lambda p=peer, i=inputs: p.make(*i)) is None
            assert failed[peer.name].startswith("ModuleNotFoundError")


@pytest.mark.parametrize("op", rivals.COMPILABLE)
def test_what_is_compiled_in_the_place_of_plain_pytorch(op):
    inputs = args, kwargs = arguments(op, ops.shapes(QUICK), "cpu", torch.float32)
    call = rivals.COMPILABLE[op](*inputs)
    assert ops.disagreement(call(*args, **kwargs), OPS[op].reference(*args, **kwargs)) < 1e-6


@pytest.mark.parametrize("op", OPS)
def test_work_is_what_the_operation_declares(op):
    case = ops.shapes(PRESET)
    forward, backward = (ops.part(op, case, "bfloat16", w) for w in ("forward", "backward"))
    assert (forward.flops, forward.bytes) == (OPS[op].flops(case), OPS[op].bytes(case))
    factor = 2.5 if op.endswith("attention") else 2
    assert (backward.flops, backward.bytes) == (factor * forward.flops, 2 * forward.bytes)
    declared = next(iter(OPS[op].cases.values()))  # the 1.3B model's
    assert {k: case[k] for k in "BVTCDHKF"} == {k: declared[k] for k in "BVTCDHKF"}


def test_work_is_in_the_rows():
    group = by_pass("adaln", "bfloat16")["backward"]
    part = ops.part("adaln", ops.shapes(QUICK), "bfloat16", "backward")
    assert (group.flops, group.bytes) == (part.flops, part.bytes)
    assert group.parts["plain PyTorch"] == [part]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "op",
    ["joint_attention", "cross_attention", "routed_ffn", "qknorm_rope", "residual_adaln", "adaln"],
)
def test_work_is_that_of_the_cost_model(op, dtype):
    size = getattr(torch, dtype).itemsize
    parts = roofline.forward_parts(PRESET.cfg, itemsize=size, **PRESET.sizes)
    (model,) = (p for p in parts if p.op == op)
    mine = ops.part(op, ops.shapes(PRESET), dtype, "forward")
    assert (mine.bytes * model.calls, mine.exps * model.calls) == (model.bytes, model.exps)
    assert model.flops in (0, mine.flops * model.calls)  # rows count as none there


def test_tables_of_rotation_get_no_gradient():
    inputs = arguments("qknorm_rope", ops.shapes(QUICK), "cpu", torch.float32)
    gradients = ops.differentiated(OPS["qknorm_rope"].reference, inputs, torch.float32)()
    assert [g.shape for g in gradients] == [x.shape for x in inputs[0][:4]]


def test_developers_flags():
    asked = developers.parsed(["--op", "adaln", "--base", "HEAD"])
    assert asked.op == "adaln" and len(asked.base) == 40
    assert developers.parsed(["--op", "", "--base", ""]).base == ""
    with pytest.raises(UsageError, match="K must be one of adaln, .*; got 'adalm'"):
        developers.parsed(["--op", "adalm"])
    with pytest.raises(UsageError, match="BASE must be a commit.*; got 'no-such'"):
        developers.parsed(["--base", "no-such"])
    assert developers.main(["--op", "adalm"]) == UsageError.exit_code


def test_developers_entries_run():
    """Each once, untimed: one operation of the registry, all its backends."""
    command = [sys.executable, "-m", "pytest", "bench/speed.py", "-q", "-p", "no:cacheprovider"]
    env = os.environ | {"UNIVIGU_BENCH_OP": "flow_step"}
    env.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(
        [*command, "--benchmark-disable"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    backends = ops.backends("flow_step", "cpu", torch.float32)
    on_cpu = not torch.cuda.is_available()
    assert done.returncode == 0, done.stdout + done.stderr
    assert not on_cpu or f"{2 * len(backends)} passed" in done.stdout
