"""The cost model of time: its FLOPs against `engine.planning.flops`, its bytes against what the
operations declare, its calls against those that a model makes, its seconds by hand."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from contracts import DEVICE

from bench.roofline import (
    H100,
    H200,
    REACHED,
    Ceilings,
    Reached,
    Work,
    forward_parts,
    predict,
    seconds,
    step_parts,
    train_parts,
)
from engine import UniViGU, recompute
from engine.config import PRESETS, ModelConfig
from engine.errors import UsageError
from engine.planning import forward_flops, train_flops
from engine.planning.flops import parameters
from engine.run import Run
from engine.sample import Request
from engine.schedule import schedule
from univigu_kernels.registry import FOR_TEXT, OPS

TINY = ModelConfig(heads=2, head_dim=8, layers=3, ffn_dim=40, text_dim=24, freq_dim=12, vocab=50)
MODELS = {
    "tokens": replace(TINY, mask_source=True),
    "blind": replace(TINY, video_sees_text=False, layers=2, ffn_dim=100),
    "vectors": replace(TINY, text_flow="embedding", heads=3, text_dim=7, freq_dim=34),
}
ROWS = {"video_rows": 60, "text_rows": 11, "context_rows": 9}
SIZES = ROWS | {"samples": 2}
WAN = replace(PRESETS["wan2.1-1.3b"], vocab=256000)
WAN_ROWS = {"video_rows": 32760, "text_rows": 256}
LINEAR = Work("linear", 1, 1, 1)


def flops(parts: list[Work]) -> int:
    return sum(part.flops for part in parts)


def calls(parts: list[Work]) -> dict[str, int]:
    counts = Counter()
    for part in parts:
        counts[part.op] += part.calls
    return counts


@pytest.mark.parametrize("cfg", [*MODELS.values(), WAN], ids=[*MODELS, "wan"])
def test_flops_are_those_of_the_cost_model(cfg):
    assert flops(forward_parts(cfg, **SIZES)) == forward_flops(cfg, **SIZES).total
    for policy in recompute.POLICIES:
        expected = train_flops(cfg, recompute=policy, **SIZES)
        assert flops(train_parts(cfg, policy, **SIZES)) == expected


def test_bytes_and_flops_are_those_that_the_operations_declare():
    case = OPS["routed_ffn"].cases["wan2.1-1.3b/480x832x81"]
    parts = forward_parts(WAN, **WAN_ROWS)
    joint = {part.op: part for part in parts if part.op in OPS and part.op != "linear"}
    joint["rms_norm"] = max((p for p in parts if p.op == "rms_norm"), key=lambda p: p.bytes)
    square = [p for p in parts if p.op == "linear" and p.calls == 3 * WAN.layers]
    (joint["linear"],) = square  # out of joint attention, q and out of cross-attention
    (joint["vocab_loss"],) = (p for p in train_parts(WAN, **WAN_ROWS) if p.op == "vocab_loss")
    for mode in ("t2v", "t2vt"):
        parts = step_parts(WAN, mode, **WAN_ROWS)
        joint |= {p.op: p for p in parts if p.op in ("vocab_sample", "flow_step")}
    products = {"linear", "joint_attention", "cross_attention", "routed_ffn"}
    for op, part in joint.items():
        assert part.bytes == part.calls * OPS[op].bytes(case), op
        if op in products | {"vocab_loss", "vocab_sample"}:
            assert part.flops == part.calls * OPS[op].flops(case), op
    left_out = {"rope3d", "fp8_linear", "fp8_ffn"}  # a part of another; of another precision
    left_out |= {"rms_norm_silu"}  # of the VAE
    assert joint.keys() == OPS.keys() - left_out


class Counted:
    """Operations that note what was called, and on how many rows."""

    def __init__(self, ops):
        self._ops, self.seen = ops, []

    def __getattr__(self, name):
        call = getattr(self._ops, name)
        op, _ = FOR_TEXT.get(name, (name, None))  # the same operation, for fewer rows

        def note(*arguments, **options):
            self.seen.append((op, arguments))
            return call(*arguments, **options)

        return note


def steps_of(mode: str, guided: bool, every: int):
    """A model's calls in the last of three evaluations, by operation."""
    model = UniViGU(MODELS["tokens"], DEVICE, kernels="reference")
    counted = Counted(model.ops)
    for module in (model, *model.modules()):
        if hasattr(module, "ops"):
            module.ops = counted
    for block in model.blocks:
        block.route, block.text_route = counted.routed_ffn, counted.text_row_ffn
    g = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 16, 3, 8, 10, generator=g).to(DEVICE)
    tokens = torch.zeros(1, 11, dtype=torch.int64, device=DEVICE)
    context = torch.randn(2, 1, 9, model.cfg.text_dim, generator=g).to(DEVICE)
    plan = schedule(mode, 3, 3.0, "unipc", "exact")
    null = context[1] if guided else None
    request = Request(plan, latents, tokens, context[0], null, 2.0, refresh_every=every)
    for _ in Run(model, request).steps():
        seen, counted.seen = counted.seen, []
    return seen


