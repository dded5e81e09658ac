"""The compiled CPU kernel of vocab_sample, on every instruction set of the machine: the tokens of
the definition, the reference's random words, and bits that depend on nothing but the row."""

import functools

import contracts
import pytest
import torch
from scipy.stats import chisquare

from univigu_kernels import OPS, _compiled
from univigu_kernels._philox import DRAW, philox_uniform

pytestmark = pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
OP = OPS["vocab_sample"]
SEEDS = torch.tensor([3, -(2**40) - 9, 2**45 + 7, -1])

SHAPES = [  # B, T, D, N: around rows of a task (64 or 96), panels of 8 to 64, splits of 512 columns
    (1, 1, 8, 1),
    (2, 15, 64, 37),
    (3, 65, 100, 1000),
    (1, 15, 8, 4097),
    (2, 1, 64, 513),
    (1, 197, 33, 65),
    (2, 60, 1030, 130),
]


def cpu(*inputs):
    return contracts.cpu_kernel("vocab_sample")(*inputs)


def head(batch, rows, width, vocabulary, dtype=torch.float32):
    h, weight = torch.randn(batch, rows, width), torch.randn(vocabulary, width)
    weight *= (4 / max(1, width)) ** 0.5
    return h.to(dtype), weight.to(dtype), torch.randn(vocabulary).to(dtype), SEEDS[:batch]


def uniforms(seeds, rows, vocabulary, step):
    at_T, at_N = torch.arange(rows)[:, None], torch.arange(vocabulary)
    return philox_uniform(seeds[:, None, None], at_N, at_T, step, DRAW)


def assert_definition(inputs, step=5, temperature=0.8):
    """Tokens of fp64, where the best two are further apart than rounding, and the confidence."""
    tokens, confidence = cpu(*inputs, step, temperature)
    assert tokens.dtype == torch.int64 and confidence.dtype == torch.float32
    h, weight, bias, seeds = contracts.to_double(inputs)
    logits = h @ weight.T + (0 if bias is None else bias)
    uniform = uniforms(seeds, h.shape[1], len(weight), step)
    best, order = (logits - temperature * (-uniform.log()).log()).sort(-1, descending=True)
    clear = best.diff(dim=-1)[..., :1].abs().sum(-1) > 1e-5 + 1e-4 * temperature
    assert len(weight) == 1 or clear.double().mean() >= 0.98
    clear |= len(weight) == 1
    assert torch.equal(tokens[clear], order[..., 0][clear])
    plain, truth = OP.reference(*inputs, step)[1], logits.softmax(-1).amax(-1)
    contracts.assert_within([confidence], [plain], [truth], 2, inputs[0].dtype)
    torch.testing.assert_close(confidence, truth.float(), rtol=1e-5, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tokens_are_those_of_the_definition(shape, dtype, isa, poisoned):
    inputs = head(*shape, dtype)
    assert_definition(inputs)
    assert_definition((*inputs[:2], None, inputs[3]), temperature=0.0)


@pytest.mark.parametrize(
    "step, temperature", [(0, 0.3), (49, 1.0), (2**31 + 5, 4.0), (1, 1e-4), (2, 1e-20), (3, 1e30)]
)
def test_steps_and_temperatures(step, temperature, isa):
    assert_definition(head(3, 9, 16, 570), step, temperature)


@pytest.mark.parametrize("vocabulary, rows", [(37, 500), (4097, 70)])
def test_words_are_those_of_the_reference(vocabulary, rows, isa):
    """Among equal logits the largest uniform wins, even where rounding hides it."""
    h, weight = torch.zeros(4, rows, 1), torch.zeros(vocabulary, 1)
    for step in (0, 3, 2**32 - 1):
        tokens, confidence = cpu(h, weight, None, SEEDS, step)
        assert torch.equal(tokens, uniforms(SEEDS, rows, vocabulary, step).argmax(-1))
        torch.testing.assert_close(confidence, torch.full_like(confidence, 1 / vocabulary))


@functools.cache
def draws_near_one():
    """The places (sample, row, vocabulary row, a bias that makes it as good as the best other one)
    where the uniform is within 2^-20 of 1: rounded to fp32, 3% of -log(u) and more would be off."""
    times = -uniforms(SEEDS[:2], 500, 4097, 0).log()
    found = (times < 2**-20).nonzero().tolist()
    best = times.sort(-1).values
    return [(b, t, n, (best[b, t, 0] / best[b, t, 1]).log().item()) for b, t, n in found]


def test_uniforms_near_one_keep_their_accuracy(isa):
    weight, bias = torch.zeros(4097, 1), torch.zeros(4097)
    assert len(draws_near_one()) >= 3
    for b, t, n, even in draws_near_one():
        for margin in (-0.01, 0.01):
            bias[n] = even + margin
            tokens, _ = cpu(torch.zeros(1, t + 1, 1), weight, bias, SEEDS[b : b + 1], 0)
            assert (tokens[0, t] == n) == (margin > 0)
        bias[n] = 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax(temperature, isa):
    h = torch.randn(1, 1, 6).expand(1, 4000, 6)
    weight, bias = torch.randn(11, 6) / 3, torch.randn(11)
    tokens, _ = cpu(h, weight, bias, SEEDS[:1], 2, temperature)
    expected = ((h[0, 0] @ weight.T + bias) / temperature).double().softmax(0) * 4000
    observed = tokens.flatten().bincount(minlength=11)
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [1e-7, 1e-40])
def test_equals_share_the_draws_of_a_tiny_temperature(temperature, isa):
    """Where logits + noise, rounded to fp32, would be the logits: the first would always win."""
    bias = torch.full((40,), 5.0)
    bias[::2] = 4.999
    tokens, _ = cpu(torch.zeros(1, 4000, 2), torch.zeros(40, 2), bias, SEEDS[1:2], 0, temperature)
    observed = tokens.flatten().bincount(minlength=40)
    assert observed[::2].eq(0).all() and chisquare(observed[1::2].numpy()).pvalue > 1e-3


