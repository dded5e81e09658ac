"""Few steps: grids that are given, and the solver that noises the clean latents again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_sampling import SHAPE, T, finish, model, prompts

import engine
from engine import flow, sample, schedule
from engine.config import EMBEDDED
from engine.errors import UsageError
from engine.graphs import Graphs
from engine.planning import memory
from engine.run import Run
from univigu_kernels import bind
from univigu_kernels.flow_step import SolverState, VideoUpdate

OPS = bind("reference")
SIGMAS, TIMES = [1.0, 0.75, 0.5, 0.25], [1000.0, 757.0, 522.0]
SIZE = {"num_frames": 5, "height": 32, "width": 32, "progress": False}


def scheduler(solver: str, shift: float):
    import diffusers

    if solver == "unipc":
        kind = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        return diffusers.UniPCMultistepScheduler(flow_shift=shift, **kind)
    name = {"euler": "FlowMatchEulerDiscreteScheduler", "lcm": "FlowMatchLCMScheduler"}[solver]
    return getattr(diffusers, name)(shift=shift)


def stream(seed: int) -> torch.Generator:
    """What solver lcm draws from."""
    return torch.Generator().manual_seed(seed ^ schedule.NOISE_STREAM)


@pytest.mark.parametrize("solver", ["euler", "unipc", "lcm"])
@pytest.mark.parametrize(
    "given, shift",
    [
        ({"sigmas": SIGMAS}, 5.0),
        ({"sigmas": [0.97, 0.6, 0.1]}, 1.0),
        ({"sigmas": [1.0]}, 3.0),
        ({"timesteps": TIMES}, 1.0),
    ],
    ids=["shifted", "plain", "one", "timesteps"],
)
def test_a_given_grid_is_that_of_diffusers(solver, given, shift):
    """Times, and the end of a run with a velocity of the place and the time. diffusers' UniPC takes
    no timesteps: the same sigmas stand for them."""
    theirs, seed = scheduler(solver, shift), 11
    if solver == "unipc":
        given_sigmas = given.get("sigmas") or [t / 1000 for t in TIMES]
        theirs.set_timesteps(sigmas=np.array(given_sigmas))
    else:
        theirs.set_timesteps(**given)

    steps = len(theirs.timesteps)
    plan = schedule.schedule("t2v", steps, shift, solver, "exact", **given)
    ours = torch.tensor(plan.video_times)
    slack = 1 if solver == "unipc" and "timesteps" in given else 1e-4  # 1000 becomes 999 there
    assert (ours - theirs.timesteps).abs().max() <= slack

    x = expected = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    state, noise = SolverState(x, x, x, x), schedule.FreshNoise.draw(plan, x, [seed])
    draws = {"generator": stream(seed)} if solver == "lcm" else {}
    for i, t in enumerate(theirs.timesteps):
        field = lambda z: torch.tanh(z * (1 + i / steps)) - 0.3  # noqa: E731, B023
        expected = theirs.step(field(expected), t, expected, return_dict=False, **draws)[0]
        update = VideoUpdate(state, field(state.x), None, 1.0, plan.coefficients[i])
        state, _ = OPS.flow_step(update, None)
        noise.add_to(state.x, torch.tensor([i]))
    assert (state.x - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize("solver", ["euler", "unipc", "lcm"])
def test_a_grid_that_is_ones_own_changes_nothing(solver):
    """The default grid, spelled out before the shift or after it, gives the same numbers."""
    times, table = flow.video_schedule(solver, 4, 3.0)
    grid = torch.linspace(1, 1e-3, 5, dtype=torch.float64)[:-1] if solver == "unipc" else SIGMAS
    again = flow.video_schedule(solver, 4, 3.0, sigmas=list(grid))
    assert torch.equal(again[0], times) and torch.equal(again[1], table)
    if solver != "unipc":  # whose times are truncated
        again = flow.video_schedule(solver, 4, None, timesteps=times.tolist())
        torch.testing.assert_close(again[1], table, rtol=0, atol=1e-15)


def make(net, mode="t2v", B=2, graphs=None, solver="lcm", steps=4, seed=0, text_steps=None):
    plan = schedule.schedule(mode, steps, 3.0, solver, "exact", text_steps)
    seeds = list(range(seed, seed + B))
    latents, tokens = sample.video_noise(SHAPE, seeds, "cpu"), sample.text_source(net, T, seeds)
    context = prompts(1)[0].expand(B, -1, -1)
    request = sample.Request(plan, latents, tokens, context, seeds=seeds)
    return Run(net, request, graphs)


@pytest.mark.parametrize("text_steps", [None, 7, 2])
def test_lcm_noises_the_clean_latents_again(text_steps):
    """Against its two lines, evaluation by evaluation, with the model's own velocities; a text on a
    longer grid moves on between, a text on a shorter one waits."""
    net = model(torch.float32)
    run = make(net, "t2vt", B=1, text_steps=text_steps)
    draws, sigmas, moves = stream(0), flow.euler_sigmas(4, 3.0), 0
    for kind in run.kinds:
        before, tokens = run.latents, run.tokens
        h_BLD = run.step.features(kind, before, tokens)
        run.step(kind)
        if not kind.video:
            assert torch.equal(run.latents, before)
            continue

        (v,) = run.step._velocities(h_BLD)
        s, e = sigmas[moves : moves + 2]
        moves, clean = moves + 1, before - s * v
        noise = torch.randn(SHAPE, generator=draws) if e else 0
        torch.testing.assert_close(run.latents, (1 - e) * clean + e * noise, rtol=0, atol=2e-6)
    assert moves == 4 and len(run.kinds) == max(4, text_steps or 0)


def test_a_batch_is_its_singles_and_the_noise_is_a_seeds_own():
    net = model(torch.float32)
    together = finish(make(net, B=3, seed=5)).latents
    for i in range(3):
        alone = finish(make(net, B=1, seed=5 + i)).latents
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
    first = sample.video_noise(SHAPE, [5], "cpu")
    assert not torch.equal(make(net, B=1, seed=5).step.fresh.noise[0], first)


def test_noise_needs_a_seed_for_each_sample():
    plan = schedule.schedule("t2v", 4, 3.0, "lcm", "exact")
    with pytest.raises(UsageError, match="seeds must be 2, one per sample; got 1"):
        schedule.FreshNoise.draw(plan, torch.zeros(2, *SHAPE), [0])


@pytest.mark.parametrize("solver, steps", [("euler", 4), ("unipc", 4), ("lcm", 1)])
def test_no_noise_is_held_where_none_is_added(solver, steps):
    run = make(model(torch.float32), solver=solver, steps=steps)
    assert run.schedule.noise_count == 0 and run.step.fresh == (None, None, None)


def test_captured_lcm_equals_eager_and_follows_its_seeds():
    net, graphs = model(torch.float32, "auto"), Graphs(capture=lambda function, *_: function)
    first = make(net, "t2vt", graphs=graphs)
    held = {t.data_ptr() for t in first.step.tensors()}
    assert {t.data_ptr() for t in first.step.fresh} <= held
    finish(first)
    for seed in (5, 0):
        eager = finish(make(net, "t2vt", seed=seed))
        again = make(net, "t2vt", seed=seed, graphs=graphs)
        assert again.step is first.step
        assert torch.equal(finish(again).latents, eager.latents)
        assert torch.equal(again.tokens, eager.tokens)
    assert make(net, "t2vt", solver="euler", graphs=graphs).step is not first.step


def test_the_estimate_counts_the_noise():
    job = memory.Job(num_frames=5, height=32, width=32, batch=2)
    run = make(model(torch.float32))
    more = memory.latents(replace(job, noise_count=run.schedule.noise_count)) - memory.latents(job)
    latents = 4 * 2 * 16 * 2 * 4 * 4
    assert run.step.fresh.noise.nbytes == more == 3 * latents


@pytest.fixture(scope="module")
def pipe():
    return engine.Pipeline.from_pretrained(EMBEDDED, "cpu")


def test_a_run_of_few_steps_is_followed_and_saved(pipe, tmp_path):
    seen, given = [], {"solver": "lcm", "guidance_scale": 1.0, "mode": "t2vt", **SIZE}

    def note(pipe, step, time, tensors):
        seen.append(time)

    times = {"timesteps": np.array(TIMES), "callback_on_step_end": note}
    result = pipe.generate("a red circle", **times, **given)
    assert seen == TIMES
    record = json.loads(result.save(tmp_path / "clip.gif").read_text())["settings"]
    assert (record["timesteps"], record["num_inference_steps"]) == (TIMES, 3)
    assert record["solver"] == "lcm" and record["flow_shift"] is None and "sigmas" not in record
    assert "sampling" not in record
    again = pipe.generate("a red circle", sigmas=[t / 1000 for t in TIMES], flow_shift=1.0, **given)
    assert np.abs(result.frames.astype(int) - again.frames).max() <= 1


BAD = [
    ({"sigmas": SIGMAS, "num_inference_steps": 4}, "got num_inference_steps and sigmas. Leave out"),
    ({"sigmas": SIGMAS, "timesteps": TIMES}, "got sigmas and timesteps. Leave out"),
    ({"sigmas": [0.5, 0.5]}, "sigmas must be 1 to 10000 numbers that fall, .*; got .0.5, 0.5."),
    ({"sigmas": [1.5]}, "from at most 1 to above 0 .*; got .1.5."),
    ({"sigmas": [1.0, 0.0]}, "to above 0 .the 0 is added.; got .1.0, 0.0."),
    ({"sigmas": [float("nan")]}, "numbers that fall, .* got .nan."),
    ({"sigmas": []}, "sigmas must be 1 to 10000 numbers .* got .."),
    ({"sigmas": "1, 0.5"}, "sigmas must be 1 to 10000 numbers .* got '1, 0.5'"),
    ({"sigmas": [True]}, "sigmas must be 1 to 10000 numbers .* got .True."),
    ({"sigmas": ["1"]}, "sigmas must be 1 to 10000 numbers .* got .'1'."),
    ({"sigmas": np.linspace(1, 0.1, 10_001)}, "numbers that fall, .* got .1.0, 0.999"),
    ({"timesteps": [1000.5]}, "timesteps must be .* from at most 1000"),
    ({"timesteps": TIMES, "flow_shift": 3.0}, "flow_shift must be left out with timesteps"),
    ({"solver": "ddim"}, "solver must be one of euler, unipc, lcm; got 'ddim'"),
    ({"flow_shift": 0.0}, "flow_shift must be between 0.001 and 1000; got 0"),
    ({"flow_shift": 1e-17}, "flow_shift must be between 0.001 and 1000; got 1e-17"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[message for _, message in BAD])
def test_bad_grids_are_one_clear_error(pipe, changes, message):
    with pytest.raises(UsageError, match=message):
        pipe.generate("a red circle", **changes, **SIZE)
