"""rms_norm: its formula row by row, and the Triton backend at awkward widths, strides and
configurations."""

import contracts
import pytest
import torch
import torch.nn.functional as F
from contracts import DEVICE

from univigu_kernels import OPS
from univigu_kernels._card import CARDS
from univigu_kernels._triton import forced, rehearsal, supports_triton

OP = OPS["rms_norm"]
needs_triton = pytest.mark.skipif(
    supports_triton(DEVICE, torch.float32) is not None, reason="needs Triton"
)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
SHAPES = [(1, 1, 8), (3, 17, 40), (2, 9, 250), (1, 129, 24), (1, 3, 1536), (2, 1, 5120)]


def in_triton(*inputs, **options):
    return OP.backends[0].call(*inputs, **options)


def arguments(batch, rows, width, dtype):
    """Rows whose first channel is far larger, an fp32 weight, an eps that counts."""
    x = torch.randn(batch, rows, width, device=DEVICE)
    x[..., 0] *= 3
    return (x.to(dtype), torch.randn(width, device=DEVICE)), {"eps": 0.1}


def packed_heads(rows, width, dtype=torch.float32):
    """q, k and v, side by side in one buffer between NaNs."""
    joint = torch.full((2, rows, 3 * width + 8), torch.nan, device=DEVICE, dtype=dtype)
    joint[..., 8:] = torch.randn(2, rows, 3 * width, device=DEVICE)
    return joint[..., 8:].chunk(3, -1)


def test_formula():
    (x, weight), options = arguments(2, 3, 4, torch.float64)
    weight, y = weight.double(), torch.empty_like(x)
    for b in range(2):
        for row in range(3):
            y[b, row] = x[b, row] / (x[b, row].square().mean() + options["eps"]).sqrt() * weight
    torch.testing.assert_close(OP.reference(x, weight, **options), y)


@needs_triton
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_within_two_times(shape, dtype, poisoned):
    contracts.assert_two_times(OP, OP.backends[0].call, arguments(*shape, dtype), dtype)


@needs_triton
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("width", [24, 40, 250])
def test_triton_reads_one_of_packed_heads(width, part, poisoned):
    """A row's stride is larger than its width, and another for x than for the results."""
    x, weight = packed_heads(11, width)[part], torch.randn(width, device=DEVICE)
    alone, view = (
        contracts.outputs(contracts.run_with_gradients(in_triton, ((rows, weight), {})))
        for rows in (x.contiguous(), x)
    )
    for a, b in zip(alone, view, strict=True):
        assert torch.equal(a, b)
    contracts.assert_two_times(OP, in_triton, ((x, weight), {}), torch.float32)


@needs_triton
def test_triton_reads_any_stride(poisoned):
    """Transposed rows, a weight with gaps and a gradient that was expanded."""
    (x, weight), options = arguments(2, 7, 24, torch.float32)
    wide = torch.stack([weight, weight], 1)[:, 0]
    expected = in_triton(x, weight, **options)
    for view in (x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(in_triton(view, wide, **options), expected)
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    results = [call(*leaves, **options).sum() for call in (in_triton, OP.reference)]
    for a, b in zip(*(torch.autograd.grad(y, leaves) for y in results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize(
    "options",
    [{"ROWS": 1}, {"ROWS": 8}, {"ROWS": 64}, {"BLOCK": 128}, {"STAGES": 1}, {"num_warps": 1}],
    ids=str,
)
def test_triton_configurations(options, poisoned):
    """Tiles of one row, tiles that end within them, one tile that holds all."""
    inputs = arguments(2, 27, 40, torch.float32)
    with forced("rms_norm_forward", **options), forced("rms_norm_backward", **options):
        contracts.assert_two_times(OP, OP.backends[0].call, inputs, torch.float32)


@needs_triton
def test_many_rows_take_larger_tiles_than_few():
    with rehearsal(CARDS[90]) as launches:
        OP.rehearse(OP.cases["wan2.1-1.3b/480x832x81"])
    assert [launch.options["ROWS"] for launch in launches] == [8, 64, 1, 8]
    assert [launch.grid for launch in launches] == [(4127, 1), (516, 1), (512, 1), (64, 1)]


@needs_triton
@DTYPES
def test_triton_repeats_are_bit_equal(dtype):
    """Also a batch and its samples one by one, but for the weight's gradient."""
    (x, weight), options = arguments(3, 70, 40, dtype)
    inputs = (x, weight), options
    first, second = (contracts.run_with_gradients(in_triton, inputs) for _ in "ab")
    for a, b in zip(contracts.outputs(first), contracts.outputs(second), strict=True):
        assert torch.equal(a, b)
    for b in range(3):
        assert torch.equal(in_triton(x[b : b + 1], weight, **options)[0], first[0][0][b])


@needs_triton
@DTYPES
def test_triton_agrees_with_torch(dtype):
    (x, weight), _ = arguments(2, 19, 64, dtype)
    leaves = [t.detach().requires_grad_() for t in (x, weight.to(dtype))]
    ours, torchs = in_triton(*leaves, eps=1e-5), F.rms_norm(leaves[0], (64,), leaves[1], 1e-5)
    dy = torch.randn_like(x)
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    torch.testing.assert_close(ours, torchs, **near)
    gradients = (torch.autograd.grad(y, leaves, dy) for y in (ours, torchs))
    for a, b in zip(*gradients, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **near)


@needs_triton
def test_triton_without_rows():
    for batch, rows in ((0, 3), (2, 0)):
        inputs = arguments(batch, rows, 16, torch.float32)
        results, gradients = contracts.run_with_gradients(in_triton, inputs)
        assert results[0].shape == (batch, rows, 16)
        assert [g.shape for g in gradients] == [(batch, rows, 16), (16,)]
        assert not any(g.any() for g in gradients)


@needs_triton
def test_triton_rows_of_zeros():
    """A norm of nothing is nothing, and its gradient is that of eps alone."""
    x = torch.zeros(1, 3, 40, device=DEVICE, requires_grad=True)
    weight = torch.randn(40, device=DEVICE, requires_grad=True)
    y = in_triton(x, weight, eps=0.25)
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    assert not y.any() and not dweight.any()
    torch.testing.assert_close(dx, 2 * weight.detach().expand(1, 3, 40))


@needs_triton
def test_triton_op_is_well_formed():
    (x, weight), _ = arguments(2, 5, 16, torch.float32)
    args = (x.requires_grad_(), weight.requires_grad_(), 1e-6)
    torch.library.opcheck(torch.ops.univigu.rms_norm.default, args)