def test_the_lowest_of_equals(isa):
    """At temperature 0: equal within a vector, between vectors, panels and splits."""
    h, weight, bias = torch.randn(1, 5, 16), torch.zeros(1100, 16), torch.full((1100,), -1.0)
    for places in ([1099], [3, 5, 2], [20, 11], [40, 33, 90], [700, 600, 1090], list(range(1100))):
        bias[places] = 2.0
        tokens, confidence = cpu(h, weight, bias, SEEDS[:1], 0, 0.0)
        assert tokens.eq(min(places)).all()
        torch.testing.assert_close(confidence, bias.softmax(0).max().expand(1, 5))
        bias[places] = -1.0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_masks_and_infinite_logits(temperature, isa):
    h, weight, bias, seeds = head(2, 7, 16, 1100)
    bias[:1050] = -torch.inf  # two splits and a part of the third
    tokens, confidence = cpu(h, weight, bias, seeds, 1, temperature)
    expected = OP.reference(h, weight, bias, seeds, 1, temperature)
    assert torch.equal(tokens, expected[0]) and tokens.ge(1050).all()
    torch.testing.assert_close(confidence, expected[1])
    bias[600] = torch.inf
    tokens, confidence = cpu(h, weight, bias, seeds, 1, temperature)
    assert tokens.eq(600).all() and confidence.isnan().all()
    tokens, confidence = cpu(h, weight, torch.full_like(bias, -torch.inf), seeds, 1, temperature)
    assert tokens.eq(0).all() and confidence.isnan().all()


@DTYPES
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_nan_stays_alone(temperature, dtype, isa):
    h, weight, bias, seeds = head(2, 70, 16, 1100, dtype)
    sound = cpu(h, weight, bias, seeds, 1, temperature)
    h[0, 3] = torch.nan
    tokens, confidence = cpu(h, weight, bias, seeds, 1, temperature)
    assert confidence[0, 3].isnan() and 0 <= tokens[0, 3] < 1100
    others = torch.arange(140).view(2, 70) != 3
    assert torch.equal(tokens[others], sound[0][others])
    assert torch.equal(confidence[others], sound[1][others])


@DTYPES
@pytest.mark.parametrize("rows", [1, 65])
def test_a_batch_equals_single_calls(rows, dtype, isa):
    h, weight, bias, seeds = head(4, rows, 24, 1300, dtype)
    tokens, confidence = cpu(h, weight, bias, seeds, torch.tensor(7), 1.0)
    for b in range(4):
        one = cpu(h[b : b + 1], weight, bias, seeds[b : b + 1], 7, 1.0)
        assert torch.equal(one[0][0], tokens[b]) and torch.equal(one[1][0], confidence[b])


def test_threads_and_repeats_do_not_matter(two_threads, isa):
    inputs = head(2, 110, 40, 5000, torch.bfloat16)
    first, second = (cpu(*inputs, 1, 0.7) for _ in "ab")
    torch.set_num_threads(1)
    for other in (second, cpu(*inputs, 1, 0.7)):
        assert torch.equal(other[0], first[0]) and torch.equal(other[1], first[1])


@DTYPES
def test_any_stride(dtype, isa):
    h, weight, bias, seeds = head(2, 9, 24, 45, dtype)
    joint = torch.full((2, 14, 24), torch.nan, dtype=dtype)
    joint[:, 5:] = h
    expected = cpu(h, weight, bias, seeds, 3)
    wide, twice = torch.stack([bias, bias], 1)[:, 0], torch.stack([seeds, seeds], 1)[:, 0]
    for view in (lambda x: x, contracts.strided, lambda x: x.mT.contiguous().mT):
        result = cpu(view(joint[:, 5:]), view(weight), wide.float(), twice, 3)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("batch, rows", [(0, 5), (2, 0)])
def test_empty_batches_and_no_width(batch, rows):
    tokens, confidence = cpu(*head(batch, rows, 16, 37), 1)
    assert tokens.shape == confidence.shape == (batch, rows)
    h, weight, bias, seeds = head(1, 3, 0, 37)
    tokens, confidence = cpu(h, weight, bias, seeds, 1, 0.0)
    assert tokens.eq(bias.argmax()).all()
    torch.testing.assert_close(confidence, bias.softmax(0).max().expand(1, 3))


def test_op_is_well_formed():
    torch.library.opcheck(torch.ops.univigu_C.vocab_sample.default, (*head(2, 5, 16, 37), 2, 0.8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_a_named_error(dtype):
    with pytest.raises(RuntimeError, match="vocab_sample: h must be float32 or bfloat16 .*refer"):
        cpu(*head(2, 5, 16, 37, dtype), 0)
