"""Flow mathematics against analytic truth."""

import math

import pytest
import torch
from scipy import stats

from engine import flow
from univigu_kernels import bind
from univigu_kernels.flow_step import SolverState, TextUpdate, VideoUpdate

OPS = bind("reference")


def solve(velocity, x, solver, sigmas):
    table = flow.euler_table(sigmas) if solver == "euler" else flow.unipc_table(sigmas)
    state = SolverState(x, x, x, x)
    for sigma, row in zip(sigmas, table, strict=False):
        state, _ = OPS.flow_step(VideoUpdate(state, velocity(state.x, sigma), None, 1.0, row), None)
    return state.x


def test_official_grid_values():
    grid = [1000 * s for s in flow.euler_sigmas(50, 3.0)]
    assert [round(v, 2) for v in (*grid[:4], grid[49], grid[50])] == [
        1000,
        993.24,
        986.3,
        979.17,
        57.69,
        0,
    ]
    assert round(1000 * flow.euler_sigmas(100, 3.0)[-2], 2) == 29.41


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_constant_velocity_is_exact(solver):
    x = torch.randn(2, 3, dtype=torch.float64)
    sigmas = flow.euler_sigmas(7, 3.0) if solver == "euler" else flow.unipc_sigmas(7, 3.0)
    end = solve(lambda x, s: torch.full_like(x, 0.7), x, solver, sigmas)
    torch.testing.assert_close(end, x - 0.7 * sigmas[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("unipc", 2)])
def test_solver_integrates_a_known_field_at_its_order(solver, order):
    """Gaussian data N(mu, s^2): the flow's velocity and its end point are known in closed form."""
    mu, s = 0.4, 0.5

    def velocity(x, sigma):
        spread = (1 - sigma) ** 2 * s**2 + sigma**2
        clean = mu + (1 - sigma) * s**2 / spread * (x - (1 - sigma) * mu)
        return (x - clean) / sigma

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors, (start, end) = [], (0.8, 0.2)  # finite log-SNR: Wan's grid jumps 13 nats at once
    spread = {sigma: math.sqrt((1 - sigma) ** 2 * s**2 + sigma**2) for sigma in (start, end)}
    exact = (1 - end) * mu + (x - (1 - start) * mu) * spread[end] / spread[start]
    for steps in (40, 80, 160, 320):
        sigmas = [start + (end - start) * i / steps for i in range(steps + 1)]
        errors.append((solve(velocity, x, solver, sigmas) - exact).abs().max().item())
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(r > order - 0.25 for r in rates), (errors, rates)


def test_unipc_equals_diffusers():
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    for steps in (1, 2, 3, 10, 50):
        scheduler.set_timesteps(steps)
        times, table = flow.video_schedule("unipc", steps, 3.0)
        assert times.tolist() == scheduler.timesteps.tolist()
        x = theirs = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(steps))
        state = SolverState(x, x, x, x)
        for i, t in enumerate(scheduler.timesteps):
            field = lambda z: torch.tanh(z * (1 + i / steps)) - 0.3  # noqa: E731, B023
            theirs = scheduler.step(field(theirs), t, theirs, return_dict=False)[0]
            state, _ = OPS.flow_step(
                VideoUpdate(state, field(state.x), None, 1.0, table[i].tolist()), None
            )
        assert (state.x - theirs).abs().max() < 2e-5 * theirs.abs().max(), steps


POSTERIOR = torch.tensor(
    [[0.5, 0.05, 0.05], [0.02, 0.3, 0.08]]
).double()  # p(a, b), a in {0,1}, b in {0,1,2}


def exact_posterior(tokens, t, mask):
    """Returns log p(x_1^i = k | x_t) under the mixture path, for two tokens drawn from the 2 x 3
    table."""
    rows, vocab = POSTERIOR.shape[0], 3
    joint = torch.zeros(vocab, vocab, dtype=torch.float64)
    joint[:rows] = POSTERIOR
    source = 0.0 if mask else 1 / vocab
    keep = torch.eye(vocab, dtype=torch.float64) * t + (1 - t) * source  # p(x_t | x_1)
    if mask:
        keep = torch.cat([keep, torch.full((1, vocab), 1 - t, dtype=torch.float64)])
    weight = joint[None] * keep[tokens[:, 0]][:, :, None] * keep[tokens[:, 1]][:, None, :]
    weight = weight / weight.sum((1, 2), keepdim=True)
    return torch.stack([weight.sum(2), weight.sum(1)], 1)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("steps", [64, 256, 1024])
