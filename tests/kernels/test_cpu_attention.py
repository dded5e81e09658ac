"""The compiled attention on the CPU, joint and cross: every instruction set of the machine, odd
sizes, several blocks of keys and queries, padding, threads."""

import contracts
import pytest
import torch

from univigu_kernels import OPS, _compiled
from univigu_kernels.cross_attention import cross_attention_cpu

pytestmark = pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
joint_attention = contracts.cpu_kernel("joint_attention")
JOINT, CROSS = OPS["joint_attention"], OPS["cross_attention"]
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def one_thread(poisoned):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def joint(shape, lengths, sees=True, dtype=torch.float32):
    """(B, V, T, Q, H, K) -> arguments; q, k and v lie in one packed buffer. Q last rows, or a pair:
    of the video and of the text."""
    B, V, T, Q, H, K = shape
    q, k, v = torch.randn(B, V + T, 3 * H * K).to(dtype).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (H, K)) for x in (q, k, v))
    lengths = None if lengths is None else torch.tensor(lengths)
    if isinstance(Q, int):
        return q[:, V + T - Q :], k, v, V, lengths, sees
    return torch.cat([q[:, : Q[0]], q[:, V + T - Q[1] :]], 1), k, v, V, lengths, sees, Q[0]


def cross(B, L, C, H, K, dtype=torch.float32):
    return tuple(torch.randn(B, rows, H, K).to(dtype) for rows in (L, C, C))


def differentiate(q, k, v, do, *rest):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    call = joint_attention if rest else cross_attention_cpu
    o = call(*leaves, *rest)
    return o, *torch.autograd.grad(o, leaves, do)