def product_flops(name: str, arguments: tuple) -> int:
    """2 per multiply-add of what was really called."""
    if name == "linear":
        return 2 * arguments[0].numel() * len(arguments[1])
    if name in ("joint_attention", "cross_attention"):
        q, k = arguments[:2]
        return 4 * len(q) * q.shape[1] * k.shape[1] * q[0, 0].numel()
    if name == "routed_ffn":
        return 4 * arguments[0].numel() * len(arguments[1].up_weight)
    return 2 * arguments[0].numel() * len(arguments[1]) if name == "vocab_sample" else 0


@pytest.mark.parametrize(
    "mode, guided, every",
    [("t2v", True, 1), ("t2v", False, 1), ("t2vt", True, 1), ("v2t", False, 1), ("v2t", False, 3)],
)
def test_a_step_is_what_the_sampler_does(mode, guided, every):
    seen = steps_of(mode, guided, every)
    parts = step_parts(MODELS["tokens"], mode, every > 1, guided, **ROWS, itemsize=4)
    parts = [part for part in parts if part.op in OPS]
    found = Counter(name for name, _ in seen)
    assert calls(parts) == found
    for op in found:
        expected = sum(product_flops(*call) for call in seen if call[0] == op)
        assert flops([part for part in parts if part.op == op]) == expected, op


def test_a_prompt_of_equal_rows_is_not_attended_to():
    found = calls(step_parts(TINY, "v2t", video_rows=60, text_rows=11, context_rows=1))
    assert "cross_attention" not in found and found["joint_attention"] == 3


def test_copies_are_counted():
    """bf16 keys and values into the cache, read and written; a guided sample's query and fp32
    residual stream, read once and written twice."""
    cached = step_parts(TINY, "v2t", cached=True, **ROWS)
    guided = step_parts(TINY, "t2vt", guided=True, **ROWS)
    bytes_of = [sum(p.bytes for p in parts if p.op == "copy") for parts in (cached, guided)]
    assert bytes_of == [TINY.layers * 2 * 11 * 16 * 2 * 2, 3 * 71 * 16 * (2 + 4)]


@pytest.mark.parametrize(
    "text_rows, teraflops", [(128, 1.21), (256, 2.42), (512, 4.87), (1024, 9.84)]
)
def test_published_table_of_cached_captions(text_rows, teraflops):
    parts = step_parts(WAN, "v2t", cached=True, video_rows=32760, text_rows=text_rows)
    assert flops(parts) / 1e12 == pytest.approx(teraflops, abs=0.0051)


def test_seconds_by_hand():
    machine = Ceilings("machine", flops=1000.0, bytes=100.0)
    part = Work("linear", calls=3, flops=4000, bytes=500, exps=60)
    assert seconds(part, machine) == 5.0
    assert seconds(part._replace(flops=8000), machine) == 8.0
    assert seconds(part, machine._replace(exps=20.0)) == 5.0 + 3.0
    assert seconds(part, machine._replace(launch=0.5)) == 5.0 + 1.5
    assert predict([part, part._replace(flops=8000)], machine) == 5.0 + 8.0


