"""What a run launches is known before it runs: rehearsed on meta tensors, and noted of a run on a
CPU whose kernels leave zeros, the kernels are the same. (In the interpreter that run took minutes;
what the kernels compute is for their own tests.)"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny_training
import torch
from contracts import DEVICE

import engine
from engine import fp8, graphs, sample
from engine.config import PipelineConfig
from engine.run import Run
from engine.schedule import schedule
from engine.train import TrainState, train_step
from engine.train.ahead import Ahead, rehearse
from univigu_kernels import _triton, ahead, bind
from univigu_kernels._card import CARDS

pytestmark = pytest.mark.skipif(
    torch.device(DEVICE).type != "cpu", reason="compares the interpreter's launches"
)
SHAPE, T, C, TOKENS = (16, 2, 4, 4), 6, 128, 63  # a prompt that leaves 64 context rows everywhere
SIZES = {"layers": 2, "heads": 2, "head_dim": 64, "ffn_dim": 64, "text_dim": 8, "vocab": 37}


def net(precision="bf16", **changes):
    """Wide enough that a GPU would not pad its heads, which the interpreter does not."""
    torch.manual_seed(0)
    cfg = replace(engine.ModelConfig.preset("tiny"), **SIZES | changes)
    model = engine.UniViGU(cfg, kernels=bind("triton", precision=precision)).eval()
    return fp8.quantize(model) if precision == "fp8" else model


def given(mode, lengths=None, refresh_every=1, temperature=1.0, commit="jump", batch=1, **choices):
    plan = schedule(mode, 3, 3.0, "euler", choices.pop("sampler", "exact"), **choices)
    context, null = torch.zeros(2, batch, C, SIZES["text_dim"])
    context[:, : 0 if mode == "v2t" else TOKENS], null[:, :1] = 0.5, -0.5
    seeds, null = list(range(batch)), None if mode == "v2t" else null
    settings = 1.0 if mode == "v2t" else 3.0, lengths, seeds, temperature, commit, refresh_every
    tokens = torch.zeros(batch, T, dtype=torch.int64)
    latents = sample.video_noise(SHAPE, seeds, "cpu")
    return sample.Request(plan, latents, tokens, context, null, *settings)


def kernels(launches):
    return {ahead.key_of(launch) for launch in launches}


RUNS = {
    "t2v": {"mode": "t2v"},
    "t2v, texts of two lengths": {"mode": "t2v", "batch": 2, "lengths": [3, 5]},
    "t2vt": {"mode": "t2vt"},
    "t2vt, text on a grid of its own": {"mode": "t2vt", "text_steps": 2},
    "t2vt, legacy": {"mode": "t2vt", "sampler": "legacy"},
    "v2t exact": {"mode": "v2t"},
    "v2t frozen": {"mode": "v2t", "refresh_every": 3},
    "v2t, surest first, most probable": {"mode": "v2t", "commit": "confidence", "temperature": 0.0},
}


@contextmanager
def noted():
    """Notes what is launched and runs none of it: new memory is zeros, and so is what it makes."""
    with pytest.MonkeyPatch.context() as patch, _triton._noting(run=False) as launches:
        patch.setattr(torch, "empty", torch.zeros)
        patch.setattr(torch, "empty_like", torch.zeros_like)
        patch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
        yield launches
    assert not any(t.is_meta for x in launches for t in x.args if isinstance(t, torch.Tensor))


def compare(model, request):
    """The kernels of a run and those of its rehearsal."""
    with noted() as launched:
        for _ in Run(model, request).steps():
            pass
    with _triton.rehearsal(CARDS[90]) as rehearsed:
        graphs.rehearse(model, request)
    assert launched and all(t.is_meta for t in rehearsed[0].args if isinstance(t, torch.Tensor))
    return kernels(launched), kernels(rehearsed)


@pytest.mark.parametrize("case", RUNS)
def test_a_run_launches_what_its_rehearsal_noted(case):
    launched, rehearsed = compare(net(), given(**RUNS[case]))
    assert launched == rehearsed


def test_an_fp8_model_launches_what_its_rehearsal_noted():
    launched, rehearsed = compare(net("fp8"), given("t2vt"))
    assert launched == rehearsed and any(key[0].startswith("fp8") for key in launched)


def test_a_model_whose_video_is_blind_launches_what_its_rehearsal_noted():
    launched, rehearsed = compare(net(video_sees_text=False), given("v2t", refresh_every=3))
    assert launched == rehearsed


def test_the_rehearsal_leaves_the_model_alone():
    model = net()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    ops = model.ops
    graphs.rehearse(model, given("t2vt"))
    assert model.ops is ops and tiny_training.same(before, model.state_dict())


def batch_of(model, count=2):
    ids = torch.zeros(count, T, dtype=torch.int64)
    return {
        "latents": torch.randn(count, *SHAPE),
        "prompt_tokens": ids,
        "prompt_lengths": torch.full((count,), 3),
        "caption_tokens": ids,
        "context": torch.zeros(count, C, model.cfg.text_dim),
        "null_context": torch.zeros(C, model.cfg.text_dim),
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"recompute": "block"}, {"recompute": "attention"}, {"lora_rank": 2, "muon_lr": 0.0}],
    ids=str,
)
def test_a_training_step_launches_what_its_rehearsal_noted(changes):
    model = net()
    state = TrainState.create(model, tiny_training.config(batch_size=2, **changes))
    batch = batch_of(model)
    with _triton.rehearsal(CARDS[90]) as rehearsed:
        rehearse(state, batch)
    assert state.step == 0 and all(p.grad is None for p in model.parameters())
    with noted() as launched:
        train_step(state, batch)
    assert kernels(launched) == kernels(rehearsed)
    assert any("backward" in key[0] for key in kernels(launched))


def test_off_a_gpu_nothing_is_rehearsed(monkeypatch):
    def refuse(*_):
        raise AssertionError("rehearsed")

    monkeypatch.setattr(ahead, "prepare", refuse)
    model = net()
    assert graphs.Ahead(model)(given("t2vt")) == 0
    assert graphs.warm_up(graphs.Ahead(model), PipelineConfig(), "v2t") == 0
    state = TrainState.create(model, tiny_training.config(batch_size=2))
    assert Ahead(state)(batch_of(model)) == 0


def test_on_a_gpu_a_shape_is_rehearsed_once(monkeypatch):
    seen = []

    def note(run, device, progress):
        with _triton.rehearsal(CARDS[90]) as launches:
            run()
        seen.append(kernels(launches))
        return len(seen[-1])

    monkeypatch.setattr(ahead, "prepare", note)
    model = net()
    ready = graphs.Ahead(model, torch.device("cuda"))
    assert ready(given("t2v")) > 0 and ready(given("t2v")) == 0 and len(seen) == 1
    assert ready(given("t2vt")) > 0 and seen[0] != seen[1]
    config = PipelineConfig(context_rows=C, text_rows=40, num_frames=5, height=32, width=32)
    assert graphs.warm_up(ready, config, "t2v") == sum(map(len, seen[2:]))
    assert len(seen) == 4 and seen[2] != seen[3]  # prompts of 20 tokens, and of 32
