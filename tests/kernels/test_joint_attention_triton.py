"""joint_attention in Triton: tiles, splits, padded rows and strides. test_joint_attention.py has
what is asked of every backend."""

import contextlib
import heapq

import contracts
import pytest
import torch
from contracts import DEVICE

from univigu_kernels import OPS, _flash
from univigu_kernels._card import CARDS
from univigu_kernels._triton import forced, supports_triton

OP = OPS["joint_attention"]
needs_triton = pytest.mark.skipif(
    supports_triton(DEVICE, torch.float32) is not None, reason="needs triton"
)


@contextlib.contextmanager
def blocks(m, n, span=None, splits=None):
    """Tiles of m queries by n keys in every kernel, which a Hopper has room for; `span` blocks of
    keys for a program of the forward kernel, `splits` programs for a block of dk and dv."""
    tile = _flash.flash_options(m, n, 8, 1)
    assert _flash.forward_bytes(CARDS[90], 4, 64, tile) <= CARDS[90].shared
    with contextlib.ExitStack() as stack:
        for kernel in ("flash_forward", "flash_dkdv", "flash_dq"):
            stack.enter_context(forced(kernel, BLOCK_M=m, BLOCK_N=n))
        if span is not None:
            stack.enter_context(forced("flash_split", span=span))
        if splits is not None:
            stack.enter_context(forced("flash_dkdv_split", splits=splits))
        yield


def arguments(shape, lengths, sees=True, dtype=torch.float32):
    """The (args, kwargs) of a shape (B, V, T, Q, H, K); q, k and v are in one packed buffer.
    Q: queries of the last rows, or a pair: of the video and of the text."""
    B, V, T, Q, H, K = shape
    q, k, v = torch.randn(B, V + T, 3 * H * K, device=DEVICE).to(dtype).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (H, K)) for x in (q, k, v))
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    if isinstance(Q, int):
        return (q[:, V + T - Q :], k, v, V, lengths, sees), {}
    q = torch.cat([q[:, : Q[0]], q[:, V + T - Q[1] :]], 1)
    return (q, k, v, V, lengths, sees, Q[0]), {}


CASES = [  # (B, V, T, Q, H, K), lengths, video sees text, tile of queries, of keys
    ((3, 17, 15, 32, 1, 16), [15, 7, 0], True, 16, 16),
    ((3, 17, 15, 32, 1, 16), [15, 7, 0], False, 16, 16),
    ((3, 18, 15, 20, 1, 8), [1, 15, 14], True, 16, 16),
    ((3, 18, 15, 20, 1, 8), [1, 15, 14], False, 16, 16),
    ((2, 33, 16, 49, 1, 24), [16, 15], False, 32, 16),
    ((2, 0, 31, 31, 2, 16), [31, 0], True, 16, 16),
    ((1, 31, 0, 31, 2, 16), None, False, 16, 16),
    ((1, 1, 0, 1, 1, 2), None, True, 128, 128),
    ((1, 15, 0, 15, 1, 64), None, True, 64, 64),
    ((1, 127, 2, 129, 1, 16), [1], True, 64, 64),
    ((3, 33, 15, (33, 0), 1, 16), [15, 7, 0], True, 16, 16),
    ((3, 33, 15, (33, 9), 1, 16), [15, 7, 0], False, 16, 16),
    ((1, 1000, 23, 1023, 1, 16), [21], False, 128, 128),
    ((1, 1000, 23, 23, 1, 16), [21], True, 32, 128),
    ((1, 64, 64, 128, 1, 96), None, True, 64, 64),
]


@needs_triton
@pytest.mark.parametrize(
    "case, dtype",
    [(case, torch.float32) for case in CASES]
    + [(case, torch.float16) for case in CASES[:6] + CASES[10:12]],
    ids=str,
)
def test_triton_is_within_two_times(case, dtype, poisoned):
    shape, lengths, sees, m, n = case
    inputs = arguments(shape, lengths, sees, dtype)
    with blocks(m, n):
        contracts.assert_two_times(OP, OP.backends[0].call, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "m, n", [(128, 128), (128, 64), (64, 64), (64, 128), (32, 128), (128, 32), (32, 32)]
)
def test_triton_configurations(m, n, dtype, poisoned):
    inputs = arguments((1, 70, 65, 135, 1, 16), [64], False, dtype)
    with blocks(m, n):
        contracts.assert_two_times(OP, OP.backends[0].call, inputs, dtype)


