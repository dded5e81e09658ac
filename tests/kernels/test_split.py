"""Products of few rows, split along their sum: every backend "split" at awkward shapes, with the
parts joined and in one, and what a card is given."""

import contracts
import pytest
import torch
from torch.utils._pytree import tree_map

from univigu_kernels import OPS, Expert, Fp8Expert, _triton, quantize_rows, quantize_weight
from univigu_kernels._card import CARDS
from univigu_kernels._fp8 import supports_triton_fp8
from univigu_kernels._split import few_rows_product, splits_of
from univigu_kernels._triton import forced, supports_triton
from univigu_kernels.ahead import name_of

CPU_OR_CARD = contracts.DEVICE
DTYPES = [d for d in contracts.LOW if supports_triton(CPU_OR_CARD, d) is None]
pytestmark = pytest.mark.skipif(not DTYPES, reason="needs Triton")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_split = pytest.mark.parametrize("splits", [1, 2, 5])
SHAPES = [  # rows, D, F: one of each; tails of all three; more parts than the sum has blocks
    (1, 16, 16),
    (131, 72, 80),
    (65, 200, 129),
]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(CPU_OR_CARD, dtype)


def expert(D, F, dtype):
    parts = randn(F, D) / D**0.5, randn(F), randn(D, F) / F**0.5, randn(D)
    return Expert(*(x.to(dtype) for x in parts))


def ffn_arguments(samples, V, T, D, hidden, dtype):
    experts = (expert(D, F, dtype) for F in hidden)
    return randn(samples, V + T, D, dtype=dtype), *experts, V


def fp8_linear_arguments(rows, D, F, dtype):
    sizes = [2.0 ** torch.randint(-3, 4, (n, 1), device=CPU_OR_CARD) for n in (rows, F)]
    x, weight = (size * randn(len(size), D).float() for size in sizes)
    return *quantize_rows(x), *quantize_weight(weight), 9 * randn(F).float(), dtype


def keeps_the_rule(name, inputs, dtype, splits):
    """Without gradients, for which the reference itself would run."""
    reference = OPS[name].reference
    with torch.no_grad(), forced("split_product", SPLITS=splits), contracts.poisoned():
        y = contracts.backend(name, "split")(*inputs)
    truth = reference(*contracts.to_double(inputs))
    contracts.assert_within([y], [reference(*inputs)], [truth], 2, dtype)


@each_split
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_keeps_the_two_times_rule(shape, dtype, splits):
    rows, D, F = shape
    x, weight = randn(rows, D, dtype=dtype), (randn(F, D) / D**0.5).to(dtype)
    keeps_the_rule("linear", (x, weight, randn(F, dtype=dtype)), dtype, splits)
    keeps_the_rule("linear", (x, weight, None), dtype, splits)


@each_split
@each_dtype
@pytest.mark.parametrize("samples, V, T", [(2, 17, 5), (2, 0, 37), (3, 9, 0)])
def test_routed_ffn_keeps_the_two_times_rule(samples, V, T, dtype, splits):
    inputs = ffn_arguments(samples, V, T, 72, (144, 80), dtype)
    keeps_the_rule("routed_ffn", inputs, dtype, splits)


@pytest.mark.skipif(supports_triton_fp8(CPU_OR_CARD, torch.float16) is not None, reason="needs fp8")
@each_split
@pytest.mark.parametrize("shape", [(3, 16, 32), (131, 208, 80), (5, 4128, 16)], ids=str)
def test_fp8_linear_keeps_the_two_times_rule(shape, splits):
    keeps_the_rule("fp8_linear", fp8_linear_arguments(*shape, torch.float16), torch.float16, splits)


@pytest.mark.skipif(supports_triton_fp8(CPU_OR_CARD, torch.float16) is not None, reason="needs fp8")
@each_split
@pytest.mark.parametrize("samples, V, T", [(2, 17, 5), (2, 0, 37)])
def test_fp8_ffn_is_as_near_the_unrounded_formula_as_the_reference(samples, V, T, splits):
    """Its hidden rows have one scale each, as those of the backend "torch"."""

    def stored(D, F):
        up, up_bias, down, down_bias = expert(D, F, torch.float32)
        biases = up_bias.half(), down_bias.half()
        return Fp8Expert(*quantize_weight(up), biases[0], *quantize_weight(down), biases[1])

    h = quantize_rows(randn(samples, V + T, 64).float())
    inputs = *h, stored(64, 144), stored(64, 272), V, torch.float16
    with forced("split_product", SPLITS=splits), contracts.poisoned():
        y = contracts.backend("fp8_ffn", "split")(*inputs)
    truth, plain = contracts.unrounded_fp8_ffn(*inputs), OPS["fp8_ffn"].reference(*inputs)
    assert y.shape == truth.shape
    own, reference = (contracts.error(x, truth) for x in (y, plain))
    assert own <= 2 * reference and reference < 0.2, "e4m3 of hidden rows is this coarse"


