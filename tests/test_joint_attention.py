"""joint_attention: padding, text-only queries and blind video queries, in every backend."""

import pytest
import torch

from univigu_kernels import OPS, joint_attention

VIDEO, TEXT = 7, 5
LENGTHS = torch.tensor([5, 2, 0])


def masked_sdpa(q, k, v, video_rows, text_lengths=None, video_sees_text=True):
    """The path that sdpa takes when the lengths lie on a device."""
    if text_lengths is None:
        text_lengths = torch.full((len(k),), k.shape[1] - video_rows)
    return joint_attention._attend_mask(q, k, v, video_rows, text_lengths, video_sees_text)


CALLS = {b.name: b.call for b in OPS["joint_attention"].backends} | {"masked": masked_sdpa}


@pytest.fixture(params=CALLS)
def attend(request):
    return CALLS[request.param]


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
        torch.testing.assert_close(actual, truth(q, k, v, visible))


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
@pytest.mark.parametrize("queries", [TEXT, 2, TEXT + 3, 0])
def test_last_queries_alone_equal_the_tail_of_the_full_call(
    attend, queries, video_sees_text, lengths
):
    q, k, v = random_qkv()
    first = q.shape[1] - queries
    tail = attend(q[:, first:], k, v, VIDEO, lengths, video_sees_text)
    full = attend(q, k, v, VIDEO, lengths, video_sees_text)
    torch.testing.assert_close(tail, full[:, first:])


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
            if name == "masked" and lengths is None:
                continue
            error = (CALLS[name](q, k, v, *arguments).double() - exact).abs().max()
            assert error <= 2 * plain + torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("name", ["sdpa", "reference"])
@pytest.mark.parametrize("lengths", [[5, 6, 0], [5, -1, 0]])
def test_lengths_out_of_range_raise(name, lengths):
    with pytest.raises(ValueError, match=r"text_lengths\[1\] must be between 0 and the 5"):
        CALLS[name](*random_qkv(), VIDEO, torch.tensor(lengths))
