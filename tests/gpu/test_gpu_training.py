"""Training on a CUDA device: a step does not wait for it, skips what is not finite, and comes out
the same in all recompute policies."""

from dataclasses import replace

import parallel_runs as runs
import pytest
import torch
from tiny_training import config, model

import engine
from engine.train import loop, step

pytestmark = pytest.mark.gpu
ROWS = runs.make_batch((2, 4, 8), 8)


def states(**settings):
    cfg = replace(model().cfg, layers=2, head_dim=64)
    torch.manual_seed(0)
    net = engine.UniViGU(cfg, "cuda", torch.bfloat16)
    torch.nn.init.normal_(net.text_head.linear.weight, std=0.1)
    return engine.TrainState.create(net, config(**settings))


def on_gpu():
    return {name: x.cuda() for name, x in ROWS.items()}


def test_a_step_does_not_wait_for_the_device():
    state, rows = states(muon_lr=0.01, micro_batch_size=2), on_gpu()
    engine.train_step(state, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.train_step(state, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_recomputing_changes_no_gradient():
    found = []
    for policy in ("none", "attention", "block"):
        state, rows = states(recompute=policy), on_gpu()
        step.backward(state, rows, step.draws_of(state, rows))
        found.append([master.grad for master in state.masters.values()])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_a_step_that_is_not_finite_changes_nothing():
    state, rows = states(muon_lr=0.01), on_gpu()
    engine.train_step(state, rows)
    before = [p.detach().clone() for p in state.masters.values()]
    bad = rows | {"latents": torch.full_like(rows["latents"], torch.nan)}
    engine.train_step(state, bad)
    assert state.skipped.item() == 1
    assert all(map(torch.equal, before, state.masters.values()))
    engine.train_step(state, rows)
    assert not all(map(torch.equal, before, state.masters.values()))


def test_what_is_read_late_waits_for_what_came_before_it_alone():
    x = torch.ones((), device="cuda")
    read = loop.late(x)
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    x += 1
    assert read() == 1 and not torch.cuda.current_stream().query()
