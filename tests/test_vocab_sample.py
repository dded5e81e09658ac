"""vocab_sample: the generator's known answers, the distribution, and batch invariance."""

import pytest
import torch
from scipy.stats import chisquare

from univigu_kernels import OPS
from univigu_kernels._philox import DRAW, JUMP, philox_uniform, philox_words

vocab_sample = OPS["vocab_sample"].reference
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
