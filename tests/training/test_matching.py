"""Distribution matching of stage distill: which way clips are told to move, who learns from what,
and that it is trained as the rest is."""

from copy import deepcopy
from dataclasses import replace

import parallel_runs as runs
import pytest
import torch
from checkpoint_runs import make_shard
from safetensors.torch import load_file
from tiny_training import distilling, same
from tiny_training import lively as network

import engine
from engine import checkpoint, flow
from engine.cli import main
from engine.config import TrainConfig
from engine.errors import UsageError
from engine.planning import forward_flops, train_flops
from engine.train import distill, dry_run, lora
from engine.train.cast import cast_of
from engine.train.export import trained_model
from engine.train.matching import Matching, velocity
from engine.train.step import backward, draws_of
from engine.weights import load_model, save_pretrained


def settings(**changes) -> TrainConfig:
    return distilling(**{"matching": 0.5, "warmup": 0} | changes)


def new_state(net=None, **changes):
    net = net or network()
    return engine.TrainState.create(net, settings(**changes), teacher=deepcopy(net))


def a_batch(samples=4):
    return runs.make_batch((2, 4, 4), 7, samples)


def shifted(net, by=0.3):
    """Another network: a copy whose weights are moved."""
    other, g = deepcopy(net), torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(by * p.std(correction=0) * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return other


@pytest.fixture
def case():
    """(matching, teacher, clip, tokens, cast, draws) in fp64; the teacher is not the score."""
    batch = {k: v.double() if v.is_floating_point() else v for k, v in a_batch(8).items()}
    net = network(torch.float64)
    config = settings(batch_size=8, t2v_share=0.3, v2t_share=0.3)
    fixed = distill.draw_runs(batch, config, net, 0)
    fixed = fixed._replace(noises=fixed.noises.double(), sigma_B2=fixed.sigma_B2.double())
    assert 0 < fixed.v2t_B.sum() < 8 and 0 < fixed.t2v_B.sum() < 8
    clip = batch["latents"].clone().requires_grad_(True)
    teacher, tokens = shifted(net), batch["caption_tokens"]
    return Matching(net, config), teacher, clip, tokens, cast_of(batch, fixed), fixed


def test_the_gradient_is_the_direction_from_the_score_to_the_guided_teacher(case):
    """Sample by sample, by the whole network's own call."""
    matching, teacher, clip, tokens, cast, draws = case
    match, _ = matching(teacher, clip, tokens, cast, draws)
    match.backward()
    assert draws.match_share_B.sum().item() == pytest.approx(1)

    for b, share in enumerate(draws.match_share_B.tolist()):
        if not share:
            assert cast.v2t_B[b] and not clip.grad[b].any()
            continue
        own, sigma = clip.detach()[b : b + 1], draws.sigma_B2[b, 0]
        noised = (1 - sigma) * own + sigma * draws.noises[b : b + 1, 0]
        times = flow.TIMES * sigma[None], torch.zeros(1)

        def clean(net, context, noised=noised, sigma=sigma, times=times, b=b):
            """What a network takes the noised clip for."""
            given = noised, tokens[b : b + 1], *times, context[b : b + 1]
            return noised - sigma * net(*given, cast.lengths_B[b : b + 1]).velocity

        null = clean(teacher, cast.null_context)
        real = null + matching.config.guidance_scale * (clean(teacher, cast.context) - null)
        fake = clean(matching.score, cast.context)
        expected = (fake - real) / (own - real).abs().mean()
        expected = share * expected[0] / own.numel()
        torch.testing.assert_close(clip.grad[b], expected, rtol=1e-5, atol=1e-9)


def test_nothing_moves_where_the_score_is_the_teacher(case):
    matching, _, clip, tokens, cast, draws = case
    matching.config = replace(matching.config, guidance_scale=1.0)
    match, _ = matching(matching.score, clip, tokens, cast, draws)
    match.backward()
    assert clip.grad.abs().max() < 1e-12


def test_the_score_learns_the_velocity_of_the_students_clips_and_the_student_nothing_of_it(case):
    matching, teacher, clip, tokens, cast, draws = case
    teacher.requires_grad_(False)
    match, missed = matching(teacher, clip, tokens, cast, draws)
    assert torch.autograd.grad(missed, clip, allow_unused=True, retain_graph=True) == (None,)
    assert not torch.autograd.grad(match, [*matching.score.parameters()], allow_unused=True)[0]

    sigma = draws.sigma_B2[:, 1].view(-1, 1, 1, 1, 1)
    noised = (1 - sigma) * clip.detach() + sigma * draws.noises[:, 1]
    found = velocity(matching.score, noised, draws.sigma_B2[:, 1], tokens, cast)
    squares = (found - (draws.noises[:, 1] - clip.detach())).square().mean((1, 2, 3, 4))
    assert missed.item() == pytest.approx((squares * draws.video_share_B).sum().item())


def test_the_clip_is_that_of_the_students_own_run(monkeypatch):
    """From the noise, by Euler's rule, with the caption that the teacher gave its own clip."""
    batch, state, seen = a_batch(), new_state(t2v_share=1.0, v2t_share=0.0), []
    monkeypatch.setattr(Matching, "forward", lambda self, *given: seen.extend(given) or [])
    fixed = draws_of(state, batch)
    state.objective(batch, fixed)
    _, clip, tokens, *_ = seen

    x, sigmas = fixed.noise, flow.euler_sigmas(2, 3.0)
    for sigma, after in zip(sigmas, sigmas[1:], strict=False):
        times = torch.full((4,), flow.TIMES * sigma), torch.zeros(4)
        given = x, batch["prompt_tokens"], *times, batch["context"], batch["prompt_lengths"]
        x = x + (after - sigma) * state.model(*given).velocity
    torch.testing.assert_close(clip, x, rtol=1e-4, atol=1e-5)
    assert clip.requires_grad and torch.equal(tokens, batch["prompt_tokens"])


def test_the_warm_up_teaches_the_score_alone():
    """A student that stays takes no step of it; its score does."""
    state, batch = new_state(warmup=2, steps=9), a_batch()
    found = [engine.train_step(state, batch) for _ in range(3)]
    assert [bool(one["loss_match"]) for one in found] == [False, False, True]
    assert all(one["loss_score"] > 0 for one in found)
    score, teacher = state.objective.matching.score, state.objective.teacher
    assert not torch.equal(score.blocks[0].ffn.up.weight, teacher.blocks[0].ffn.up.weight)
    assert same(
        dict(score.text_head.named_parameters()), dict(teacher.text_head.named_parameters())
    )


def test_the_score_s_loss_falls_on_the_clips_of_a_student():
    state, batch = new_state(steps=400, lr=3e-3, warmup=200), a_batch()
    fixed = draws_of(state, batch)
    with torch.no_grad():
        for p in state.objective.matching.score.video_head.parameters():
            p.mul_(4)
        before = state.objective(batch, fixed)[3]
    for _ in range(40):
        engine.train_step(state, batch)
    with torch.no_grad():
        assert state.objective(batch, fixed)[3] < 0.9 * before


def test_micro_batches_add_up_to_the_batch():
    found, batch = [], a_batch(8)
    for size in (0, 1, 3):
        state = new_state(batch_size=8, micro_batch_size=size)
        losses = backward(state, batch, draws_of(state, batch))
        found.append([losses, *(p.grad for p in state.masters.values() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) == len(found[2])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() <= 5e-6 * a.norm() + 1e-9


@pytest.mark.parametrize("how", [{}, {"lora_rank": 2}, {"muon_lr": 0.01, "ema": 0.0}])
def test_resumed_training_is_bit_equal_and_the_model_is_saved_alone(tmp_path, how):
    shard = make_shard(tmp_path / "shard.safetensors")
    whole, cut = (new_state(warmup=1, **how) for _ in range(2))
    for state in (whole, cut):
        while state.step < 3:
            engine.train_step(state, shard.batch(shard.indices(state.step, 4, 3)))
    checkpoint.save(cut, tmp_path / "checkpoint")
    again = new_state(warmup=1, **how)
    checkpoint.load(again, tmp_path / "checkpoint")
    for state in (whole, again):
        while state.step < 5:
            engine.train_step(state, shard.batch(shard.indices(state.step, 4, 3)))
    assert same(whole.masters, again.masters) and same(whole.ema, again.ema)
    assert any(name.startswith("score.blocks.") for name in again.masters)

    if "lora_rank" in how:
        again.save_adapter(tmp_path / "adapter")
        names = load_file(tmp_path / "adapter" / lora.FILE)
        assert names and not [name for name in names if "score" in name]
    else:
        model = load_model(tmp_path / "checkpoint")
        ours = cut.ema or cut.masters
        assert all(torch.equal(p, ours[n]) for n, p in model.named_parameters())
    assert set(again.ema) == {n for n in again.masters if "score." not in n and again.ema}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_bf16_model_has_masters_of_its_score_whatever_the_teachers_dtype(dtype):
    teacher = network(dtype)
    state = engine.TrainState.create(network(torch.bfloat16), settings(), teacher=teacher)
    before = state.masters["score.blocks.0.ffn.up.weight"].clone()
    engine.train_step(state, a_batch())
    after, score = state.masters["score.blocks.0.ffn.up.weight"], state.objective.matching.score
    assert after.dtype == torch.float32 and not torch.equal(before, after)
    assert torch.equal(score.blocks[0].ffn.up.weight, after.bfloat16())


def test_a_non_finite_step_changes_neither_network():
    state, batch = new_state(), a_batch()
    before = {name: p.detach().clone() for name, p in state.masters.items()}
    engine.train_step(state, batch | {"context": batch["context"] * float("nan")})
    assert same(before, state.masters) and state.skipped.item() == 1


def test_the_weight_weighs_the_direction_alone():
    batch, found = a_batch(), []
    for weight in (1.0, 2.0):
        state = new_state(matching=weight)
        found.append({k: float(v) for k, v in engine.train_step(state, batch).items()})
    one, two = found
    assert one["loss_match"] == two["loss_match"] > 0 and one["loss_score"] == two["loss_score"]
    assert two["loss"] - one["loss"] == pytest.approx(one["loss_match"], abs=1e-6)


def test_a_frozen_student_of_another_teacher_is_exported(tmp_path, monkeypatch):
    """The score has the teacher's form, which the checkpoint says."""
    monkeypatch.chdir(tmp_path)
    make_shard(tmp_path / "shard.safetensors")
    save_pretrained(network(), tmp_path / "base")
    save_pretrained(network(layers=2), tmp_path / "large")
    flags = "train --stage distill --init-from base --teacher large --student-steps 2 --steps 2"
    flags += " --teacher-steps 4 --batch-size 4 --lora-rank 2 --data shard.safetensors --quiet"
    flags += " --matching 1 --warmup 1"
    assert main([*flags.split(), "--output-path", "out"]) == 0
    saved, exported = load_model("out/model"), trained_model("out/checkpoint")
    assert same(dict(saved.named_parameters()), dict(exported.named_parameters()))


def test_what_does_not_go_with_it_is_refused(tmp_path):
    plain = replace(settings(), stage="refine", student_steps=())
    with pytest.raises(UsageError, match="matching must be 0 without stage=distill; got 0.5"):
        engine.TrainState.create(network(), plain)
    with pytest.raises(UsageError, match="matching must be at least 0"):
        settings(matching=-1.0)

    shard, net = make_shard(tmp_path / "shard.safetensors"), network()
    config = distilling(steps=1)
    distill.write_ahead(net, shard, config, tmp_path / "ahead")
    ahead = distill.Trajectories(tmp_path / "ahead")
    with pytest.raises(UsageError, match="matching must be 0 with trajectories"):
        engine.TrainState.create(network(), replace(config, matching=1.0), teacher=ahead)


def test_a_dry_run_counts_the_score_and_its_evaluations():
    cfg, sizes = network().cfg, ((2, 4, 4), 7, 5)
    plain, matched = (
        dry_run.footprint(cfg, settings(matching=weight), torch.float32, *sizes, teacher=cfg)
        for weight in (0.0, 1.0)
    )
    own = engine.UniViGU(cfg)
    weights = sum(p.numel() for p in own.parameters())
    trained = weights - sum(p.numel() for p in own.text_head.parameters())
    drawn = 4 * 2 * 4 * 16 * 2 * 4 * 4  # bytes of two noises for each of four samples
    expected = 4 * weights + 8 * trained + drawn  # itself, and two moments
    assert expected <= matched.state - plain.state < 1.01 * expected
    assert matched.peak - matched.state > plain.peak - plain.state

    rows = {"samples": 4, "video_rows": 8, "text_rows": 7, "context_rows": 5}
    counts = [
        distill.step_flops(cfg, cfg, settings(matching=weight), 0, **rows) for weight in (0.0, 1.0)
    ]
    more = 3 * train_flops(cfg, **rows) + 3 * forward_flops(cfg, **rows).total
    assert counts[1] - counts[0] == more
