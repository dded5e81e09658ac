"""cross_attention in Triton: every query sees every key, in any numbers."""

import contracts
import pytest
import torch
from contracts import DEVICE

from univigu_kernels import OPS
from univigu_kernels._attention import aligned
from univigu_kernels._triton import forced, supports_triton

OP = OPS["cross_attention"]
CALL = OP.backends[0].call
pytestmark = [
    pytest.mark.skipif(supports_triton(DEVICE, torch.float32) is not None, reason="needs triton"),
    pytest.mark.usefixtures("poisoned"),
]


@pytest.fixture(params=[16, 128])
def blocks(request):
    """Several blocks of 16, or one masked block of 128."""
    size = request.param
    options = {"BLOCK_M": size, "BLOCK_N": size}
    with forced("flash_forward", **options), forced("flash_dkdv", **options):
        with forced("flash_dq", **options):
            yield


def arguments(batch, rows, keys, heads, width, dtype=torch.float32):
    def randn(count):
        return torch.randn(batch, count, heads, width, device=DEVICE).to(dtype)

    return (randn(rows), randn(keys), randn(keys)), {}


SHAPES = [(2, 29, 11, 2, 16), (1, 17, 48, 1, 8), (3, 5, 33, 1, 40), (1, 32, 16, 2, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_within_two_times(shape, dtype, blocks):
    contracts.assert_two_times(OP, CALL, arguments(*shape, dtype), dtype)


@pytest.mark.parametrize("span, splits", [(1, 3), (3, 2)])
def test_triton_splits(span, splits, blocks):
    with forced("flash_split", span=span), forced("flash_dkdv_split", splits=splits):
        contracts.assert_two_times(OP, CALL, arguments(2, 40, 50, 1, 16), torch.float32)


def test_one_key_gives_its_value():
    """The softmax is 1, so nothing flows to q and k."""
    leaves = [x.requires_grad_() for x in arguments(1, 5, 1, 2, 16)[0]]
    o = CALL(*leaves)
    torch.testing.assert_close(o, leaves[2].expand_as(o))
    dq, dk, dv = torch.autograd.grad(o.sum(), leaves)
    torch.testing.assert_close(dv, torch.full_like(dv, 5))
    for gradient in (dq, dk):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 0, 2, 8), (2, 0, 3, 2, 8), (0, 3, 2, 2, 8)], ids=str)
def test_triton_without_queries_or_keys(shape):
    leaves = [x.requires_grad_() for x in arguments(*shape)[0]]
    o = CALL(*leaves)
    gradients = torch.autograd.grad(o.sum(), leaves)
    assert o.shape == leaves[0].shape and not o.any()
    assert not any(gradient.any() for gradient in gradients)


BACKENDS = [p for p in contracts.implementations() if p.values[0] is OP]


@pytest.mark.parametrize("op, backend", BACKENDS)
@pytest.mark.parametrize("keys", [1, 15, 16, 17, 32, 33, 256, 257])
def test_the_last_key_counts_as_often_as_it_repeats(op, backend, keys, blocks):
    q, k, v = arguments(2, 5, keys, 2, 16)[0]
    every = [torch.cat([x, x[:, -1:].expand(-1, 22, -1, -1)], 1) for x in (k, v)]
    plain = contracts.run(OP.reference, ((q, *every), {}))
    true = contracts.run(OP.reference, contracts.to_double(((q, *every), {})))
    result = contracts.run(backend.call, ((q, k, v), {"repeats": 23}))
    contracts.assert_within(result, plain, true, 2, torch.float32)


@pytest.mark.parametrize("span", [1, 3])
def test_triton_splits_count_a_repeated_key_once(span):
    q, k, v = arguments(1, 3, 50, 1, 16)[0]
    with forced("flash_forward", BLOCK_M=16, BLOCK_N=16), forced("flash_split", span=span):
        split = CALL(q, k, v, 7)
    torch.testing.assert_close(split, OP.reference(q, k, v, 7), rtol=1e-5, atol=1e-6)


def test_repeats_are_for_inference():
    q, k, v = arguments(1, 3, 2, 1, 16)[0]
    with pytest.raises(ValueError, match="repeats must be at least 1, .* got 0"):
        CALL(q, k, v, 0)
    with pytest.raises(ValueError, match="repeats must be 1 where gradients are wanted; got 2"):
        CALL(q, k.requires_grad_(), v, 2)


def test_large_scores_do_not_overflow():
    """Scores near +-1000: were masked columns scored 0, they would take or give all the weight."""
    q, k, v = (x.abs() for x in arguments(1, 5, 3, 1, 16)[0])
    for sign in (1, -1):
        inputs = ((30 * q, 10 * sign * k, v), {})
        expected = contracts.run_with_gradients(OP.reference, contracts.to_double(inputs))
        result = contracts.run_with_gradients(CALL, inputs)
        for a, b in zip(contracts.outputs(result), contracts.outputs(expected), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3)


def test_triton_op_is_well_formed():
    q, k, v = arguments(2, 5, 3, 1, 8)[0]
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.univigu.cross_attention.default, leaves)
    o, lse = torch.ops.univigu.cross_attention(q, k, v)
    operator = torch.ops.univigu.cross_attention_backward.default
    torch.library.opcheck(operator, (q, k, v, o, lse, torch.ones_like(o)))


def test_triton_refuses_wide_heads():
    with pytest.raises(ValueError, match="must be of head_dim at most 128 .* got 160"):
        CALL(*arguments(1, 2, 3, 1, 160)[0])


def test_sdpa_copies_what_its_kernels_refuse():
    """Rows that do not begin at a multiple of 16 bytes: PyTorch finds no kernel for them in fp32 on
    a GPU, and says so instead of taking another one."""
    whole = torch.randn(2, 9, 3, 16)
    assert aligned(whole) is whole and aligned(view := whole[:, :, 1:]) is view
    for crooked in (whole[..., 1:9], contracts.strided(whole), whole.mT):
        copy = aligned(crooked)
        assert torch.equal(copy, crooked) and copy is not crooked and copy.is_contiguous()
    half = torch.randn(2, 9, 3, 16, dtype=torch.bfloat16)
    assert aligned(half[..., 4:12]) is not half and aligned(half[..., 8:]).storage_offset() == 8
