"""Stage distill: what the student learns from whom, and that it is trained as the other stages
are."""

from copy import deepcopy
from dataclasses import replace

import parallel_runs as runs
import pytest
import torch
from checkpoint_runs import make_shard
from tiny_training import config, same
from tiny_training import distilling as settings
from tiny_training import lively as network
from torch.nn import functional as F

import engine
from engine import checkpoint, flow, train
from engine.cli import main
from engine.config import SamplingConfig, read_pipeline_config
from engine.errors import ModelFileError, UsageError
from engine.planning import forward_flops, train_flops
from engine.run import Run
from engine.sample import Request
from engine.schedule import Schedule, schedule
from engine.train import distill, dry_run
from engine.train.export import trained_model
from engine.train.step import backward, draws_of
from engine.weights import load_model, save_pretrained
from engine.weights.adapters import read_sampling


def new_state(net=None, **changes):
    net = net or network()
    return engine.TrainState.create(net, settings(**changes), teacher=deepcopy(net))


def a_batch(samples=4):
    return runs.make_batch((2, 4, 4), 7, samples)


def losses_of(state, batch):
    return state.objective(batch, draws_of(state, batch))


def test_the_gradient_is_that_of_finite_differences():
    batch = {k: v.double() if v.is_floating_point() else v for k, v in a_batch().items()}
    net = network(torch.float64)
    state = new_state(net)
    fixed = draws_of(state, batch)
    fixed = fixed._replace(noise=fixed.noise.double())

    def loss():
        video, text = state.objective(batch, fixed)
        return video + 0.3 * text

    loss().backward()
    g = torch.Generator().manual_seed(5)
    for name in ("blocks.0.ffn.up.weight", "text_head.linear.weight", "patch_embedding.weight"):
        p = net.get_parameter(name)
        along = torch.randn(p.shape, generator=g, dtype=p.dtype)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(along, alpha=sign * 1e-6)
                ends.append(loss())
                p.sub_(along, alpha=sign * 1e-6)
        found, expected = (p.grad * along).sum(), (ends[0] - ends[1]) / 2e-6
        assert expected.abs() > 1e-4 and (found - expected).abs() < 1e-6 * expected.abs() + 1e-9


def test_the_student_learns_to_lead_from_cut_to_cut_of_the_samplers_own_run():
    """The oracle is a whole run of `engine.sample` on the teacher, t2v."""
    teacher, batch = network(), a_batch()
    state = new_state(teacher, t2v_share=1.0, v2t_share=0.0, teacher_steps=4)
    fixed, scale = draws_of(state, batch), state.config.guidance_scale
    nulls, sigmas = batch["null_context"].expand_as(batch["context"]), flow.euler_sigmas(4, 3.0)
    plan = Schedule(
        [1000 * sigma for sigma in sigmas[:-1]],
        [0.0] * 4,
        [True] * 4,
        [False] * 4,
        flow.unipc_table([1 - 1e-6, *sigmas[1:]]).tolist(),
    )
    given = fixed.noise, batch["prompt_tokens"], batch["context"], nulls, scale
    lengths = batch["prompt_lengths"].tolist()
    whole = Run(teacher, Request(plan, *given, text_lengths=lengths, seeds=[0] * 4))
    path = [fixed.noise, *(whole.latents for _ in whole.steps())]

    expected, zero_B = [], torch.zeros(4)
    for i in (0, 2):
        rows = batch["prompt_tokens"], zero_B + 1000 * sigmas[i], zero_B, batch["context"]
        with torch.no_grad():
            own = state.model(path[i], *rows, batch["prompt_lengths"]).velocity
        target = (path[i + 2] - path[i]) / (sigmas[i + 2] - sigmas[i])
        expected.append((own - target).square().mean())
    video, text = losses_of(state, batch)
    torch.testing.assert_close(video, torch.stack(expected).mean(), rtol=1e-5, atol=1e-7)
    assert text.item() == 0, "prompts that stay as they are give no text loss"


def test_captions_are_of_the_clean_clip_and_give_no_video_loss():
    state, batch = new_state(t2v_share=0.0, v2t_share=1.0), a_batch()
    video, text = losses_of(state, batch)
    assert video.item() == 0 and text.item() > 1
    other = batch | {"context": batch["context"] + 1}  # no prompt is seen
    assert torch.equal(losses_of(state, other)[1], text)
    other = batch | {"latents": batch["latents"] + 1}
    assert not torch.equal(losses_of(state, other)[1], text)


