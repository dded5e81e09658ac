"""vocab_sample: the generator's known answers, the distribution, batch invariance, and the Triton
backend, whose tokens are those of the definition."""

import contracts
import pytest
import torch
from contracts import DEVICE
from scipy.stats import chisquare

from univigu_kernels import OPS
from univigu_kernels._draw import MIDDLE, draw_word, waiting_time
from univigu_kernels._philox import DRAW, JUMP, philox_uniform, philox_words
from univigu_kernels._triton import forced, launch, tl, triton

vocab_sample, in_triton = OPS["vocab_sample"].reference, OPS["vocab_sample"].backends[0].call
ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors that Random123 publishes for philox4x32-10."""
    assert tuple(int(word) for word in philox_words(*key, *counter)) == expected
    seed = torch.tensor(key[0] | (key[1] << 32) if key[1] < 2**31 else -1)
    uniform = philox_uniform(seed, *counter)
    assert uniform.item() == ((expected[0] >> 8) + 0.5) / 2**24


def test_uniforms_stay_inside_the_unit_interval_and_differ_by_purpose():
    seeds = torch.tensor([[0], [-1], [2**63 - 1]])
    draws = philox_uniform(seeds, torch.arange(50_000), 0, 0, DRAW)
    assert draws.shape == (3, 50_000) and 0 < draws.min() and draws.max() < 1
    assert (draws.mean(1) - 0.5).abs().max() < 5 * (12 * 50_000) ** -0.5
    jumps = philox_uniform(seeds, torch.arange(50_000), 0, 0, JUMP)
    assert torch.corrcoef(torch.cat([draws, jumps])).triu(1).abs().max() < 0.02


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature):
    rows, vocab = 4000, 11
    h = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, rows, 6)
    weight, bias = torch.randn(vocab, 6, dtype=torch.float64) / 3, torch.randn(vocab)
    tokens, confidence = vocab_sample(h, weight, bias, torch.tensor([5]), 0, temperature)
    logits = h[0, 0] @ weight.T + bias
    expected = (logits / temperature).softmax(0) * rows
    observed = tokens.flatten().bincount(minlength=vocab)
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3
    untempered = logits.softmax(0).max()
    torch.testing.assert_close(confidence, untempered.expand(1, rows))


def test_steps_seeds_and_rows_draw_anew():
    h, weight = torch.zeros(2, 64, 8), torch.zeros(1000, 8)
    seeds = torch.tensor([1, 2])
    tokens, _ = vocab_sample(h, weight, None, seeds, 0)
    later, _ = vocab_sample(h, weight, None, seeds, 1)
    for a, b in ((tokens, later), (tokens[0], tokens[1]), (tokens[:, 1:], tokens[:, :-1])):
        assert (a == b).double().mean() < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_batch_equals_single_calls(dtype):
    h, weight, bias = torch.randn(3, 70, 16), torch.randn(301, 16), torch.randn(301)
    h, weight, bias = (x.to(dtype) for x in (h, weight, bias))
    seeds = torch.tensor([3, -9, 2**40])
    tokens, confidence = vocab_sample(h, weight, bias, seeds, torch.tensor(7), 1.0)
    assert confidence.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for b in range(3):
        one = vocab_sample(h[b : b + 1], weight, bias, seeds[b : b + 1], 7, 1.0)
        assert torch.equal(one[0][0], tokens[b]) and torch.equal(one[1][0], confidence[b])


def test_temperature_zero_is_argmax():
    h, weight, bias = torch.randn(2, 5, 16), torch.randn(33, 16), torch.randn(33)
    tokens, confidence = vocab_sample(h, weight, bias, torch.tensor([1, 2]), 0, 0.0)
    logits = h @ weight.T + bias
    assert torch.equal(tokens, logits.argmax(-1))
    torch.testing.assert_close(confidence, logits.softmax(-1).amax(-1))


def test_negative_temperature_raises():
    with pytest.raises(ValueError, match="temperature must be at least 0; got -1"):
        vocab_sample(torch.zeros(1, 1, 2), torch.zeros(3, 2), None, torch.tensor([0]), 0, -1.0)


def head(batch, rows, width, vocabulary, dtype=torch.float32):
    """h, weight, bias, seeds of both signs and above 32 bits."""

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE)

    seeds = torch.tensor([3, -(2**40) - 9, 2**45 + 7], device=DEVICE)[:batch]
    h, weight = randn(batch, rows, width), randn(vocabulary, width) * (4 / width) ** 0.5
    return h.to(dtype), weight.to(dtype), randn(vocabulary).to(dtype), seeds


def assert_tokens(inputs, step=5, temperature=0.8, decided=0.99):
    """Those of the definition in fp64, where its best two are further apart than rounding."""
    h, weight, bias, seeds = inputs
    tokens, confidence = in_triton(h, weight, bias, seeds, step, temperature)
    logits = h.double() @ weight.double().T + (0 if bias is None else bias.double())
    rows, vocabulary = h.shape[1], len(weight)
    at_T, at_N = (torch.arange(n, device=h.device) for n in (rows, vocabulary))
    uniform = philox_uniform(seeds[:, None, None], at_N, at_T[:, None], step, DRAW)
    perturbed = logits - temperature * (-uniform.log()).log()
    best, expected = perturbed.topk(2, -1)
    clear = best[..., 0] - best[..., 1] > 1e-4
    assert clear.double().mean() >= decided
    assert torch.equal(tokens[clear], expected[..., 0][clear])
    expected = logits.softmax(-1).amax(-1).float()
    torch.testing.assert_close(confidence, expected, rtol=1e-5, atol=1e-6)


SHAPES = [(1, 1, 16, 37), (3, 17, 40, 129), (2, 15, 24, 97), (1, 129, 8, 130), (1, 1023, 8, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_draws_the_tokens_of_the_definition(shape, dtype, poisoned):
    assert_tokens(head(*shape, dtype))


@pytest.mark.parametrize("step, temperature", [(0, 0.3), (49, 1.0), (2**31 + 5, 4.0), (1, 1e-4)])
def test_triton_steps_and_temperatures(step, temperature):
    inputs = head(3, 9, 16, 97)
    assert_tokens(inputs, step, temperature)
    assert_tokens((*inputs[:2], None, inputs[3]), step, temperature)


def test_triton_over_many_seeds():
    h, weight, bias, _ = head(1, 16, 8, 61)
    for seed in range(-8, 8):
        seeds = torch.tensor([seed * (2**33 + 1)], device=DEVICE)
        assert_tokens((h, weight, bias, seeds), decided=0.9)


@triton.jit
def draw_words(
    seeds,
    words,
    times,
    step,
    first,
    N,
    middle,
    PURPOSE: tl.constexpr,
    T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n, t, b = tl.arange(0, BLOCK)[None, :], tl.arange(0, T)[:, None], tl.program_id(0)
    seed, now = tl.load(seeds + b), tl.load(step)
    word = draw_word(seed, first + n, t, now, PURPOSE, middle)
    unrolled, _, _, _ = tl.philox(seed, first + n, t, now, PURPOSE)
    at = (b * T + t) * N + n
    tl.store(words + at, tl.where(word == unrolled, word.to(tl.int64), -1), n < N)
    tl.store(times + at, waiting_time(word), n < N)


@pytest.mark.parametrize("purpose", [DRAW, JUMP])
@pytest.mark.parametrize("now", [0, 1, 49, 2**31 - 1, -(2**31), -7])
@pytest.mark.parametrize("first, rows, width", [(0, 4, 200), (255_872, 64, 128), (97, 1, 1)])
def test_triton_draws_the_same_bits(first, rows, width, now, purpose):
    """Those of the definition and of Triton's own generator, which unrolls its rounds."""
    seeds = [0, 1, -1, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), -(2**40) - 3]
    seeds = torch.tensor(seeds, device=DEVICE)
    words = torch.empty(8, rows, width, dtype=torch.int64, device=DEVICE)
    times = torch.empty(8, rows, width, device=DEVICE)
    step, block = torch.tensor(now, dtype=torch.int32, device=DEVICE), triton.next_power_of_2(width)
    args = seeds, words, times, step, first, width, MIDDLE
    launch(draw_words, (8,), *args, PURPOSE=purpose, T=rows, BLOCK=block)
    n, t = (torch.arange(size, device=DEVICE) for size in (width, rows))
    at = first + n, t[:, None], now & ONES, purpose
    keys = (seeds[:, None, None] >> shift & ONES for shift in (0, 32))
    assert torch.equal(words, philox_words(*keys, *at)[0])
    exact = -philox_uniform(seeds[:, None, None], *at).log()
    assert ((times - exact) / exact).abs().max() < 4e-7


