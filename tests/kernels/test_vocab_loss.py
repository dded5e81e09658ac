"""vocab_loss against cross-entropy of stored logits, below and above one chunk, and the Triton
backend at adversarial shapes."""

import contracts
import pytest
import torch
from contracts import DEVICE
from torch.utils._pytree import tree_map

from univigu_kernels import OPS
from univigu_kernels._triton import forced

OP = OPS["vocab_loss"]
vocab_loss, in_triton = OP.reference, OP.backends[0].call
in_chunks = OP.backends[1].call


@pytest.fixture(params=["one chunk", "chunks"])
def chunk(request, monkeypatch):
    """Makes chunks of at most 7 vocabulary rows, or one of all of them."""
    if request.param == "chunks":
        monkeypatch.setattr("univigu_kernels.vocab_loss._chunks", sevens)


def sevens(rows: int, vocabulary: int) -> list[slice]:
    return [slice(n, min(n + 7, vocabulary)) for n in range(0, vocabulary, 7)]


@pytest.mark.parametrize("with_bias", [True, False])
def test_chunks_against_cross_entropy_of_stored_logits(with_bias, chunk):
    h, weight = torch.randn(2, 5, 8).double(), torch.randn(19, 8).double()
    bias = torch.randn(19).double() if with_bias else None
    targets = torch.randint(19, (2, 5))
    targets[0, :3] = torch.tensor([0, 7, 18])
    targets[1, ::3] = -100
    leaves = [x.requires_grad_() for x in (h, weight, bias) if x is not None]
    cotangent = torch.randn(2, 5).double()
    results = []
    for call in (in_chunks, vocab_loss):
        loss = call(h, weight, bias, targets)
        results.append((loss, *torch.autograd.grad(loss, leaves, cotangent)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not results[0][0][1, ::3].any()


def test_an_ignored_row_of_nan_reaches_no_gradient_and_a_wrong_target_is_infinite(chunk):
    h = torch.randn(1, 3, 4)
    h[0, 1] = torch.nan
    leaves = h.requires_grad_(), torch.randn(19, 4, requires_grad=True)
    loss = in_chunks(*leaves, None, torch.tensor([[2, -100, 19]]))
    assert loss[0, 2].isinf() and loss[0, 1] == 0
    loss[0, :2].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves) and not leaves[0].grad[0, 1:].any()


def test_bf16_rows_give_an_fp32_loss():
    h, weight = torch.randn(1, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert vocab_loss(h, weight, None, torch.tensor([[0, 4, -100]])).dtype == torch.float32
    ignored = vocab_loss(h, weight, None, torch.tensor([[7, 7, 7]]).clamp(max=4), ignore_index=4)
    assert not ignored.any()


def arguments(batch, rows, width, vocabulary, dtype, with_bias=True):
    """(args, kwargs): targets at both ends of the vocabulary, every third row but one ignored."""

    def randn(*shape):
        return torch.randn(*shape, device=DEVICE)

    targets = torch.randint(vocabulary, (batch, rows), device=DEVICE)
    targets[:, 1::3] = -100
    if targets.numel() > 2:
        targets[:, 0], targets[:, 2] = 0, vocabulary - 1
    h, weight = randn(batch, rows, width), randn(vocabulary, width) * (4 / width) ** 0.5
    bias = randn(vocabulary).to(dtype) if with_bias else None
    return (h.to(dtype), weight.to(dtype), bias, targets), {}


SHAPES = [(1, 1, 16, 37), (3, 17, 40, 129), (2, 15, 24, 97), (1, 127, 8, 33), (1, 129, 8, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_within_two_times(shape, dtype, poisoned):
    contracts.assert_two_times(OP, in_triton, arguments(*shape, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_without_a_bias(dtype, poisoned):
    inputs = arguments(2, 15, 24, 97, dtype, with_bias=False)
    contracts.assert_two_times(OP, in_triton, inputs, dtype)


def test_triton_over_many_rows(poisoned):
    inputs = arguments(1, 1023, 8, 21, torch.float32)
    contracts.assert_two_times(OP, in_triton, inputs, torch.float32)


FORWARD = [
    {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "PROGRAMS": 3},
    {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "PROGRAMS": 1, "num_stages": 1},
    {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "PROGRAMS": 264, "num_warps": 4},
]
BACKWARD = [
    {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "CHUNK": 64},
    {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "CHUNK": 40},
    {"BLOCK_M": 32, "BLOCK_N": 128, "BLOCK_K": 64, "CHUNK": 128, "num_warps": 4},
]


@pytest.mark.parametrize("options", list(zip(FORWARD, BACKWARD, strict=True)), ids=str)
def test_triton_configurations(options, poisoned):
    forward, backward = options
    inputs = arguments(3, 17, 40, 129, torch.float32)
    with forced("vocab_loss_forward", **forward), forced("vocab_loss_backward", **backward):
        with forced("vocab_loss_reduce", BLOCK_M=8):
            contracts.assert_two_times(OP, in_triton, inputs, torch.float32)


@pytest.mark.parametrize("ignored", [-100, 4, -(2**40)])
def test_triton_ignored_rows_may_hold_anything(ignored, poisoned):
    """NaN in h and in the gradient of their loss reaches nothing; they are as if they were not."""
    (h, weight, bias, targets), _ = arguments(2, 9, 16, 37, torch.float32)
    targets = targets.masked_fill(targets == 4, 5).masked_fill(targets == -100, ignored)
    kept = targets != ignored
    cotangent = torch.randn(2, 9, device=DEVICE)
    h[~kept], cotangent[~kept] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    loss = in_triton(*leaves, targets, ignore_index=ignored)
    dh, dweight, dbias = torch.autograd.grad(loss, leaves, cotangent)
    assert not loss[~kept].any() and not dh[~kept].any()
    alone = [h[kept][None].detach().requires_grad_(), weight, bias]
    expected = vocab_loss(*alone, targets[kept][None])
    gradients = torch.autograd.grad(expected, alone, cotangent[kept][None])
    for a, b in zip((loss[kept], dh[kept], dweight, dbias), (expected, *gradients), strict=True):
        torch.testing.assert_close(a, b.view(a.shape), rtol=1e-5, atol=1e-5)


def test_triton_all_rows_ignored_or_none(poisoned):
    for batch, rows in ((2, 5), (0, 5), (2, 0)):
        (*floats, targets), _ = arguments(batch, rows, 16, 37, torch.float32)
        inputs = (*floats, torch.full_like(targets, -100)), {}
        (loss,), gradients = contracts.run_with_gradients(in_triton, inputs)
        assert loss.shape == (batch, rows) and not loss.any()
        assert all(not g.any() and not g.isnan().any() for g in gradients)


def test_triton_large_and_masked_logits(poisoned):
    """Rows that overflow exp without a running maximum; a masked bias over whole tiles."""
    (h, weight, bias, targets), _ = arguments(1, 15, 16, 97, torch.float32)
    targets = targets.masked_fill(targets < 64, 70)
    bias[:64] = -torch.inf
    inputs = (30 * h, 5 * weight, bias, targets), {}
    with forced("vocab_loss_forward", **FORWARD[0]), forced("vocab_loss_backward", **BACKWARD[0]):
        results = [
            contracts.outputs(contracts.run_with_gradients(call, inputs))
            for call in (in_triton, vocab_loss)
        ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_triton_target_outside_the_vocabulary_is_loud():
    (h, weight, bias, _), _ = arguments(1, 4, 16, 37, torch.float32)
    targets = torch.tensor([[37, -1, 2**32 + 1, 36]], device=DEVICE)
    loss = in_triton(h, weight, bias, targets)
    assert loss[0, :3].isinf().all() and loss[0, 3].isfinite()


def test_triton_reads_any_stride(poisoned):
    inputs = arguments(2, 9, 24, 45, torch.float32)
    joint = torch.full((2, 14, 24), torch.nan, device=DEVICE)
    joint[:, 5:] = inputs[0][0]
    views = [
        ((joint[:, 5:], *inputs[0][1:]), {}),
        tree_map(contracts.strided, inputs),
        tree_map(lambda x: x.mT.contiguous().mT if x.ndim > 1 else x, inputs),
    ]
    expected = contracts.run_with_gradients(in_triton, inputs)
    for view in views:
        result = contracts.run_with_gradients(in_triton, view)
        for a, b in zip(contracts.outputs(result), contracts.outputs(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_triton_repeats_and_batches_are_bit_equal():
    (h, weight, bias, targets), _ = inputs = arguments(3, 17, 16, 129, torch.float16)
    first, second = (
        contracts.outputs(contracts.run_with_gradients(in_triton, inputs)) for _ in "ab"
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for b in range(3):
        one = in_triton(h[b : b + 1], weight, bias, targets[b : b + 1])
        assert torch.equal(one[0], first[0][b])


def test_triton_saves_and_allocates_no_logits(monkeypatch):
    """64 rows against 2048: no tensor of the op may hold a quarter of their logits."""
    (h, weight, bias, targets), _ = arguments(1, 64, 8, 2048, torch.float32)
    leaves = [x.requires_grad_() for x in (h, weight, bias)]
    sizes, new_empty = [], torch.Tensor.new_empty

    def noted(x, *shape, **options):
        sizes.append(new_empty(x, *shape, **options))
        return sizes[-1]

    monkeypatch.setattr(torch.Tensor, "new_empty", noted)
    with forced("vocab_loss_backward", CHUNK=256), forced("vocab_loss_forward", PROGRAMS=4):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            loss = in_triton(*leaves, targets)
        torch.autograd.grad(loss.sum(), leaves)
    assert len(saved) >= 4 and len(sizes) > 4
    assert max(x.numel() for x in (*saved, *sizes)) < 64 * 2048 / 4


def test_triton_op_is_well_formed():
    (*floats, targets), _ = arguments(2, 5, 16, 37, torch.float32)
    floats = [x.requires_grad_() for x in floats]
    torch.library.opcheck(torch.ops.univigu.vocab_loss.default, (*floats, targets, -100))


@pytest.mark.parametrize("used", [0, 1])
def test_triton_with_one_gradient_wanted(used):
    (h, weight, _, targets), _ = arguments(2, 5, 16, 37, torch.float32, with_bias=False)
    (h, weight)[used].requires_grad_()
    results = [
        torch.autograd.grad(call(h, weight, None, targets).sum(), (h, weight)[used])[0]
        for call in (in_triton, vocab_loss)
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