def test_the_text_learns_what_the_teacher_says_of_its_own_clip():
    state, batch = new_state(t2v_share=0.0, v2t_share=0.0, student_steps=(1,)), a_batch()
    fixed, teacher, config = draws_of(state, batch), state.objective.teacher, state.config
    grid, cast = distill.grid_of(4, config.flow_shift), distill.cast_of(batch, fixed)
    seeds, scale = fixed.seeds_B, config.guidance_scale
    path = distill.teach(teacher, cast, fixed.noise, fixed.source, seeds, grid, scale)
    told = distill.tell(teacher, path[-1], fixed.source, seeds, grid)

    times = torch.full((4,), 1000.0)
    rows = fixed.noise, fixed.source, times, times, batch["context"]
    expected = F.cross_entropy(state.model(*rows).logits.transpose(1, 2), told)
    torch.testing.assert_close(losses_of(state, batch)[1], expected)
    assert not torch.equal(told, batch["caption_tokens"])


def test_joint_runs_of_the_teacher_are_those_of_the_sampler():
    """Tokens move the video: were they drawn otherwise, its latents would be others."""
    teacher, batch = network(), a_batch()
    state = new_state(teacher, t2v_share=0.0, v2t_share=0.0)
    fixed, grid = draws_of(state, batch), distill.grid_of(4, 3.0)
    cast = distill.cast_of(batch, fixed)
    path = distill.teach(teacher, cast, fixed.noise, fixed.source, fixed.seeds_B, grid, 3.0)
    plan = schedule("t2vt", 4, 3.0, "unipc", "exact")
    times = [1000 * sigma for sigma in grid.sigmas[:-1]]
    plan = replace(plan, video_times=times, coefficients=grid.rows)
    given = fixed.noise, fixed.source, cast.context, cast.null_context, 3.0
    whole = Run(teacher, Request(plan, *given, seeds=fixed.seeds_B.tolist()))
    assert len(list(whole.steps())) == 4
    torch.testing.assert_close(path[-1], whole.latents, rtol=1e-4, atol=1e-5)


def test_guidance_and_the_teachers_steps_move_the_goal():
    batch = a_batch()
    found = [
        losses_of(new_state(**changes), batch)[0].item()
        for changes in ({}, {"guidance_scale": 1.0}, {"teacher_steps": 2}, {"flow_shift": 5.0})
    ]
    assert len(set(found)) == 4


def test_steps_take_turns_with_the_numbers_of_the_student():
    state, batch, found = new_state(student_steps=(4, 2)), a_batch(), []
    for _ in range(4):
        found.append(draws_of(state, batch).keep_BKT.shape[1])
        engine.train_step(state, batch)
    assert found == [4, 2, 4, 2]


def test_losses_fall_and_the_teacher_stays():
    state, batch = new_state(steps=400, lr=5e-3), a_batch()
    kept = {name: p.clone() for name, p in state.objective.teacher.named_parameters()}
    with torch.no_grad():
        state.model.video_head.proj_out.weight.mul_(0.1)
    fixed = draws_of(state, batch)
    with torch.no_grad():
        before = state.objective(batch, fixed)
    for _ in range(40):
        engine.train_step(state, batch)
    with torch.no_grad():
        after = state.objective(batch, fixed)
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1]
    assert same(kept, dict(state.objective.teacher.named_parameters()))


def test_micro_batches_add_up_to_the_batch():
    found, batch = [], a_batch(8)
    for size in (0, 1, 3):
        state = new_state(batch_size=8, micro_batch_size=size)
        losses = backward(state, batch, draws_of(state, batch))
        found.append([losses, *(p.grad for p in state.model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() <= 5e-6 * a.norm() + 1e-9


def run(path, shard, stop=None, **changes):
    state = new_state(**changes)
    if (path / "checkpoint").exists():
        checkpoint.load(state, path / "checkpoint")
    if stop is None:
        train.fit(state, shard, path, progress=False)
        return state
    while state.step < stop:
        engine.train_step(state, shard.batch(shard.indices(state.step, 4, state.config.seed)))
    checkpoint.save(state, path / "checkpoint")
    return state


def test_resumed_training_is_bit_equal(tmp_path):
    shard, how = make_shard(tmp_path / "shard.safetensors"), {"student_steps": (4, 2)}
    whole = run(tmp_path / "whole", shard, **how)
    for stop in (1, 4, None):
        resumed = run(tmp_path / "cut", shard, stop, **how)
    assert same(whole.masters, resumed.masters) and same(whole.ema, resumed.ema)
    assert resumed.step == whole.step == 6


def test_a_run_is_not_resumed_with_another_teacher(tmp_path):
    shard = make_shard(tmp_path / "shard.safetensors")
    state = run(tmp_path, shard, 1)
    other = deepcopy(state.objective.teacher)
    with torch.no_grad():
        other.video_head.proj_out.bias.add_(1)
    again = engine.TrainState.create(network(), settings(), teacher=other)
    with pytest.raises(ModelFileError, match="the teacher must be that of"):
        checkpoint.load(again, tmp_path / "checkpoint")


def test_a_non_finite_step_changes_nothing_and_is_counted():
    state, batch = new_state(), a_batch()
    engine.train_step(state, batch)
    before = {name: p.detach().clone() for name, p in state.masters.items()}
    engine.train_step(state, batch | {"context": batch["context"] * float("nan")})
    assert same(before, state.masters) and state.skipped.item() == 1
    engine.train_step(state, batch)
    assert not same(before, state.masters) and state.skipped.item() == 1


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"student_steps": ()}, "student_steps must be given with stage=distill"),
        ({"stage": "refine"}, "student_steps must be left out without stage=distill"),
        ({"teacher_steps": 5}, "teacher_steps must be a multiple of student_steps 2; got 5"),
        ({"text_loss": "kl"}, "text_loss must be ce with stage=distill"),
        ({"text_exponent": 2.0}, "text_exponent must be 1.0 with stage=distill"),
    ],
)
def test_settings_that_do_not_go_together(wrong, said):
    with pytest.raises(UsageError, match=said):
        new_state(**wrong)


