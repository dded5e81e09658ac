"""qknorm_rope: the norm spans all heads and precedes the rotation; packed projections; the Triton
backend at adversarial shapes."""

import dataclasses

import contracts
import pytest
import torch
from contracts import DEVICE

from univigu_kernels import OPS, Into, rotary_tables
from univigu_kernels._card import CARDS
from univigu_kernels._spec import Backend
from univigu_kernels._triton import forced, rehearsal

qknorm_rope, rope3d = OPS["qknorm_rope"].reference, OPS["rope3d"].reference
GRID, TEXT, HEADS = (2, 3, 4), 5, 3


def inputs(dtype):
    packed = torch.randn(2, 29, 3 * 48, dtype=torch.float64).to(dtype)
    q, k, _ = packed.chunk(3, -1)
    weight_q, weight_k = torch.rand(2, 48, dtype=torch.float64).to(dtype)
    return q, k, weight_q, weight_k


def test_formula():
    q, k, weight_q, weight_k = inputs(torch.float64)
    rotary = rotary_tables(GRID, TEXT, 16, "cpu", torch.float64)
    actual = qknorm_rope(q, k, weight_q, weight_k, HEADS, rotary, eps=0.1)
    for x, weight, out in ((q, weight_q, actual[0]), (k, weight_k, actual[1])):
        n = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
        torch.testing.assert_close(out, rope3d(n.view(2, 29, HEADS, 16), rotary))


def test_bf16_is_rounded_once():
    arguments = inputs(torch.bfloat16)
    rotary = rotary_tables(GRID, TEXT, 16, "cpu")
    low = qknorm_rope(*arguments, HEADS, rotary)
    high = qknorm_rope(*(x.float() for x in arguments), HEADS, rotary)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


OP = OPS["qknorm_rope"]
qknorm_rope_triton = OP.backends[0].call


def packed_inputs(batch, rows, width, dtype):
    """q and k inside packed projections that end in NaN, and their weights."""
    projected = torch.randn(batch, rows, 3 * width, device=DEVICE).to(dtype)
    projected[..., 2 * width :] = torch.nan
    q, k, _ = projected.chunk(3, -1)
    return q, k, *torch.randn(2, width, device=DEVICE).unbind()


def assert_two_times(inputs, heads, rotary, dtype, eps=0.1):
    def close(call):
        return lambda q, k, weight_q, weight_k: call(q, k, weight_q, weight_k, heads, rotary, eps)

    op = dataclasses.replace(OP, backends=(Backend("reference", close(OP.reference)),))
    contracts.assert_two_times(op, close(qknorm_rope_triton), (inputs, {}), dtype)


