"""Training: what a step does, what it refuses, and that a run can be cut anywhere."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import config, model, same

import engine
from engine import checkpoint, flow, train
from engine.data import LatentSet
from engine.errors import ModelFileError, NonFinite, UsageError
from engine.train import loop, objective
from engine.train.step import backward, draws_of

T, C = 7, 5


@pytest.fixture
def shard(tmp_path):
    g = torch.Generator().manual_seed(0)
    n, vocab = 12, 37
    tensors = {
        "latents": torch.randn(n, 16, 2, 4, 4, generator=g).half(),
        "prompt_tokens": torch.randint(vocab, (n, T), generator=g),
        "prompt_lengths": torch.randint(2, T, (n,), generator=g),
        "caption_tokens": torch.randint(vocab, (n, T), generator=g),
        "context_index": torch.randint(3, (n,), generator=g),
        "contexts": torch.randn(3, C, 8, generator=g),
        "null_context": torch.randn(C, 8, generator=g),
    }
    save_file(tensors, tmp_path / "shard.safetensors", {"info": "{}"})
    return LatentSet(tmp_path / "shard.safetensors")


def parameters(state):
    return {k: p.detach().clone() for k, p in state.model.named_parameters()}


def run(shard, path, stop=None, **changes):
    state = engine.TrainState.create(model(), config(**changes))
    if (path / "checkpoint").exists():
        checkpoint.load(state, path / "checkpoint")
    full = state.config
    if stop is not None:
        while state.step < stop:
            indices = shard.indices(state.step, full.batch_size, full.seed)
            engine.train_step(state, shard.batch(indices))
        checkpoint.save(state, path / "checkpoint")
    else:
        train.fit(state, shard, path, log_every=1, progress=False)
    return state


def test_a_batch_is_what_a_step_is_said_to_take(shard):
    batch = shard.batch(torch.arange(4))
    assert batch.keys() == engine.Batch.__annotations__.keys()
    ids = batch["prompt_tokens"], batch["prompt_lengths"], batch["caption_tokens"]
    assert all(x.dtype == torch.int64 for x in ids)
    reals = batch["latents"], batch["context"], batch["null_context"]
    assert all(x.dtype == torch.float32 for x in reals)
    B, T = ids[0].shape
    assert B == 4 and ids[1].shape == (B,) and ids[2].shape == (B, T)
    assert reals[0].shape[:2] == (B, 16) and reals[1].shape == (B, *reals[2].shape)


def test_a_curve_of_the_learning_rate_may_be_given(shard):
    batch, asked = shard.batch(torch.arange(4)), []

    def share(step):
        asked.append(step)
        return (0.5, 0.0)[step]

    state = engine.TrainState.create(model(), config(), lr_share=share)
    first = engine.train_step(state, batch)["lr"]
    before = {name: p.detach().clone() for name, p in state.masters.items()}
    last = engine.train_step(state, batch)["lr"]
    assert asked == [0, 1] and (first, last) == (0.5 * state.config.lr, 0.0)
    assert all(torch.equal(before[name], p) for name, p in state.masters.items())


@pytest.mark.parametrize("stage", ["recall", "refine"])
@pytest.mark.parametrize(
    "changes,text_loss",
    [({}, "ce"), ({}, "kl"), ({"mask_source": True}, "kl"), ({"text_flow": "embedding"}, "ce")],
)
def test_both_losses_fall_on_one_batch(shard, stage, changes, text_loss):
    state = engine.TrainState.create(
        model(**changes),
        config(stage=stage, steps=400, lr=5e-3, condition_dropout=0.0, text_loss=text_loss),
    )
    batch = shard.batch(torch.arange(4))
    fixed = objective.draw(batch, state.config, state.model, 0)
    with torch.no_grad():
        before = objective.Objective(state.model, state.config)(batch, fixed)
    for _ in range(60):
        engine.train_step(state, batch)
    with torch.no_grad():
        after = objective.Objective(state.model, state.config)(batch, fixed)
    assert after[0] < 0.9 * before[0] and after[1] < 0.9 * before[1]


def test_micro_batches_add_up_to_the_batch(shard):
    """Rows of different lengths, corners and nulls among them."""
    found = []
    for size in (0, 1, 3):
        state = engine.TrainState.create(model(), config(batch_size=8, micro_batch_size=size))
        batch = shard.batch(torch.arange(8))
        losses = backward(state, batch, draws_of(state, batch))
        found.append([losses, *(p.grad for p in state.model.parameters())])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert (a - b).norm() <= 2e-6 * a.norm() + 1e-9


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
def test_resumed_training_is_bit_equal(shard, tmp_path, muon_lr):
    whole = run(shard, tmp_path / "whole", muon_lr=muon_lr)
    run(shard, tmp_path / "cut", stop=2, muon_lr=muon_lr)
    run(shard, tmp_path / "cut", stop=4, muon_lr=muon_lr)
    resumed = run(shard, tmp_path / "cut", muon_lr=muon_lr)
    assert same(parameters(whole), parameters(resumed)) and same(whole.ema, resumed.ema)
    assert resumed.step == whole.step == 6


def test_two_runs_of_one_seed_are_bit_equal_and_another_seed_differs(shard, tmp_path):
    a, b, c = (run(shard, tmp_path / n, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert same(parameters(a), parameters(b)) and not same(parameters(a), parameters(c))


def moments_of(state):
    return [m for optimizer in state.optimizers for m in optimizer.state.values()]


@pytest.mark.parametrize("muon_lr", [0.0, 0.02])
@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_non_finite_step_changes_nothing_and_is_counted(shard, poison, muon_lr):
    state = engine.TrainState.create(model(), config(muon_lr=muon_lr))
    batch = shard.batch(torch.arange(4))
    engine.train_step(state, batch)
    before, ema = parameters(state), {k: v.clone() for k, v in state.ema.items()}
    moments = [{k: v.clone() for k, v in m.items()} for m in moments_of(state)]

    if poison == "loss":
        batch = batch | {"latents": batch["latents"] * float("nan")}
        engine.train_step(state, batch)
    else:
        weight = state.model.video_head.proj_out.weight
        hook = weight.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), float("inf")))
        engine.train_step(state, batch)
        hook.remove()

    assert same(before, parameters(state)) and same(ema, state.ema)
    after = moments_of(state)
    assert all(torch.equal(a[k], b[k]) for a, b in zip(moments, after, strict=True) for k in a)
    assert state.skipped.item() == 1

    engine.train_step(state, shard.batch(torch.arange(4)))
    assert not same(before, parameters(state)) and state.skipped.item() == 1


def test_ten_bad_steps_in_a_row_end_the_run(shard, tmp_path):
    tensors = load_file(shard.shards[0].path)
    tensors["latents"] *= float("nan")
    save_file(tensors, tmp_path / "poisoned.safetensors")
    shard = LatentSet(tmp_path / "poisoned.safetensors")
    state = engine.TrainState.create(model(), config(steps=50))
    with pytest.raises(NonFinite, match="10 bad steps in a row up to step 10"):
        train.fit(state, shard, tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11)) and len(lines[0]["clips"]) == 4
    assert state.step == 11, "the tenth is read while the eleventh is under way"


def test_whether_a_step_was_skipped_is_read_a_step_later(shard, tmp_path, monkeypatch):
    """Read at once, a GPU would wait for the host at each step; before a save it is read anyway."""
    events = []

    def step(state, batch):
        metrics = engine.train_step(state, batch)
        state.skipped += state.step in (3, 6)
        events.append(state.step)
        return metrics

    def written(journal, record):
        events.extend([f"skipped {record['step']}"] if "skipped" in record else [])

    monkeypatch.setattr("engine.train.loop.train_step", step)
    monkeypatch.setattr("engine.train.loop.Journal.write", written)
    state = engine.TrainState.create(model(), config(steps=6))
    train.fit(state, shard, tmp_path, log_every=100, progress=False)
    assert events == [1, 2, 3, 4, "skipped 3", 5, 6, "skipped 6"]


def test_what_is_read_late_is_what_it_was():
    x = torch.ones(())
    read = loop.late(x)
    x += 1
    assert read() == 1


def test_metrics_are_written(shard, tmp_path):
    run(shard, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "loss_video", "loss_text", "grad_norm", "lr", "samples_per_s"} <= set(lines[0])


def test_a_checkpoint_of_other_settings_is_refused(shard, tmp_path):
    run(shard, tmp_path, stop=1)
    with pytest.raises(ModelFileError, match="lr"):
        run(shard, tmp_path, lr=1e-3)


def test_an_epoch_reads_every_clip_once_in_a_new_order(shard):
    epochs = [
        torch.cat([shard.indices(e * 3 + i, 4, 0) for i in range(3)]).tolist() for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(12)) and epochs[0] != epochs[1]
    with pytest.raises(UsageError, match="batch_size"):
        shard.indices(0, 13, 0)


def test_the_condition_is_dropped_at_its_rate_to_both_nulls(shard):
    batch = {
        k: v.repeat(200, *[1] * (v.ndim - 1)) if k != "null_context" else v
        for k, v in shard.batch(torch.arange(10)).items()
    }
    settings = config(stage="recall", v2t_share=0.0)
    context = objective.drop_condition(batch, objective.draw(batch, settings, model(), 0))
    zeros = (context == 0).all(-1).all(-1)
    empty = (context == batch["null_context"]).all(-1).all(-1)
    assert (
        abs((zeros | empty).float().mean() - 0.8) < 0.03 and abs(zeros.float().mean() - 0.4) < 0.03
    )


def test_the_t2v_corner_sees_the_clean_prompt_and_gives_no_text_loss(shard):
    batch, net = shard.batch(torch.arange(8)), model()
    settings = config(t2v_share=1.0, v2t_share=0.0)
    draws = objective.draw(batch, settings, net, 0)
    rows, targets, times = objective.text_rows(net, batch, draws, settings)
    assert (
        torch.equal(rows, batch["prompt_tokens"])
        and (times == 0).all()
        and (targets == objective.IGNORE).all()
    )
    assert objective.Objective(net, settings)(batch, draws)[1].item() == 0


def test_the_v2t_corner_sees_the_clean_video_without_a_condition_and_gives_no_video_loss(shard):
    batch, net = shard.batch(torch.arange(8)), model()
    settings = config(t2v_share=0.0, v2t_share=1.0, condition_dropout=0.0)
    draws = objective.draw(batch, settings, net, 0)
    assert (draws.sigma_B == 0).all() and (objective.drop_condition(batch, draws) == 0).all()
    video, text = objective.Objective(net, settings)(batch, draws)
    assert video.item() == 0 and text.item() > 1


def test_a_corner_counts_its_samples_out_of_the_mean(shard):
    batch, net, settings = shard.batch(torch.arange(8)), model(), config()
    draws = objective.draw(batch, settings, net, 1)
    assert 0 < draws.t2v_B.sum() < 8 and 0 < draws.v2t_B.sum() < 8
    video, _ = objective.Objective(net, settings)(batch, draws)
    kept = ~draws.v2t_B
    part = {k: v[kept] if k != "null_context" else v for k, v in batch.items()}
    part_draws = objective.Draws(*(x[kept] for x in draws))
    torch.testing.assert_close(objective.Objective(net, settings)(part, part_draws)[0], video)


def test_the_stages_learn_their_own_targets_with_independent_times(shard):
    batch, net = shard.batch(torch.arange(12)), model()
    for stage, name in (("recall", "prompt_tokens"), ("refine", "caption_tokens")):
        settings = config(stage=stage, t2v_share=0.0, v2t_share=0.0)
        draws = objective.draw(batch, settings, net, 0)
        rows, targets, times = objective.text_rows(net, batch, draws, settings)
        assert torch.equal(targets, batch[name])
        assert torch.equal(times, flow.text_time(draws.t_B))
        kept = draws.keep_BT < draws.t_B[:, None]
        assert torch.equal(rows[kept], batch[name][kept]) and torch.equal(
            rows[~kept], draws.source[~kept]
        )
        assert not torch.equal(draws.sigma_B, 1 - draws.t_B)


def test_losses_are_means_over_their_own_tokens(shard):
    """Twice the video rows or twice the text rows leave the other loss as it is: token-count
    normalisation."""
    settings = config(t2v_share=0.0, v2t_share=0.0)
    batch, net = shard.batch(torch.arange(4)), model()
    draws = objective.draw(batch, settings, net, 0)
    video, text = objective.Objective(net, settings)(batch, draws)
    out = net(
        *(flow.corrupt_video(batch["latents"], draws.noise, draws.sigma_B)[0],),
        objective.text_rows(net, batch, draws, settings)[0],
        1000 * draws.sigma_B,
        flow.text_time(draws.t_B),
        objective.drop_condition(batch, draws),
    )
    target = flow.corrupt_video(batch["latents"], draws.noise, draws.sigma_B)[1]
    torch.testing.assert_close(video, (out.velocity - target).square().sum() / target.numel())
    each = -out.logits.log_softmax(-1).gather(-1, batch["caption_tokens"][..., None])
    torch.testing.assert_close(text, each.sum() / each.numel())