def test_teachers_that_do_not_go_with_the_student():
    net = network()
    with pytest.raises(UsageError, match="teacher must be given with stage=distill"):
        engine.TrainState.create(net, settings())
    with pytest.raises(UsageError, match="teacher must go with stage=distill; got refine"):
        engine.TrainState.create(net, config(), teacher=network())
    with pytest.raises(UsageError, match="vocab must be that of the teacher, 38; got 37"):
        engine.TrainState.create(net, settings(), teacher=network(vocab=38))
    with pytest.raises(UsageError, match="text_flow must be discrete"):
        engine.TrainState.create(net, settings(), teacher=network(text_flow="embedding"))


def test_an_adapter_and_a_model_say_how_they_are_sampled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shard(tmp_path / "shard.safetensors")
    base = network()
    save_pretrained(base, tmp_path / "base")
    flags = "train --stage distill --init-from base --teacher base --student-steps 2 --steps 2"
    flags += " --teacher-steps 4 --batch-size 4 --lora-rank 2 --data shard.safetensors --quiet"
    assert main([*flags.split(), "--output-path", "out"]) == 0

    how = {"flow_shift": 3.0, "solver": "euler", "guidance_scale": 1.0}
    expected = SamplingConfig(num_inference_steps=2, caption_steps=2, **how)
    assert read_pipeline_config(tmp_path / "out/model").sampling == expected
    assert read_sampling(tmp_path / "out/adapter") == expected
    more = flags.replace("--steps 2", "--steps 3").split()
    assert main([*more, "--output-path", "out", "--resume"]) == 0, "the run's own folder is its own"
    assert read_pipeline_config(tmp_path / "out/model").sampling == expected

    saved = load_model(tmp_path / "out" / "model")
    exported = trained_model(tmp_path / "out" / "checkpoint")
    ours, theirs = dict(saved.named_parameters()), dict(exported.named_parameters())
    assert same(ours, theirs) and not same(ours, dict(base.named_parameters()))


def test_a_dry_run_counts_the_teachers_weights():
    cfg, sizes = network().cfg, ((2, 4, 4), 7, 5)
    large = replace(cfg, layers=2)
    alone, beside = (
        dry_run.footprint(cfg, chosen, torch.float32, *sizes, teacher=teacher)
        for chosen, teacher in ((config(), None), (settings(student_steps=(4, 2)), large))
    )
    weights = sum(4 * p.numel() for p in engine.UniViGU(large).parameters())
    assert weights <= beside.state - alone.state < 1.01 * weights
    assert beside.peak - beside.state > alone.peak - alone.state, "four steps are kept"


def test_a_dry_run_asks_for_the_teachers_steps(capsys):
    flags = "train --preset tiny --output-path out --dry-run --batch-size 2 --stage distill"
    assert main([*flags.split(), "--student-steps", "4"]) == 2
    assert "--teacher must go with --stage distill" in capsys.readouterr().err


def test_flops_are_of_the_students_steps_and_the_teachers_evaluations():
    cfg = network().cfg
    sizes = {"samples": 4, "video_rows": 8, "text_rows": 7, "context_rows": 5}
    chosen = settings(student_steps=(4, 2), teacher_steps=8)
    large = replace(cfg, layers=3)
    for step, steps in ((0, 4), (1, 2)):
        expected = steps * train_flops(cfg, **sizes) + 24 * forward_flops(large, **sizes).total
        assert distill.step_flops(cfg, large, chosen, step, **sizes) == expected
