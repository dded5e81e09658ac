"""flow_step: solver rows, guidance, token jumps."""

import pytest
import torch

from univigu_kernels import OPS, SolverState, TextUpdate, VideoUpdate

flow_step = OPS["flow_step"].reference


def random_state(dtype=torch.float64):
    return SolverState(*torch.randn(4, 2, 16, 3, 4, 4, dtype=dtype))


def euler(sigma, after):
    return (sigma, 1, 0, 0, 0, 0, after / sigma, 1 - after / sigma, 0)


@pytest.mark.parametrize("sigma, after", [(1.0, 0.9), (0.3, 0.1), (0.02, 0.0)])
def test_euler_row(sigma, after):
    state, velocity = random_state(), torch.randn(2, 16, 3, 4, 4, dtype=torch.float64)
    new, tokens = flow_step(VideoUpdate(state, velocity, None, 5.0, euler(sigma, after)), None)
    assert tokens is None
    torch.testing.assert_close(new.x, state.x + (after - sigma) * velocity)
    torch.testing.assert_close(new.m1, state.x - sigma * velocity)
    assert torch.equal(new.corrected, state.x) and torch.equal(new.m2, state.m1)


def test_every_coefficient_has_its_place():
    state, velocity = random_state(), torch.randn(2, 16, 3, 4, 4, dtype=torch.float64)
    row = torch.rand(9, dtype=torch.float64)
    sigma, c_x, c_corrected, c_m0, c_m1, c_m2, p_x, p_m0, p_m1 = row.tolist()
    m0 = state.x - sigma * velocity
    corrected = (
        c_x * state.x
        + c_corrected * state.corrected
        + c_m0 * m0
        + c_m1 * state.m1
        + c_m2 * state.m2
    )
    expected = SolverState(p_x * corrected + p_m0 * m0 + p_m1 * state.m1, corrected, m0, state.m1)
    for coefficients in (row, row.tolist()):
        new, _ = flow_step(VideoUpdate(state, velocity, None, 1.0, coefficients), None)
        for a, b in zip(new, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_guidance():
    state, (velocity, null) = random_state(), torch.randn(2, 2, 16, 3, 4, 4, dtype=torch.float64)
    row = euler(0.5, 0.4)
    guided, _ = flow_step(VideoUpdate(state, velocity, null, 5.0, row), None)
    combined = null + 5.0 * (velocity - null)
    plain, _ = flow_step(VideoUpdate(state, combined, None, 1.0, row), None)
    for a, b in zip(guided, plain, strict=True):
        assert torch.equal(a, b)


def test_state_keeps_its_dtype():
    state, velocity = random_state(torch.float32), torch.randn(2, 16, 3, 4, 4).bfloat16()
    row = torch.tensor(euler(0.5, 0.4), dtype=torch.float64)
    new, _ = flow_step(VideoUpdate(state, velocity, velocity, 5.0, row), None)
    assert {x.dtype for x in new} == {torch.float32}
    torch.testing.assert_close(new.x, state.x - 0.1 * velocity.float())
    with pytest.raises(ValueError, match="state must be float32 or float64; got torch.bfloat16"):
        low = SolverState(*(x.bfloat16() for x in state))
        flow_step(VideoUpdate(low, velocity, None, 1.0, row), None)
    with pytest.raises(ValueError, match="coefficients must be 9 numbers"):
        flow_step(VideoUpdate(state, velocity, None, 1.0, row[:8]), None)


def test_jumps():
    tokens, proposal = torch.zeros(2, 4000, dtype=torch.int64), torch.ones(2, 4000).long()
    seeds = torch.tensor([11, -12])

    def jumped(probability, seeds=seeds, step=0, rows=slice(None)):
        update = TextUpdate(tokens[rows], proposal[rows], probability, seeds[rows], step)
        state, new = flow_step(None, update)
        assert state is None
        return new

    assert not jumped(0.0).any() and jumped(1.0).all()
    some = jumped(0.3)
    assert abs(some.double().mean() - 0.3) < 5 * (0.21 / 8000) ** 0.5
    assert torch.equal(jumped(torch.tensor(0.3, dtype=torch.float64)), some)
    assert torch.equal(jumped(0.3, rows=slice(1, 2)), some[1:])
    assert (jumped(0.6) >= some).all()  # one uniform per row: jumps nest
    assert not torch.equal(jumped(0.3, step=1), some)
    assert not torch.equal(some[0], some[1])
