"""The sampling loops on a random model: equivalences, never quality."""

from dataclasses import replace

import pytest
import torch

import engine
from engine import flow, sample, schedule
from engine.errors import NonFinite, UsageError
from engine.run import Run

SHAPE, T, C = (16, 2, 4, 4), 6, 5


def model(**changes):
    torch.manual_seed(0)
    cfg = replace(
        engine.ModelConfig.preset("tiny"),
        layers=2,
        heads=2,
        head_dim=16,
        ffn_dim=32,
        text_dim=8,
        **changes,
    )
    net = engine.UniViGU(cfg)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def contexts(B):
    g = torch.Generator().manual_seed(9)
    return torch.randn(B, C, 8, generator=g), torch.randn(B, C, 8, generator=g)


def run(net, mode, seeds, steps=4, guidance=3.0, context=None, **choices):
    plan = schedule.schedule(
        mode, steps, 3.0, choices.pop("solver", "unipc"), choices.pop("sampler", "exact")
    )
    cond, null = context or contexts(len(seeds))
    latents = sample.video_noise(SHAPE, seeds, "cpu")
    tokens = sample.text_source(net, T, seeds)
    null = null if guidance > 1 else None
    request = sample.Request(plan, latents, tokens, cond, null, guidance, seeds=seeds, **choices)
    r = Run(net, request)
    for _ in r.steps():
        pass
    return r


@pytest.mark.parametrize("mode", ["t2v", "t2vt", "v2t"])
@pytest.mark.parametrize("changes", [{}, {"mask_source": True}, {"text_flow": "embedding"}])
def test_a_batch_equals_its_singles(mode, changes):
    net, seeds = model(**changes), [5, 11, 2]
    cond, null = contexts(3)
    together = run(net, mode, seeds, context=(cond, null))
    for b, seed in enumerate(seeds):
        alone = run(net, mode, [seed], context=(cond[b : b + 1], null[b : b + 1]))
        torch.testing.assert_close(together.latents[b], alone.latents[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.tokens[b], alone.tokens[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["t2v", "t2vt", "v2t"])
def test_a_seed_repeats_and_another_differs(mode):
    net = model()
    a, b, c = (run(net, mode, [s], context=contexts(1)) for s in (1, 1, 2))
    assert torch.equal(a.latents, b.latents) and torch.equal(a.tokens, b.tokens)
    assert not (torch.equal(a.latents, c.latents) and torch.equal(a.tokens, c.tokens))


def test_what_stands_still_stays_clean():
    net = model()
    t2v, v2t = run(net, "t2v", [3]), run(net, "v2t", [3])
    assert torch.equal(t2v.tokens, sample.text_source(net, T, [3]))
    assert torch.equal(v2t.latents, sample.video_noise(SHAPE, [3], "cpu"))


def test_t2v_by_hand_with_guidance():
    """Two passes per step, the null one with the same text rows, and the Euler increment of the
    spec."""
    net, (cond, null) = model(), contexts(2)
    tokens, lengths = torch.randint(37, (2, T)), [6, 3]
    x = noise = sample.video_noise(SHAPE, [0, 1], "cpu")
    plan = schedule.schedule("t2v", 5, 3.0, "euler", "exact")
    r = Run(net, sample.Request(plan, noise, tokens, cond, null, 5.0, lengths, (0, 1)))
    list(r.steps())
    sigmas, zero = flow.euler_sigmas(5, 3.0), torch.zeros(2)
    with torch.no_grad():
        for s, e in zip(sigmas, sigmas[1:], strict=False):
            times = torch.full((2,), 1000 * s), zero
            c, u = (
                net(x, tokens, *times, ctx, text_lengths=torch.tensor(lengths)).velocity
                for ctx in (cond, null)
            )
            x = x + (e - s) * (u + 5.0 * (c - u))
    torch.testing.assert_close(r.latents, x, rtol=1e-4, atol=1e-5)


def test_legacy_t2vt_by_hand():
    """The official joint heuristic: the video's shifted clock for both, p = i/(N-1), argmax of one
    more pass."""
    net, (cond, _) = model(), contexts(1)
    plan = schedule.schedule("t2vt", 4, 3.0, "euler", "legacy")
    assert plan.text_times == plan.video_times and plan.last_argmax
    assert plan.probabilities == [0, 1 / 3, 2 / 3, 1]
    r = run(net, "t2vt", [4], guidance=1.0, context=(cond, cond), solver="euler", sampler="legacy")
    zero = torch.zeros(1)
    request = sample.Request(
        replace(plan, last_argmax=False),
        sample.video_noise(SHAPE, [4], "cpu"),
        sample.text_source(net, T, [4]),
        cond,
        seeds=[4],
    )
    steps = Run(net, request)
    list(steps.steps())
    with torch.no_grad():
        logits = net(steps.latents, steps.tokens, zero, zero, cond).logits
    assert torch.equal(r.tokens, logits.argmax(-1))


def test_exact_v2t_uses_rounded_times_and_exact_jumps():
    plan = schedule.schedule("v2t", 7, 3.0, "euler", "exact")
    assert plan.video_times == [0.0] * 7
    assert plan.text_times == [round(1000 * (1 - i / 7)) for i in range(7)]
    assert plan.probabilities[0] == pytest.approx(1 / 7) and plan.probabilities[-1] == 1
    legacy = schedule.schedule("v2t", 7, 3.0, "euler", "legacy")
    assert (
        legacy.probabilities[0] == pytest.approx(0.13312, abs=1e-5)
        and legacy.probabilities[-1] == 1
    )


def test_the_last_step_replaces_every_token_of_a_mask_source():
    net = model(mask_source=True)
    with torch.no_grad():
        net.text_head.linear.bias[-1] = -1e4  # the mask id itself is never drawn
    assert (run(net, "v2t", [0, 1]).tokens < net.cfg.vocab).all()


def test_nan_is_stopped_with_step_and_block():
    net = model()
    with torch.no_grad():
        net.blocks[1].ffn.down.bias[0] = float("nan")
    with pytest.raises(NonFinite, match="step 0, first in block 1"):
        run(net, "t2v", [0])


def test_nan_in_the_text_rows_of_v2t_is_stopped():
    net = model()
    with torch.no_grad():
        net.blocks[0].ffn_t.down.bias[0] = float("inf")
    with pytest.raises(NonFinite, match="step 0, first in block 0"):
        run(net, "v2t", [0])


def test_unknown_choices_are_named():
    cfg = engine.ModelConfig.preset("tiny")
    for args in (("x", "euler", "exact"), ("t2v", "x", "exact"), ("t2v", "euler", "x")):
        with pytest.raises(UsageError, match="got 'x'"):
            schedule.check_choices(cfg, *args)
    with pytest.raises(UsageError, match="legacy"):
        schedule.check_choices(replace(cfg, text_flow="embedding"), "t2vt", "euler", "legacy")