@needs_triton
@pytest.mark.parametrize("rows", [1, 4, 64])
def test_triton_rows_of_the_other_kernels(rows, poisoned):
    inputs = arguments((2, 17, 6, 23, 2, 8), [5, 2])
    others = forced("flash_delta_rows", ROWS=rows), forced("flash_reduce", ROWS=rows)
    with blocks(16, 16, span=1), others[0], others[1]:
        contracts.assert_two_times(OP, OP.backends[0].call, inputs, torch.float32)


@needs_triton
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("queries", [25, (33, 0)])
@pytest.mark.parametrize("span, splits", [(1, 5), (2, 2), (3, 3)])
def test_triton_splits(span, splits, queries, sees, poisoned):
    """Four blocks of keys, the last one short: 1 each, 2 each, 3 and 1. The last splits hold no key
    of the shorter samples, and no query of blind video."""
    inputs = arguments((3, 33, 20, queries, 1, 16), [20, 3, 0], sees)
    with blocks(16, 16, span, splits):
        contracts.assert_two_times(OP, OP.backends[0].call, inputs, torch.float32)


def test_spans():
    """Blocks of keys for a program. Text rows alone against 33k keys, of the 1.3B by
    multiprocessors, of eight captions and of the 14B; all rows; too few keys to cut."""
    assert [_flash.span_of(24, 258, n) for n in (20, 108, 132, 264)] == [104, 58, 48, 26]
    few, full = ((192, 258), (80, 258)), ((3096, 258), (24, 8), (1, 1))
    assert [_flash.span_of(*x, 132) for x in few + full] == [127, 81, 258, 8, 1]


def idle(tiles, blocks, programs, span):
    """The share of time in which programs side by side wait, by the clock of each: pieces in the
    order of the grid go to whoever is free, and take as many blocks as they have, and START."""
    free = [0] * programs
    for start in range(0, blocks, span):
        for _ in range(tiles):
            heapq.heapreplace(free, free[0] + min(span, blocks - start) + _flash.START)
    return 1 - tiles * blocks / (programs * max(free))


@pytest.mark.parametrize(
    "tiles, blocks, programs, share",
    [
        (24, 258, 132, 0.10),  # a caption
        (192, 258, 132, 0.05),  # eight
        (12, 516, 132, 0.10),  # one of at most 64 tokens
        (24, 258, 108, 0.08),  # A100
        (24, 1032, 170, 0.05),  # RTX 50
        (80, 258, 132, 0.09),  # 14B
    ],
)
def test_keys_are_shared_out_evenly(tiles, blocks, programs, share):
    """24 tiles in 5 equal pieces each leave 16% idle, 192 tiles in one piece each 28%."""
    assert idle(tiles, blocks, programs, _flash.span_of(tiles, blocks, programs)) < share


def differentiate(q, k, v, do, *rest):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = OP.backends[0].call(*leaves, *rest)
    return o, *torch.autograd.grad(o, leaves, do)


@needs_triton
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("queries, span, splits", [(38, 3, 1), (13, 3, 1), (13, 2, 3)])
def test_triton_never_uses_padded_rows(queries, span, splits, sees, poisoned):
    """NaN in the padded rows of q, k, v and of the output's gradient."""
    lengths = [13, 6, 0]
    (q, k, v, *rest), _ = arguments((3, 25, 13, queries, 1, 16), lengths, sees)
    clean = [q, k, v, torch.randn_like(q)]
    padded = torch.arange(38, device=DEVICE) >= 25 + torch.tensor(lengths, device=DEVICE)[:, None]
    dirty = [x.masked_fill(padded[:, 38 - x.shape[1] :, None, None], torch.nan) for x in clean]
    with blocks(16, 16, span, splits):
        for a, b in zip(differentiate(*clean, *rest), differentiate(*dirty, *rest), strict=True):
            assert torch.equal(a, b)
            assert not a[padded[:, 38 - a.shape[1] :]].any()


