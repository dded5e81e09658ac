"""flow_step: solver rows, guidance, token jumps; the Triton backend draws the same bits."""

import contracts
import pytest
import torch
from contracts import DEVICE

from univigu_kernels import OPS, SolverState, TextUpdate, VideoUpdate
from univigu_kernels._card import CARDS
from univigu_kernels._philox import JUMP, philox_uniform
from univigu_kernels._triton import forced, rehearsal

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


OP = OPS["flow_step"]
flow_step_triton = OP.backends[0].call
ROW = (0.8, 0.6, 0.3, 0.2, -0.1, 0.05, 0.7, 0.4, -0.1)


def video_update(shape, dtype, guided=True, coefficients=ROW):
    state = SolverState(*torch.randn(4, *shape, device=DEVICE))
    velocity, null = torch.randn(2, *shape, device=DEVICE).to(dtype)
    return VideoUpdate(state, velocity, null if guided else None, 5.0, coefficients)


def text_update(batch, rows, probability=0.4, step=3):
    tokens, proposal = torch.randint(1000, (2, batch, rows), device=DEVICE)
    seeds = torch.tensor([7, -(2**40) - 3, 2**63 - 1, -1], device=DEVICE)[:batch]
    return TextUpdate(tokens, proposal, probability, seeds, step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("size", [0, 1, 15, 17, 1023, 1025, 5000])
def test_triton_is_within_two_times(size, guided, dtype, poisoned):
    update = video_update((size,), dtype, guided)
    new, tokens = flow_step_triton(update, None)
    assert tokens is None and new.m2 is update.state.m1
    assert {x.dtype for x in new} == {torch.float32} and new.x.shape == (size,)
    if size:
        contracts.assert_two_times(OP, flow_step_triton, ((update, None), {}), torch.float32)


@pytest.mark.parametrize("batch, rows", [(1, 1), (3, 129), (4, 1023), (1, 0), (0, 5)])
def test_triton_jumps_equal_the_reference(batch, rows, poisoned):
    for step in (0, 3, 2**31 + 5):
        for probability in (0.0, 1e-9, 0.4, 1.0):
            update = text_update(batch, rows, probability, step)
            state, tokens = flow_step_triton(None, update)
            assert state is None and torch.equal(tokens, flow_step(None, update)[1])


def test_triton_compares_as_finely_as_the_reference():
    """A probability that is a draw does not jump there; the next double does."""
    update = text_update(1, 40)
    rows = torch.arange(40, device=DEVICE)
    for row, uniform in enumerate(philox_uniform(update.seeds_B[:1], rows, 0, 3, JUMP).tolist()):
        at, above = torch.tensor([uniform] * 2, dtype=torch.float64, device=DEVICE)
        above = above.nextafter(torch.ones_like(above))
        for probability, jumps in ((at, False), (above, True), (float(above), True)):
            _, tokens = flow_step_triton(None, update._replace(probability=probability))
            assert tokens[0, row] == (update.proposal_BT if jumps else update.tokens_BT)[0, row]


def test_triton_takes_both_halves_in_one_launch(poisoned):
    video, text = video_update((2, 3, 7), torch.float16), text_update(2, 1030)
    state, tokens = flow_step_triton(video, text)
    for a, b in zip(state, flow_step_triton(video, None)[0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(tokens, flow_step_triton(None, text)[1])
    with rehearsal(CARDS[90]) as launches:
        flow_step_triton(video, text)
    assert len(launches) == 1
    assert flow_step_triton(None, None) == (None, None)
    with forced("flow_step", BLOCK=16):
        state, tokens = flow_step_triton(video, text)
    assert torch.equal(tokens, flow_step(None, text)[1]) and not state.x.isnan().any()


def test_what_goes_in_and_comes_out_is_m1_alone():
    """Whoever writes into a result, or keeps an argument, must know."""
    for backend in OPS["flow_step"].backends:
        if backend.supports(DEVICE, torch.float32):
            continue
        video, text = video_update((33,), torch.float32), text_update(2, 50)
        given = {x.data_ptr() for x in (*video.state, video.velocity, *text[:2])}
        state, tokens = backend.call(video, text)
        assert state.m2 is video.state.m1, backend.name
        assert not given & {x.data_ptr() for x in (*state[:3], tokens)}, backend.name


def test_triton_numbers_from_the_host_and_on_the_device():
    """On a GPU they are two compiled kernels, which may contract a product and a sum differently:
    the last bit of a result is each one's own there."""
    exact = {"rtol": 0, "atol": 0} if DEVICE.type == "cpu" else {"rtol": 2e-6, "atol": 2e-6}
    row = torch.tensor(ROW, dtype=torch.float64)
    results = []
    for coefficients in (ROW, row, row.to(DEVICE), row.float().to(DEVICE)):
        torch.manual_seed(0)
        video = video_update((33,), torch.float16, coefficients=coefficients)
        results.append(flow_step_triton(video, None)[0])
    for state in results[1:]:
        for a, b in zip(state, results[0], strict=True):
            torch.testing.assert_close(a, b, **exact)
    probability, step = torch.tensor(0.3, dtype=torch.float64), torch.tensor(9)
    update = text_update(2, 50, 0.3, 9)
    _, tokens = flow_step_triton(None, update)
    for device in {torch.device("cpu"), DEVICE}:
        moved = update._replace(probability=probability.to(device), step=step.to(device))
        assert torch.equal(flow_step_triton(None, moved)[1], tokens)


def test_triton_reads_any_stride(poisoned):
    video, text = video_update((2, 5, 6), torch.float16), text_update(2, 9)
    state = SolverState(*(x.mT.contiguous().mT for x in video.state))
    across = video._replace(state=state, velocity=contracts.strided(video.velocity))
    tokens = text.tokens_BT.T.contiguous().T
    actual = flow_step_triton(across, text._replace(tokens_BT=tokens))
    expected = flow_step_triton(video, text)
    for a, b in zip(contracts.outputs(actual), contracts.outputs(expected), strict=True):
        assert torch.equal(a, b)


def test_triton_wants_its_state_in_fp32():
    update = video_update((4,), torch.float32)
    update = update._replace(state=SolverState(*(x.double() for x in update.state)))
    with pytest.raises(ValueError, match="state must be float32 in this backend"):
        flow_step_triton(update, None)


def test_triton_op_is_well_formed():
    video, text = video_update((7,), torch.float16), text_update(2, 5)
    numbers = torch.tensor([0.4, 3.0], dtype=torch.float64, device=DEVICE)
    tokens = (*text[:2], numbers[0], text.seeds_B, numbers[1].long())
    for coefficients in ((list(ROW), None), ([], torch.tensor(ROW, device=DEVICE))):
        arguments = (*video.state, video.velocity, None, 5.0, *coefficients, *tokens)
        torch.library.opcheck(torch.ops.univigu.flow_step.default, arguments)
