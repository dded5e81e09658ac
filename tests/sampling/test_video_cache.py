"""Captioning from kept video K and V: what it approximates, when it is exact, what it reports."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from tiny_sampling import T, V, finish, make, model

from engine.config import EMBEDDED
from engine.errors import UsageError
from engine.pipeline import Pipeline
from engine.run import cache_drift
from engine.toy import draw_scenes, render


@pytest.mark.parametrize(
    "kernels,dtype",
    [("reference", torch.float64), ("auto", torch.float32), ("auto", torch.bfloat16)],
)
@pytest.mark.parametrize("changes", [{}, {"mask_source": True}, {"text_flow": "embedding"}])
def test_a_model_whose_video_is_blind_to_text_loses_nothing(kernels, dtype, changes):
    net = model(dtype, kernels, video_sees_text=False, **changes)
    exact = finish(make(net, "v2t", steps=8))
    frozen = finish(make(net, "v2t", steps=8, refresh_every=8))
    if changes.get("text_flow") == "embedding":
        torch.testing.assert_close(exact.tokens, frozen.tokens, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(exact.tokens, frozen.tokens)
    assert frozen.cache_change() == 0


def test_cached_steps_compute_text_rows_alone(calls):  # noqa: F811
    net = model()
    seen = calls(net)
    finish(make(net, "v2t", B=2, steps=7, refresh_every=3))
    assert seen[f"blocks.1.attn1.to_qkv:(2, {V + T})"] == 3, "steps 0, 3 and 6"
    assert seen[f"blocks.1.attn1.to_qkv:(2, {T})"] == 4


@pytest.mark.parametrize("refresh_every", [2, 3, 8])
def test_kept_rows_are_those_of_the_last_whole_step(refresh_every):
    """The same by hand: the whole network, in whose attention the video's keys and values are
    replaced by those of the last refresh."""
    net, kept, step = model(text_flow="embedding"), {}, [0]  # vectors show small differences
    cached = finish(make(net, "v2t", steps=8, refresh_every=refresh_every))
    attend = net.ops.joint_attention

    def from_last_refresh(q, k, v, *rest, **options):
        layer = len(kept) if step[0] % refresh_every == 0 else step[1]
        if step[0] % refresh_every == 0:
            kept[layer] = k[:, :V], v[:, :V]
        else:
            step[1] += 1
            k, v = (
                torch.cat([old, x[:, V:]], 1) for old, x in zip(kept[layer], (k, v), strict=True)
            )
        return attend(q, k, v, *rest, **options)

    for block in net.blocks:
        block.attn1.ops = replace(
            net.ops,
            joint_attention=from_last_refresh,
            text_query_attention=from_last_refresh,
        )
    by_hand = make(net, "v2t", steps=8)
    step.append(0)
    for i in by_hand.steps():
        step[:] = [i + 1, 0]
        if step[0] % refresh_every == 0:
            kept.clear()
    torch.testing.assert_close(cached.tokens, by_hand.tokens, rtol=1e-6, atol=1e-6)
    exact = finish(make(model(text_flow="embedding"), "v2t", steps=8))
    assert (cached.tokens - exact.tokens).abs().max() > 1e-4


def test_the_change_of_the_cache_is_measured():
    run = finish(make(model(), "v2t", steps=8, refresh_every=8))
    change = run.cache_change()
    assert 0 < change < 1
    with torch.no_grad():
        for cache in run.step.caches:
            cache.k_BLHK.mul_(2)
            cache.v_BLHK.mul_(2)
    assert run.cache_change() == pytest.approx(1, abs=change)


def test_drift_counts_equal_tokens_and_compares_vectors():
    a, b = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), torch.tensor([[1, 2, 3, 5], [0, 0, 0, 0]])
    found = cache_drift(a, b, 0.25)
    assert found == [
        {"text_agreement": 0.75, "kv_change": 0.25},
        {"text_agreement": 0.0, "kv_change": 0.25},
    ]
    vectors = torch.randn(2, 4, 8)
    assert cache_drift(vectors, 3 * vectors, 0.0)[1]["text_agreement"] == pytest.approx(1)
    assert cache_drift(vectors, -vectors, 0.0)[0]["text_agreement"] == pytest.approx(-1)


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


def test_a_caption_reports_its_drift(pipe):
    clip = render(draw_scenes(2, 31, held_out=True))
    choices = {"seed": [1, 2], "progress": False}
    exact = pipe.caption(clip, 12, **choices)
    results = pipe.caption(clip, 12, video_cache="frozen", report_drift=True, **choices)
    for a, b in zip(exact, results, strict=True):
        assert a.drift is None and b.settings["video_cache"] == "frozen"
        assert b.drift["text_agreement"] > 0.8 and 0 < b.drift["kv_change"] < 0.5
    same = pipe.caption(clip, 12, video_cache=1, report_drift=True, **choices)
    assert [r.caption for r in same] == [r.caption for r in exact]
    assert same[0].drift == {"text_agreement": 1.0, "kv_change": 0.0}


@pytest.mark.parametrize("value", ["warm", 0, -3, 2.5])
def test_an_unknown_cache_is_named(pipe, value):
    with pytest.raises(UsageError, match="video_cache must be exact, frozen or a number of steps"):
        pipe.caption(
            render(draw_scenes(1, 31, held_out=True)), 2, video_cache=value, progress=False
        )


@pytest.mark.parametrize("refresh_every, cached", [(1, 0), (4, 3)])
def test_text_queries_have_an_attention_of_their_own(refresh_every, cached):
    """In the last layer of each step, where the video's rows end, and in all layers of a cached
    one: few queries leave a backend that was chosen for all rows idle."""
    net, calls = model(), Counter()
    names = ("joint_attention", "text_query_attention")

    def counted(name):
        return lambda *args, **kwargs: (
            calls.update([name]) or getattr(net.ops, name)(*args, **kwargs)
        )

    for block in net.blocks:
        block.attn1.ops = replace(net.ops, **{name: counted(name) for name in names})
    finish(make(net, "v2t", steps=4, refresh_every=refresh_every))
    layers, whole = len(net.blocks), 4 - cached
    assert calls["joint_attention"] == whole * (layers - 1)
    assert calls["text_query_attention"] == whole + cached * layers