def test_rows_meet_their_own_expert_and_sample_alone():
    h, video, text, V = ffn_arguments(2, 21, 10, 16, (32, 32), DTYPES[0])
    split = contracts.backend("routed_ffn", "split")
    whole, nan = split(h, video, text, V), tree_map(lambda t: t * torch.nan, video)
    y = split(h, nan, text, V)
    assert torch.equal(y[:, V:], whole[:, V:]) and y[:, :V].isnan().all()
    spoiled = h.clone()
    spoiled[1, 3] = torch.nan
    assert split(spoiled, video, text, V).isnan().any(-1).nonzero().tolist() == [[1, 3]]


def test_each_part_is_summed_once_and_the_join_adds_all():
    """Powers of two, so that every part shows in the sum that lacks it or has it twice."""
    x = torch.zeros(3, 160, device=CPU_OR_CARD)
    for block in range(5):
        x[:, 32 * block] = 2.0**block
    weight = torch.ones(8, 160, device=CPU_OR_CARD)
    for splits in (1, 2, 3, 5, 7):
        with forced("split_product", SPLITS=splits), contracts.poisoned():
            assert few_rows_product(x, weight).eq(31).all()


def test_gradients_are_those_of_the_reference():
    x, weight = randn(3, 16, dtype=torch.float32), randn(8, 16, dtype=torch.float32)
    for name, inputs in (
        ("linear", (x, weight, None)),
        ("routed_ffn", ffn_arguments(2, 9, 6, 16, (32, 40), torch.float32)),
    ):
        calls = contracts.backend(name, "split"), OPS[name].reference
        results = [contracts.run_with_gradients(call, (inputs, {})) for call in calls]
        for a, b in zip(*(contracts.outputs(r) for r in results), strict=True):
            assert torch.equal(a, b)


def test_strided_rows_and_weights():
    x, weight, bias = (randn(*s, dtype=torch.float32) for s in ((5, 40), (24, 40), (24,)))
    views = contracts.strided(x), weight.T.contiguous().T, contracts.strided(bias)
    out = torch.full((5, 30), torch.nan, device=CPU_OR_CARD)
    for splits in (1, 2):
        with forced("split_product", SPLITS=splits):
            plain, y = few_rows_product(x, weight, bias), few_rows_product(*views, out=out[:, :24])
        assert torch.equal(y, plain) and out[:, 24:].isnan().all()


@pytest.mark.parametrize(
    "columns, depth, splits",
    [(4608, 1536, 1), (1536, 1536, 3), (8960, 1536, 1), (1536, 8960, 5), (5120, 13824, 1)],
)
def test_what_an_h100_is_given(columns, depth, splits):
    """256 rows of the 1.3B model's four products, and of the 14B's deepest: 144 to 280 programs,
    and a second launch where there are parts to be joined."""
    x, weight = (torch.empty(n, depth, device="meta").bfloat16() for n in (256, columns))
    with _triton.rehearsal(CARDS[90]) as launches:
        few_rows_product(x, weight)
    tiles, parts = launches[0].grid
    assert parts == splits == launches[0].options["SPLITS"]
    assert 132 <= tiles * parts <= 2 * 148
    assert [name_of(x) for x in launches] == ["split_product", "split_reduce"][: 1 + (splits > 1)]


def test_how_far_a_sum_is_split():
    assert splits_of(tiles=119, depth=8192, multiprocessors=132) == 1 + (119 < 0.9 * 132)
    assert splits_of(tiles=1, depth=8192, multiprocessors=132) == 16
    assert splits_of(tiles=1, depth=100, multiprocessors=132) == 1
    assert splits_of(tiles=0, depth=8192, multiprocessors=132) == 16