@needs_triton
def test_triton_agrees_with_sdpa():
    """Values and gradients at the width of a real head, with the default configuration."""
    (q, k, v, *rest), _ = arguments((2, 40, 12, 52, 2, 128), [12, 5], False)
    do = torch.randn_like(q)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = contracts.backend("joint_attention", "sdpa")(*leaves, *rest)
    expected = (o, *torch.autograd.grad(o, leaves, do))
    for a, b in zip(differentiate(q, k, v, do, *rest), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_triton
def test_triton_saves_the_log_sum_exp():
    (q, k, v, *rest), _ = arguments((2, 20, 9, 29, 2, 16), [9, 4])
    for span in (2, 1):
        with blocks(16, 16, span):
            _, lse = torch.ops.univigu.joint_attention(q, k, v, *rest, 20)
        scores = torch.einsum("bqhk,blhk->bhql", q, k).double() / 4
        scores[1, :, :, 24:] = -torch.inf
        expected = scores.logsumexp(-1)
        expected[1, :, 24:] = -torch.inf
        torch.testing.assert_close(lse, expected.float())


@needs_triton
def test_triton_reads_any_stride():
    (q, k, v, *rest), _ = arguments((2, 9, 5, 12, 2, 16), [5, 2])
    do = torch.randn_like(q)
    expected = differentiate(q, k, v, do, *rest)
    for view in (
        contracts.strided,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        result = differentiate(*(view(x) for x in (q, k, v, do)), *rest)
        for a, b in zip(result, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    summed = differentiate(q, k, v, torch.ones(1, device=DEVICE).expand_as(q), *rest)
    for a, b in zip(summed, differentiate(q, k, v, torch.ones_like(q), *rest), strict=True):
        assert torch.equal(a, b)


@needs_triton
def test_triton_repeats_are_bit_equal():
    (q, k, v, *rest), _ = arguments((2, 33, 12, 45, 1, 16), [11, 3], dtype=torch.float16)
    do = torch.randn_like(q)
    with blocks(16, 16, span=2, splits=3):
        first, second = (differentiate(q, k, v, do, *rest) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@needs_triton
def test_triton_lengths_of_any_integer_dtype_and_out_of_range():
    """On a device lengths are not read back, so those out of range are clamped."""
    (q, k, v, video, lengths, sees), _ = arguments((3, 9, 5, 14, 1, 8), [5, 0, 3])
    clamped = torch.tensor([99, -4, 3], device=DEVICE)
    results = []
    for given in (lengths, lengths.int(), lengths.cpu(), clamped):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, lse = torch.ops.univigu.joint_attention(*leaves, video, given, sees, 9)
        results.append((o, lse, *torch.autograd.grad(o.sum(), leaves)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@needs_triton
def test_triton_without_queries_or_keys():
    for shape in ((0, 4, 3, 7, 2, 8), (2, 4, 3, 0, 2, 8), (2, 0, 0, 0, 2, 8)):
        (q, k, v, *rest), _ = arguments(shape, None)
        o, *gradients = differentiate(q, k, v, torch.ones_like(q), *rest)
        assert o.shape == q.shape and not any(g.any() for g in gradients)


@needs_triton
@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=str)
def test_triton_op_is_well_formed(lengths):
    (q, k, v, *rest), _ = arguments((2, 5, 3, (3, 3), 1, 8), lengths, False)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.univigu.joint_attention.default, (*leaves, *rest))
    o, lse = torch.ops.univigu.joint_attention(q, k, v, *rest)
    inputs = (q, k, v, o, lse, torch.ones_like(o), *rest)
    torch.library.opcheck(torch.ops.univigu.joint_attention_backward.default, inputs)


@needs_triton
def test_triton_refuses_wide_heads():
    inputs, _ = arguments((1, 2, 1, 3, 1, 160), None)
    with pytest.raises(ValueError, match="must be of head_dim at most 128 .* got 160"):
        OP.backends[0].call(*inputs)