SMALL = [  # (B, V, T, Q, H, K), lengths, video sees text
    ((3, 17, 15, 32, 1, 16), [15, 7, 0], True),
    ((3, 17, 15, 32, 2, 17), [15, 7, 0], False),
    ((3, 18, 15, 20, 1, 8), [1, 15, 14], True),
    ((3, 18, 15, 20, 1, 40), [1, 15, 14], False),
    ((2, 0, 31, 31, 2, 16), [31, 0], True),
    ((1, 31, 0, 31, 2, 33), None, False),
    ((1, 1, 0, 1, 1, 1), None, True),
    ((1, 15, 0, 15, 1, 130), None, True),
    ((2, 127, 2, 129, 1, 64), [1, 2], False),
    ((3, 17, 15, (17, 0), 2, 16), [15, 7, 0], True),
    ((3, 17, 15, (17, 9), 1, 17), [15, 7, 0], False),
]
LARGE = [  # several tiles and blocks of each kind
    ((2, 600, 29, 629, 1, 16), [28, 3], True),
    ((2, 527, 515, 1042, 1, 24), [500, 0], False),
    ((1, 2047, 12, 60, 1, 16), [11], False),
    ((2, 527, 515, (527, 0), 1, 24), [500, 0], True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_joint_is_within_two_times(case, dtype, isa):
    inputs = joint(*case, dtype)
    contracts.assert_two_times(JOINT, joint_attention, (inputs, {}), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_joint_is_within_two_times_over_many_blocks(case, dtype):
    inputs = joint(*case, dtype)
    contracts.assert_two_times(JOINT, joint_attention, (inputs, {}), dtype)


@pytest.mark.parametrize("sees", [True, False])
def test_the_backward_over_several_parts_of_the_keys(sees):
    """Here the reference in fp32 is no measure: it loses more than 4 bits."""
    q, k, v, *rest = joint((1, 2900, 300, 400, 1, 8), [271], sees)
    do = torch.randn_like(q)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(JOINT.reference(*leaves, *rest), leaves, do.double())
    for a, b in zip(differentiate(q, k, v, do, *rest)[1:], expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(2, 29, 11, 2, 16), (1, 17, 48, 1, 8), (3, 5, 33, 1, 256), (1, 129, 513, 1, 128)]
)
def test_cross_is_within_two_times(shape, dtype, isa):
    inputs = cross(*shape, dtype)
    contracts.assert_two_times(CROSS, cross_attention_cpu, (inputs, {}), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("queries", [538, 33, 13])
def test_padded_rows_are_never_used(queries, sees, dtype, isa):
    """NaN in the padded rows of q, k, v and of the output's gradient."""
    lengths = [33, 6, 0]
    q, k, v, *rest = joint((3, 505, 33, queries, 1, 16), lengths, sees, dtype)
    clean = [q, k, v, torch.randn_like(q)]
    padded = torch.arange(538) >= 505 + torch.tensor(lengths)[:, None]
    dirty = [x.masked_fill(padded[:, 538 - x.shape[1] :, None, None], torch.nan) for x in clean]
    for a, b in zip(differentiate(*clean, *rest), differentiate(*dirty, *rest), strict=True):
        assert torch.equal(a, b)
        assert not a[padded[:, 538 - a.shape[1] :]].any()


def test_a_nan_stays_in_its_row(isa):
    q, k, v, *rest = joint((1, 60, 7, 67, 2, 16), None, False)
    q, k, v = (x.clone() for x in (q, k, v))
    q[0, 3, 0] = torch.nan
    o = joint_attention(q, k, v, *rest)
    assert o[0, 3, 0].isnan().all() and o.isnan().sum() == 16
    k[0, 63, 1, 4] = torch.nan  # a text key, which blind video does not see
    o = joint_attention(q, k, v, *rest)
    assert o[0, 60:, 1].isnan().all() and o.isnan().sum() == 16 + 7 * 16
    v[0, 5, 1, 2] = torch.inf
    assert not joint_attention(q, k, v, *rest)[0, :, 1, 2].isfinite().any()


def test_padding_has_no_gradient_beside_a_nan(isa):
    q, k, v, *rest = joint((1, 9, 5, 14, 1, 16), [3])
    k = k.clone()
    k[0, 2] = torch.nan
    o, *gradients = differentiate(q, k, v, torch.ones_like(q), *rest)
    assert o[0, :12].isnan().all() and gradients[0][0, :12].isnan().all()
    assert not any(x[0, 12:].any() for x in (o, *gradients))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_log_sum_exp_is_that_of_the_scores(dtype, isa):
    q, k, v, *_ = joint((2, 520, 9, 529, 2, 16), None, dtype=dtype)
    lengths = torch.tensor([9, 4], dtype=torch.int32)
    _, lse = torch.ops.univigu_C.attention(q, k, v, 520, 520, 529, lengths)
    scores = torch.einsum("bqhk,blhk->bhql", q.double(), k.double()) / 4
    scores[1, :, :, 524:] = -torch.inf
    expected = scores.logsumexp(-1)
    expected[1, :, 524:] = -torch.inf
    torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_stride(dtype):
    q, k, v, *rest = joint((2, 9, 5, 12, 2, 16), [5, 2], dtype=dtype)
    do = torch.randn_like(q)
    expected = differentiate(q, k, v, do, *rest)
    for view in (
        contracts.strided,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    ):
        result = differentiate(*(view(x) for x in (q, k, v, do)), *rest)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    ones = torch.ones_like(q)
    for a, b in zip(
        differentiate(q, k, v, ones[:1, :1, :1, :1].expand_as(q), *rest),
        differentiate(q, k, v, ones, *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_and_repeats_give_the_same_bits(dtype):
    q, k, v, *rest = joint((1, 2100, 35, 700, 3, 16), [30], True, dtype)
    do = torch.randn_like(q)
    results = []
    for threads in (1, 2, 2, 1):
        torch.set_num_threads(threads)
        results.append(differentiate(q, k, v, do, *rest))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_one_key_gives_its_value(isa):
    q, k, v = cross(1, 5, 1, 2, 16)
    o, dq, dk, dv = differentiate(q, k, v, torch.ones_like(q))
    torch.testing.assert_close(o, v.expand_as(o))
    torch.testing.assert_close(dv, torch.full_like(dv, 5))
    for gradient in (dq, dk):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 0, 2, 8), (2, 0, 3, 2, 8), (0, 3, 2, 2, 8)], ids=str)
def test_without_queries_or_keys(shape):
    q, k, v = cross(*shape)
    o, *gradients = differentiate(q, k, v, torch.ones_like(q))
    assert o.shape == q.shape and not o.any()
    assert not any(gradient.any() for gradient in gradients)


def test_large_scores_do_not_overflow(isa):
    """Scores near +-1000: were the columns that fill a vector scored 0, they would count."""
    q, k, v = (x.abs() for x in cross(1, 5, 3, 1, 16))
    for sign in (1, -1):
        inputs = ((30 * q, 10 * sign * k, v), {})
        expected = contracts.run_with_gradients(CROSS.reference, contracts.to_double(inputs))
        result = contracts.run_with_gradients(cross_attention_cpu, inputs)
        for a, b in zip(contracts.outputs(result), contracts.outputs(expected), strict=True):
            torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-3)


def test_only_what_is_asked_for_is_differentiated():
    q, k, v = cross(1, 4, 3, 1, 8)
    k.requires_grad_()
    o, lse = torch.ops.univigu_C.attention(q, k, v, 4, 3, 3, None)
    assert o.requires_grad and not lse.requires_grad
    assert torch.autograd.grad(o.sum(), k)[0].shape == k.shape


@pytest.mark.parametrize("lengths", [None, [3, 1]], ids=str)
def test_the_operators_are_well_formed(lengths):
    q, k, v, video, lengths, _ = joint((2, 5, 3, 6, 1, 8), lengths)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    geometry = (3, video, video, lengths)
    torch.library.opcheck(torch.ops.univigu_C.attention.default, (*leaves, *geometry))
    o, lse = torch.ops.univigu_C.attention(q, k, v, *geometry)
    inputs = (q, k, v, o, lse, torch.ones_like(o), *geometry)
    torch.library.opcheck(torch.ops.univigu_C.attention_backward.default, inputs)


def test_what_does_not_fit_raises():
    with pytest.raises(RuntimeError, match="must be of head_dim at most 256 .* got 257"):
        cross_attention_cpu(*cross(1, 2, 3, 1, 257))
    q, k, v = cross(1, 4, 3, 1, 8)
    attention = torch.ops.univigu_C.attention
    for arguments in ((q, k, v[:, :2], 4, 3, 3), (q, k, v.bfloat16(), 4, 3, 3), (q, k, v, 5, 3, 3)):
        with pytest.raises(RuntimeError, match="attention: .* must be "):
            attention(*arguments, None)
    with pytest.raises(RuntimeError, match="must be float32 or bfloat16 in the backend cpu"):
        cross_attention_cpu(q.double(), k.double(), v.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, [49, 20]], ids=str)
def test_few_queries_have_the_bits_of_many(lengths, dtype, isa):
    """Up to 48 pack the keys and values where they use them: here two blocks of keys."""
    q, *rest = joint((2, 600, 49, 49, 2, 40), lengths, dtype=dtype)
    many = joint_attention(q, *rest)
    assert torch.equal(joint_attention(q[:, 1:], *rest), many[:, 1:])
