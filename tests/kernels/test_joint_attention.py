"""joint_attention: padding, text-only queries and blind video queries, in every backend."""

from functools import partial

import pytest
import torch
from contracts import DEVICE, backend

from univigu_kernels import OPS
from univigu_kernels._attention import attend_sdpa
from univigu_kernels._compiled import built
from univigu_kernels._libraries import dense
from univigu_kernels._triton import supports_triton
from univigu_kernels.joint_attention import by_slices, joint_attention_by

OP = OPS["joint_attention"]
VIDEO, TEXT = 7, 5
LENGTHS = torch.tensor([5, 2, 0])
needs_triton = pytest.mark.skipif(
    supports_triton(DEVICE, torch.float32) is not None, reason="needs triton"
)


def masked_sdpa(q, k, v, video_rows, text_lengths=None, video_sees_text=True, video_queries=None):
    """The path that sdpa takes with lengths."""
    if text_lengths is None:
        text_lengths = torch.full((len(k),), k.shape[1] - video_rows)
    rest = (video_rows, text_lengths, video_sees_text, video_queries)
    return backend("joint_attention", "sdpa")(q, k, v, *rest)


def triton_in_fp32(q, k, v, video_rows, text_lengths=None, *rest):
    """Triton's backend on the device of the tests, for arguments in fp64 on the CPU."""
    q, k, v = (x.to(DEVICE, torch.float32) for x in (q, k, v))
    lengths = None if text_lengths is None else text_lengths.to(DEVICE)
    return OP.backends[0].call(q, k, v, video_rows, lengths, *rest).cpu().double()


def cpu_in_fp32(q, k, v, *rest, **named):
    q, k, v = (x.float() for x in (q, k, v))
    return backend("joint_attention", "cpu")(q, k, v, *rest, **named).double()


CALLS = {
    "reference": OP.reference,
    "sdpa": backend("joint_attention", "sdpa"),
    "masked": masked_sdpa,
    # The rows of cuDNN, flash-attn and xformers, around an attention that runs here.
    "by_rows": partial(joint_attention_by, partial(by_slices, dense(attend_sdpa))),
    "triton": triton_in_fp32,
    "cpu": cpu_in_fp32,
}
MARKS = {
    "triton": needs_triton,
    "cpu": pytest.mark.skipif(not built(), reason="the compiled module is not built"),
}


@pytest.fixture(params=[pytest.param(n, marks=MARKS.get(n, ())) for n in CALLS])
def attend(request):
    return CALLS[request.param]


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)


def random_qkv(rows=VIDEO + TEXT, dtype=torch.float64):
    return torch.randn(3, 3, rows, 2, 8, dtype=dtype).unbind()


def truth(q, k, v, visible):
    """Row by row: softmax over the visible keys of each query, zeros where there is none."""
    o = torch.zeros_like(q)
    for b, i in visible.any(-1).nonzero().tolist():
        keys = visible[b, i]
        scores = torch.einsum("hk,lhk->hl", q[b, i], k[b, keys]) / q.shape[-1] ** 0.5
        o[b, i] = torch.einsum("hl,lhk->hk", scores.softmax(-1), v[b, keys])
    return o


def visibility(video_rows, rows, lengths, video_sees_text):
    row = torch.arange(rows)
    real = row < video_rows + lengths[:, None]
    visible = real[:, :, None] & real[:, None, :]
    if not video_sees_text:
        visible &= ~((row < video_rows)[:, None] & (row >= video_rows))
    return visible


@pytest.mark.parametrize("video_sees_text", [True, False])
@pytest.mark.parametrize("video_rows", [VIDEO, 0, VIDEO + TEXT])
def test_against_a_row_by_row_softmax(attend, video_rows, video_sees_text):
    q, k, v = random_qkv()
    rows = q.shape[1]
    lengths = LENGTHS.clamp(max=rows - video_rows)
    full = torch.full_like(lengths, rows - video_rows)
    for given in (lengths, None):
        actual = attend(q, k, v, video_rows, given, video_sees_text)
        visible = visibility(video_rows, rows, full if given is None else given, video_sees_text)
        assert_close(actual, truth(q, k, v, visible))