def test_shares_are_of_the_right_ceiling():
    machine, share = Ceilings("machine", 1000.0, 100.0), Reached(0.5, 0.25, 0.2, 0.1)
    for op, product in (
        ("joint_attention", 0.5),
        ("cross_attention", 0.5),
        ("joint_attention_backward", 0.25),
        ("routed_ffn", 0.2),
        ("linear_backward", 0.2),
    ):
        assert seconds(Work(op, 1, 1000, 1), machine, share) == 1 / product
        assert seconds(Work(op, 1, 1, 100), machine, share) == 1 / 0.1


def test_published_floors():
    """By hand: 287.0 TFLOP at 989.4 TFLOP/s; 18 ms of row operations; 0.426 s at 700 and 680."""
    parts = forward_parts(WAN, **WAN_ROWS)
    products = [part for part in parts if part.flops]
    assert predict(products, H100) == pytest.approx(287.0e12 / 989.4e12, rel=2e-3)
    assert predict(parts, H100, REACHED) == pytest.approx(0.426, rel=0.05)
    assert predict(parts, H200, REACHED) == pytest.approx(0.421, rel=0.05)


def test_a_softmax_and_a_gelu_have_their_exponentials():
    exps = Counter()
    for part in forward_parts(TINY, **SIZES):
        exps[part.op] += part.exps
    rows, layers = 2 * 71, TINY.layers
    assert exps["joint_attention"] == layers * 2 * 71 * 71 * TINY.heads
    assert exps["cross_attention"] == layers * rows * 9 * TINY.heads
    assert exps["routed_ffn"] == layers * rows * TINY.ffn_dim


@pytest.mark.parametrize("more", [{"video_rows": 120}, {"text_rows": 22}, {"samples": 4}])
def test_more_takes_longer(more):
    def times(sizes):
        yield predict(forward_parts(TINY, **sizes), H100)
        yield predict(step_parts(TINY, "t2vt", guided=True, **sizes), H100)
        yield predict(step_parts(TINY, "v2t", cached=True, **sizes), H100)
        yield predict(train_parts(TINY, **sizes), H100)

    assert all(a < b for a, b in zip(times(SIZES), times(SIZES | more), strict=True))


def test_what_costs_more_takes_longer():
    none, attention, block = (
        predict(train_parts(WAN, policy, **WAN_ROWS), H100, REACHED)
        for policy in ("none", "attention", "block")
    )
    forward = predict(forward_parts(WAN, **WAN_ROWS), H100, REACHED)
    assert 3 * forward < none < attention < block < none + forward
    wide = predict(forward_parts(WAN, **WAN_ROWS, itemsize=4), H100)
    assert predict(forward_parts(WAN, **WAN_ROWS), H100) < wide


def test_an_optimizer_reads_and_writes_its_state():
    """AdamW 28 bytes a parameter, clipping 12, average 12; 12 more for a bf16 one's master."""
    (fp32,) = (p for p in train_parts(TINY, **SIZES, itemsize=4) if p.op == "optimizer")
    (bf16,) = (p for p in train_parts(TINY, **SIZES) if p.op == "optimizer")
    (bare,) = (p for p in train_parts(TINY, **SIZES, ema=False) if p.op == "optimizer")
    model = UniViGU(TINY, "meta", torch.bfloat16, kernels="reference")
    narrow = sum(p.numel() for p in model.parameters() if p.dtype == torch.bfloat16)
    assert fp32.bytes == 52 * parameters(TINY)
    assert bf16.bytes - fp32.bytes == 12 * narrow
    assert bf16.bytes - bare.bytes == 12 * parameters(TINY)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: step_parts(TINY, "i2v", **SIZES), "t2vt or v2t; got 'i2v'. Name one of them"),
        (lambda: step_parts(TINY, "t2v", cached=True, **SIZES), "v2t alone.* Leave out cached"),
        (lambda: step_parts(TINY, "v2t", guided=True, **SIZES), "not be guided.* Leave out guided"),
        (lambda: train_parts(TINY, "some", **SIZES), "one of none, attention.* Name one of them"),
        (lambda: seconds(LINEAR, Ceilings("x", 0.0, 1.0)), "must be positive.* Measure the device"),
        (lambda: seconds(LINEAR, H100._replace(exps=0.0)), "must be positive.* leave out exps"),
    ],
)
def test_unknown_and_impossible_choices_are_refused(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_no_tensor_library_is_imported():
    code = "import sys, bench.roofline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