@triton.jit
def wait(words, times, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(times + at, waiting_time(tl.load(words + at).to(tl.uint32)))


def test_triton_loses_nothing_where_the_uniform_is_near_one_or_zero():
    ends = torch.arange(128, device=DEVICE) << 8
    middle = (2**31 - 64 * 256) + ends
    words = torch.cat([ends, 2**32 - 1 - ends, middle, 2**32 - 1 - ends * 2**17])
    times = torch.empty(512, device=DEVICE)
    launch(wait, (1,), words, times, BLOCK=512)
    exact = -(((words >> 8).double() + 0.5) * 2.0**-24).log()
    assert ((times - exact) / exact).abs().max() < 4e-7


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_triton_draws_follow_the_softmax(temperature):
    h = torch.randn(1, 1, 6, device=DEVICE).expand(1, 4000, 6)
    weight, bias = torch.randn(11, 6, device=DEVICE) / 3, torch.randn(11, device=DEVICE)
    seeds = torch.tensor([11], device=DEVICE)
    with forced("vocab_sample_forward", BLOCK_N=16, BLOCK_K=16, PIECE=8):
        tokens, _ = in_triton(h, weight, bias, seeds, 2, temperature)
    expected = ((h[0, 0] @ weight.T + bias) / temperature).double().softmax(0) * 4000
    observed = tokens.flatten().bincount(minlength=11)
    assert chisquare(observed.cpu().numpy(), expected.cpu().numpy()).pvalue > 1e-3


CONFIGURATIONS = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "PIECE": 8, "PROGRAMS": 6},
    {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32, "PIECE": 16, "PROGRAMS": 1},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "PIECE": 4},
    {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 16, "PIECE": 32, "num_stages": 1, "num_warps": 4},
]


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_triton_configurations(options, poisoned):
    with forced("vocab_sample_forward", **options), forced("vocab_sample_reduce", BLOCK_M=8):
        for shape in ((3, 17, 40, 129), (1, 15, 16, 37)):
            assert_tokens(head(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_batch_equals_single_calls(dtype):
    h, weight, bias, seeds = head(3, 17, 16, 97, dtype)
    step = torch.tensor(7, device=DEVICE)
    tokens, confidence = in_triton(h, weight, bias, seeds, step, 1.0)
    assert tokens.dtype == torch.int64 and confidence.dtype == torch.float32
    for b in range(3):
        one = in_triton(h[b : b + 1], weight, bias, seeds[b : b + 1], 7, 1.0)
        assert torch.equal(one[0][0], tokens[b]) and torch.equal(one[1][0], confidence[b])


def test_triton_takes_the_lowest_of_equals():
    """Equal within a piece, between pieces, tiles and splits."""
    h, _, _, seeds = head(1, 5, 16, 97)
    bias = torch.full((97,), -1.0, device=DEVICE)
    with forced("vocab_sample_forward", **CONFIGURATIONS[0]):
        for places in ([96], [3, 5, 2], [20, 11], [40, 33, 90], [95, 64], list(range(97))):
            bias[places] = 2.0
            tokens, confidence = in_triton(h, 0 * h[0, :1].expand(97, 16), bias, seeds, 0, 0.0)
            assert tokens.eq(min(places)).all()
            torch.testing.assert_close(confidence, bias.softmax(0).max().expand(1, 5))
            bias[places] = -1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_triton_bias_masks_and_nan_stays_in_its_row(temperature):
    h, weight, bias, seeds = head(2, 7, 16, 97)
    bias[:80] = -torch.inf  # whole tiles of it
    h[0, 3] = torch.nan
    with forced("vocab_sample_forward", **CONFIGURATIONS[0]):
        tokens, confidence = in_triton(h, weight, bias, seeds, 1, temperature)
    sound = ~h.isnan().any(-1)
    expected = vocab_sample(h, weight, bias, seeds, 1, temperature)
    assert tokens[sound].ge(80).all() and torch.equal(tokens[sound], expected[0][sound])
    torch.testing.assert_close(confidence[sound], expected[1][sound])
    assert confidence[~sound].isnan().all() and tokens.ge(0).all() and tokens.lt(97).all()


def test_triton_reads_any_stride():
    h, weight, bias, seeds = head(2, 9, 24, 45)
    joint = torch.full((2, 14, 24), torch.nan, device=DEVICE)
    joint[:, 5:] = h
    expected = in_triton(h, weight, bias, seeds, 3)
    for view in (lambda x: x, contracts.strided, lambda x: x.mT.contiguous().mT):
        wide = torch.stack([bias, bias], 1)[:, 0]
        twice = torch.stack([seeds, seeds], 1)[:, 0]
        result = in_triton(view(joint[:, 5:]), view(weight), wide, twice, 3)
        assert torch.equal(result[0], expected[0])
        torch.testing.assert_close(result[1], expected[1])


def test_triton_step_is_not_read_by_the_host(monkeypatch):
    inputs, step = head(2, 5, 16, 37), torch.tensor(4, device=DEVICE)
    expected = in_triton(*inputs, 4)
    for name in ("item", "__int__", "__bool__", "tolist", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the host waits"))
    tokens, _ = in_triton(*inputs, step)
    monkeypatch.undo()
    assert torch.equal(tokens, expected[0])
    assert not torch.equal(in_triton(*inputs, step + 1)[0], tokens)


def test_triton_repeats_and_empty_batches():
    inputs = head(3, 17, 16, 37, torch.float16)
    first, second = (in_triton(*inputs, 1, 0.7) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for batch, rows in ((0, 5), (2, 0)):
        tokens, confidence = in_triton(*head(batch, rows, 16, 37), 1)
        assert tokens.shape == confidence.shape == (batch, rows)


def test_triton_op_is_well_formed():
    step = torch.tensor(2, device=DEVICE)
    torch.library.opcheck(torch.ops.univigu.vocab_sample.default, (*head(2, 5, 16, 37), step, 0.8))