def test_sampled_text_matches_its_marginals(steps, mask):
    """Every sampler step with the exact posterior of a known table. Steps factorise over tokens, an
    error of order 1/steps in the joint that the marginals don't have; all three must pass."""
    count = 4000
    generator = torch.Generator().manual_seed(steps + mask)
    seeds = torch.tensor([5], dtype=torch.int64)
    tokens = (
        torch.full((count, 2), 3) if mask else torch.randint(3, (count, 2), generator=generator)
    )

    for i in range(steps):
        t, after = i / steps, (i + 1) / steps
        probability = exact_posterior(tokens, t, mask)
        draw = torch.multinomial(probability.view(-1, 3), 1, generator=generator).view(count, 2)
        jump = flow.jump_probability(t, after)
        update = TextUpdate(tokens.view(1, -1), draw.view(1, -1), jump, seeds, i)
        tokens = OPS.flow_step(None, update)[1].view(count, 2)

    marginal_a = torch.bincount(tokens[:, 0], minlength=3)
    marginal_b = torch.bincount(tokens[:, 1], minlength=3)
    assert marginal_a[2] == 0
    for seen, expected in ((marginal_a[:2], POSTERIOR.sum(1)), (marginal_b, POSTERIOR.sum(0))):
        assert stats.chisquare(seen, expected / expected.sum() * count).pvalue > 1e-3

    if steps == 1024:
        seen = torch.bincount(tokens[:, 0] * 3 + tokens[:, 1], minlength=6)
        assert stats.chisquare(seen, (POSTERIOR / POSTERIOR.sum()).flatten() * count).pvalue > 1e-3


def test_jump_probability_telescopes_between_any_times():
    for n in (1.0, 2.0, 3.5):
        grid = [0.0, 0.1, 0.15, 0.6, 0.93, 1.0]
        stay = math.prod(
            1 - flow.jump_probability(a, b, n) for a, b in zip(grid, grid[1:-1], strict=False)
        )
        assert math.isclose(stay, 1 - grid[-2] ** n)
        assert flow.jump_probability(0.93, 1.0, n) == 1


def test_corrupted_tokens_keep_data_at_rate_kappa():
    clean, source = torch.ones(1, 20000, dtype=torch.long), torch.zeros(1, 20000, dtype=torch.long)
    noised = flow.corrupt_tokens(clean, source, torch.tensor([0.6]), 2.0, torch.rand(1, 20000))
    assert abs(noised.float().mean().item() - 0.36) < 0.015


def test_text_time_is_reversed_and_whole():
    t = torch.tensor([0.0, 0.12345, 1.0])
    assert flow.text_time(t).tolist() == [1000, 877, 0]


def test_generalized_kl_is_least_at_the_posterior():
    """The loss averaged over x_1 ~ p is minimised by logits = log p, and 0 for a certain, met
    token."""
    p, t = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.4])

    def loss(logits, noised):
        each = [
            flow.generalized_kl(
                logits[None, None], torch.tensor([[k]]), torch.tensor([[noised]]), t
            )
            for k in range(3)
        ]
        return sum(p[k] * each[k].item() for k in range(3))

    # posterior given x_t: weight of x_1 = x_t is raised by (t + (1-t)/3) / ((1-t)/3)
    for noised in range(3):
        raised = p.clone()
        raised[noised] *= (0.4 + 0.2) / 0.2
        p_saved, p = p, raised / raised.sum()
        best = loss(p.log(), noised)
        for _ in range(20):
            assert loss(p.log() + 0.3 * torch.randn(3), noised) > best - 1e-6
        p = p_saved
    certain = torch.tensor([100.0, 0.0, 0.0])[None, None]
    assert flow.generalized_kl(
        certain, torch.tensor([[0]]), torch.tensor([[0]]), t
    ).item() == pytest.approx(0, abs=1e-6)


def test_embedding_flow_decodes_its_own_vectors():
    table, ids = torch.randn(50, 16), torch.arange(50)[None]
    vectors = flow.unit_vectors(table[ids])
    assert torch.equal(flow.nearest_tokens(table, vectors + 0.1 * torch.randn_like(vectors)), ids)
    torch.testing.assert_close(vectors.square().mean(-1), torch.ones(1, 50))