@pytest.mark.parametrize("video_sees_text", [True, False])
@pytest.mark.parametrize("video_rows", [VIDEO, 0])
def test_padding_is_never_read(attend, video_rows, video_sees_text):
    clean = random_qkv()
    lengths = torch.tensor([5, 2, 0])
    padded = torch.arange(VIDEO + TEXT) >= video_rows + lengths[:, None]
    poisoned = [x.masked_fill(padded[..., None, None], torch.nan) for x in clean]
    results = []
    for inputs in (clean, poisoned):
        leaves = [x.clone().requires_grad_() for x in inputs]
        o = attend(*leaves, video_rows, lengths, video_sees_text)
        results.append((o, *torch.autograd.grad(o.square().sum(), leaves)))
    for a, b in zip(*results, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b)
        assert not b[padded].any()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("video_sees_text", [True, False])
@pytest.mark.parametrize(
    "video, rest", [(None, TEXT), (None, 2), (None, TEXT + 3), (None, 0), (VIDEO, 0), (3, 2)]
)
def test_some_queries_equal_their_rows_of_the_full_call(
    attend, video, rest, video_sees_text, lengths
):
    """The last queries, or video rows and the last text rows: values and gradients, with NaN in
    the padded rows."""
    q, k, v = (x[:, :, :1] for x in random_qkv())
    rows = torch.arange(VIDEO + TEXT)
    chosen = (rows < (video or 0)) | (rows >= VIDEO + TEXT - rest)
    do = torch.randn_like(q) * chosen[:, None, None]
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    o = attend(*full, VIDEO, lengths, video_sees_text)
    expected = [o[:, chosen], *torch.autograd.grad(o, full, do)]
    if lengths is not None:
        padded = (rows >= VIDEO + lengths[:, None])[..., None, None]
        q, k, v = (x.masked_fill(padded, torch.nan) for x in (q, k, v))
    leaves = [x.clone().requires_grad_() for x in (q[:, chosen], k, v)]
    o = attend(*leaves, VIDEO, lengths, video_sees_text, video)
    actual = [o, *torch.autograd.grad(o, leaves, do[:, chosen])]
    expected[1] = expected[1][:, chosen]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries, video", [(VIDEO, 1), (4, 5), (4, -1), (10, VIDEO + 1)])
def test_video_queries_out_of_range_raise(queries, video):
    q, k, v = random_qkv()
    for each in OP.backends:
        with pytest.raises(ValueError, match="video_queries must be between"):
            each.call(q[:, :queries], k, v, VIDEO, None, True, video)


def test_blind_video_ignores_text(attend):
    q, k, v = random_qkv()
    other_k, other_v = k.clone(), v.clone()
    other_k[:, VIDEO:] += 1
    other_v[:, VIDEO:] += 1
    blind = [attend(q, *kv, VIDEO, None, False) for kv in ((k, v), (other_k, other_v))]
    assert torch.equal(blind[0][:, :VIDEO], blind[1][:, :VIDEO])
    assert not torch.allclose(blind[0][:, VIDEO:], blind[1][:, VIDEO:])
    seeing = [attend(q, *kv, VIDEO) for kv in ((k, v), (other_k, other_v))]
    assert not torch.allclose(seeing[0][:, :VIDEO], seeing[1][:, :VIDEO])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_is_within_twice_the_reference(dtype):
    for lengths in (None, LENGTHS):
        q, k, v = random_qkv(dtype=dtype)
        arguments = (VIDEO, lengths)
        exact = CALLS["reference"](q.double(), k.double(), v.double(), *arguments)
        plain = (CALLS["reference"](q, k, v, *arguments).double() - exact).abs().max()
        for name in ("sdpa", "masked"):
            error = (CALLS[name](q, k, v, *arguments).double() - exact).abs().max()
            assert error <= 2 * plain + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["sdpa", "reference", "by_rows", "cpu"])
@pytest.mark.parametrize("lengths", [[5, 6, 0], [5, -1, 0]])
def test_lengths_out_of_range_raise(name, lengths):
    with pytest.raises(ValueError, match=r"text_lengths\[1\] must be between 0 and the 5"):
        CALLS[name](*random_qkv(), VIDEO, torch.tensor(lengths))