FEW = [  # batch, grid, text rows, heads, head_dim
    (1, (1, 1, 1), 0, 1, 16),
    (1, (0, 2, 3), 1, 2, 24),
    (3, (3, 5, 1), 2, 3, 16),
    (2, (1, 1, 17), 7, 1, 64),
    (1, (2, 2, 2), 3, 2, 96),
    (1, (1, 3, 2), 2, 1, 128),
    (1, (2, 1, 3), 3, 5, 4),
]
MANY = [(1, (5, 5, 5), 2, 1, 16), (1, (0, 1, 1), 129, 1, 24)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("batch, grid, text, heads, head_dim", FEW)
def test_triton_is_within_two_times(batch, grid, text, heads, head_dim, dtype, poisoned):
    rotary = rotary_tables(grid, text, head_dim, DEVICE)
    rows = grid[0] * grid[1] * grid[2] + text
    inputs = packed_inputs(batch, rows, heads * head_dim, dtype)
    assert_two_times(inputs, heads, rotary, dtype)


@pytest.mark.parametrize("batch, grid, text, heads, head_dim", MANY)
def test_triton_over_many_rows(batch, grid, text, heads, head_dim, poisoned):
    rotary = rotary_tables(grid, text, head_dim, DEVICE)
    rows = grid[0] * grid[1] * grid[2] + text
    inputs = packed_inputs(batch, rows, heads * head_dim, torch.float32)
    assert_two_times(inputs, heads, rotary, torch.float32)


@pytest.mark.parametrize(
    "options", [{"ROWS": 1}, {"ROWS": 8}, {"ROWS": 64}, {"STAGES": 1}, {"HEADS": 4}], ids=str
)
def test_triton_configurations(options, poisoned):
    rotary = rotary_tables((2, 3, 3), 10, 16, DEVICE)
    inputs = packed_inputs(1, 28, 32, torch.float32)
    with (
        forced("qknorm_rope_forward", **options),
        forced("qknorm_rope_backward", **options),
    ):
        assert_two_times(inputs, 2, rotary, torch.float32)


def test_triton_reads_packed_projections_in_place_in_one_launch():
    rotary = rotary_tables((2, 3, 4), 5, 16, DEVICE)
    q, k, *weights = packed_inputs(2, 29, 48, torch.float16)
    with rehearsal(CARDS[90]) as launches:
        qknorm_rope_triton(q, k, *weights, HEADS, rotary)
    (launch,) = launches
    assert [x.data_ptr() for x in launch.args[:2]] == [q.data_ptr(), k.data_ptr()]


def test_triton_reads_any_stride(poisoned):
    rotary = rotary_tables((2, 3, 1), 3, 16, DEVICE)
    q, k, *weights = (x.contiguous() for x in packed_inputs(2, 9, 32, torch.float32))
    views = [(x.mT.contiguous().mT, contracts.strided(x)) for x in (q, k)]
    expected = qknorm_rope_triton(q, k, *weights, 2, rotary)
    spaced = type(rotary)(rotary.grid, *(contracts.strided(table) for table in rotary[1:]))
    for q_view, k_view in (views[0][:1] + views[1][1:], views[0][1:] + views[1][:1]):
        weight_q, weight_k = (contracts.strided(x) for x in weights)
        actual = qknorm_rope_triton(q_view, k_view, weight_q, weight_k, 2, spaced)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_triton_repeats_are_bit_equal():
    rotary = rotary_tables((2, 3, 1), 3, 16, DEVICE)
    inputs = packed_inputs(2, 9, 32, torch.float16)

    def measure():
        return contracts.run_with_gradients(
            lambda *x: qknorm_rope_triton(*x, 2, rotary), (inputs, {})
        )

    for a, b in zip(*(contracts.outputs(measure()) for _ in "ab"), strict=True):
        assert torch.equal(a, b)


def test_triton_without_rows():
    for batch, grid in ((0, (1, 1, 3)), (2, (0, 1, 1))):
        rotary = rotary_tables(grid, 0, 16, DEVICE)
        inputs = packed_inputs(batch, grid[0] * 3, 32, torch.float32)
        results, gradients = contracts.run_with_gradients(
            lambda *x, rotary=rotary: qknorm_rope_triton(*x, 2, rotary), (inputs, {})
        )
        assert all(x.shape == (batch, grid[0] * 3, 2, 16) for x in results)
        assert not any(g.any() for g in gradients)


def test_mixed_dtypes_raise():
    rotary = rotary_tables((1, 1, 3), 0, 16, DEVICE)
    q, k, *weights = packed_inputs(1, 3, 32, torch.float32)
    for call in (OP.reference, qknorm_rope_triton):
        with pytest.raises(ValueError, match="q and k must be two tensors of one shape"):
            call(q, k.half(), *weights, 2, rotary)
        with pytest.raises(ValueError, match="weight_q and weight_k must be"):
            call(q, k, weights[0], weights[1].half(), 2, rotary)


def test_triton_op_is_well_formed():
    rotary = rotary_tables((1, 2, 2), 2, 16, DEVICE)
    inputs = [x.requires_grad_() for x in packed_inputs(2, 6, 32, torch.float32)]
    operator = torch.ops.univigu.qknorm_rope.default
    torch.library.opcheck(operator, (*inputs, *rotary[1:], list(rotary.grid), 0.1))


def cached_inputs(batch, grid, text, heads, head_dim, dtype):
    """The arguments of a call, whose v is a third of the same projections, and a cache of k and of
    v, 3 rows longer, full of NaN."""
    rows, width = grid[0] * grid[1] * grid[2] + text, heads * head_dim
    rotary = rotary_tables(grid, text, head_dim, DEVICE)
    projected = torch.randn(batch, rows, 3 * width, device=DEVICE).to(dtype)
    weights = torch.randn(2, width, device=DEVICE).unbind()
    *q_k, v = projected.chunk(3, -1)
    cache = torch.full((2, batch, rows + 3, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    return (*q_k, *weights, heads, rotary, 0.1), v, cache


CACHED = [  # batch, grid, text rows, heads, head_dim; the first, a caption's step, has text alone
    (2, (0, 1, 1), 7, 3, 16),
    (2, (2, 3, 1), 5, 2, 24),
    (1, (0, 1, 1), 129, 1, 64),
    (3, (1, 1, 3), 0, 5, 4),
]


BACKENDS = [p.values[1] for p in contracts.implementations() if p.values[0] is OP]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", CACHED, ids=str)
def test_k_and_v_go_where_they_are_kept(shape, backend, poisoned):
    """Every bit is that of a call without and of a copy; no other row of the cache is touched."""
    args, v, cache = cached_inputs(*shape, torch.float32)
    q_alone, k_alone = backend.call(*args)
    into = Into(v, *cache[:, :, 3:])
    q, k = backend.call(*args, into)
    assert torch.equal(q, q_alone) and torch.equal(cache[0, :, 3:], k_alone)
    assert torch.equal(cache[1, :, 3:].flatten(2), v)
    assert k.data_ptr() == into.k_BLHK.data_ptr() and k.shape == k_alone.shape
    assert cache[:, :, :3].isnan().all()


def test_triton_keeps_k_and_v_in_one_launch():
    for dtype in (torch.float16, torch.float32):
        args, v, cache = cached_inputs(2, (0, 1, 1), 5, 3, 16, dtype)
        with rehearsal(CARDS[90]) as launches:
            qknorm_rope_triton(*args, Into(v, *cache[:, :, 3:]))
        (launch,) = launches
        assert launch.args[2].data_ptr() == v.data_ptr()
        kept = [x.data_ptr() for x in launch.args[6:8]]
        assert kept == [x.data_ptr() for x in cache[:, :, 3:]]


def test_triton_op_that_keeps_is_well_formed():
    args, v, cache = cached_inputs(2, (1, 2, 2), 2, 2, 16, torch.float32)
    q, k, weight_q, weight_k, _, rotary, eps = args
    tensors = q, k, v, weight_q, weight_k, *rotary[1:], *cache.nan_to_num()[:, :, 3:]
    operator = torch.ops.univigu.qknorm_rope_into.default
    torch.library.opcheck(operator, (*tensors, list(rotary.grid), eps))


def test_what_cannot_be_kept_is_named():
    args, v, cache = cached_inputs(2, (1, 1, 3), 1, 2, 16, torch.float32)
    k_out, v_out = cache[:, :, 3:]
    apart = k_out.transpose(2, 3).contiguous().transpose(2, 3)
    for into, name in (
        (Into(v[:, 1:], k_out, v_out), "into.v_BLD must be \\[2, 4, 32\\]"),
        (Into(v, k_out[:, 1:], v_out), "into.k_BLHK must be \\[2, 4, 2, 16\\]"),
        (Into(v, k_out, v_out.half()), "into.v_BLHK must be"),
        (Into(v, apart, v_out), "into.k_BLHK must be"),
        (Into(v.clone().requires_grad_(), k_out, v_out), "into must be None where gradients"),
    ):
        for call in (OP.reference, qknorm_rope_triton):
            with pytest.raises(ValueError, match=f"qknorm_rope: {name}"):
                call(*args, into)
