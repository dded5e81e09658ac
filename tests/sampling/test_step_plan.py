"""What is constant over a run is computed once, what is not asked for is not computed, and the
result is that of the whole network run at every step."""

from collections import Counter

import pytest
import torch
from tiny_sampling import SHAPE, C, T, V, finish, make, model, prompts

from engine import flow, sample
from engine.errors import UsageError
from engine.model import _rotary
from engine.schedule import schedule
from univigu_kernels.flow_step import SolverState, TextUpdate, VideoUpdate


def by_hand(net, mode, B=2, steps=4, lengths=None, guidance=3.0, text_steps=None):
    """The whole network at every evaluation, prompt and null apart, the whole context."""
    plan = schedule(mode, steps, 3.0, "unipc", "exact", text_steps=text_steps)
    cond, null = prompts(B) if mode != "v2t" else (torch.zeros(B, C, 8), None)
    seeds = torch.arange(B)
    x = SolverState(*(sample.video_noise(SHAPE, list(range(B)), "cpu"),) * 4)
    tokens = sample.text_source(net, T, list(range(B)))
    lengths = None if lengths is None else torch.tensor(lengths)

    with torch.no_grad():
        for i in range(len(plan)):
            times = (torch.full((B,), t[i]) for t in (plan.video_times, plan.text_times))
            times, video, text = tuple(times), None, None
            out = net(x.x, tokens, *times, cond, lengths)
            if plan.video_moves[i]:
                other = net(x.x, tokens, *times, null, lengths).velocity
                row = plan.coefficients[i]
                video = VideoUpdate(x, out.velocity, other, guidance, row)
            if plan.text_moves[i]:
                u = -torch.log(-torch.log(gumbel_uniform(net, seeds, tokens, i)))
                draw = (out.logits + u).argmax(-1)
                text = TextUpdate(tokens, draw, plan.probabilities[i], seeds, i)

            state, new = net.ops.flow_step(video, text)
            x, tokens = state or x, tokens if new is None else new
    return x.x, tokens


def gumbel_uniform(net, seeds, tokens, step):
    from univigu_kernels._philox import DRAW, philox_uniform

    rows, vocab = torch.arange(tokens.shape[1]), torch.arange(net.cfg.vocab_rows)
    return philox_uniform(seeds[:, None, None], vocab, rows[:, None], step, DRAW)


@pytest.mark.parametrize(
    "mode,lengths", [("t2v", None), ("t2v", [4, 4]), ("t2v", [2, 5]), ("t2vt", None), ("v2t", None)]
)
def test_a_run_equals_the_whole_network_at_every_step(mode, lengths):
    net = model()
    run = finish(make(net, mode, lengths=lengths))
    latents, tokens = by_hand(net, mode, lengths=lengths)
    torch.testing.assert_close(run.latents, latents, rtol=1e-5, atol=1e-5)  # latents are fp32
    if mode != "t2v":
        assert torch.equal(run.tokens, tokens)


@pytest.mark.parametrize("steps,text_steps", [(4, 8), (6, 3), (5, 3), (3, 7)])
def test_text_may_have_its_own_number_of_steps(steps, text_steps):
    net = model()
    plan = schedule("t2vt", steps, 3.0, "unipc", "exact", text_steps=text_steps)
    assert len(plan) == max(steps, text_steps)
    assert sum(plan.video_moves) == steps and sum(plan.text_moves) == text_steps
    moved = [p for p, moves in zip(plan.probabilities, plan.text_moves, strict=True) if moves]
    whole = schedule("t2vt", text_steps, 3.0, "unipc", "exact")
    assert moved == whole.probabilities and moved[-1] == 1
    run = finish(make(net, "t2vt", steps=steps, text_steps=text_steps))
    latents, tokens = by_hand(net, "t2vt", steps=steps, text_steps=text_steps)
    torch.testing.assert_close(run.latents, latents, rtol=1e-5, atol=1e-5)
    assert torch.equal(run.tokens, tokens)


def test_what_is_constant_is_computed_once(calls):
    net = model()
    seen = calls(net)
    keys_values = Counter()
    for n, block in enumerate(net.blocks):
        block.attn2.keys_values = lambda *a, n=n, f=block.attn2.keys_values: (
            keys_values.update([n]),
            f(*a),
        )[1]
    before = _rotary.cache_info().misses
    finish(make(net, "t2vt", steps=7))
    assert seen["cond_text_embedder"] == 1, "prompt and null are projected together, once"
    assert all(seen[f"blocks.{n}.attn2.to_kv"] == keys_values[n] == 1 for n in range(3))
    assert seen["time_embedding_v"] == seen["time_embedding_t"] == 1
    assert _rotary.cache_info().misses - before <= 1
    assert seen["blocks.0.attn1"] == 7


def test_guidance_shares_what_is_equal(calls):
    """The first self-attention and the first query projection run for one of the two."""
    net = model()
    seen = calls(net)
    finish(make(net, "t2v", B=2, steps=3))
    assert seen[f"blocks.0.attn1.to_qkv:(2, {V + T})"] == 3
    assert seen[f"blocks.0.attn2.to_q:(2, {V + T})"] == 3
    assert seen[f"blocks.1.attn1.to_qkv:(4, {V + T})"] == 3


def test_t2v_skips_the_text_head_and_the_last_layers_text_rows(calls):
    net = model()
    seen = calls(net)
    finish(make(net, "t2v", B=2, steps=3))
    assert seen["text_head.linear"] == 0
    assert seen[f"blocks.2.attn1.to_qkv:(4, {V + T})"] == 3
    assert seen[f"blocks.2.attn2.to_q:(4, {V})"] == 3
    assert seen[f"blocks.1.attn2.to_q:(4, {V + T})"] == 3


def test_v2t_skips_the_video_head_the_last_layers_video_rows_and_cross_attention(calls):
    """An empty condition is C equal rows, to which every row attends equally: v for all of them."""
    net = model()
    seen = calls(net)
    finish(make(net, "v2t", B=2, steps=3))
    assert seen["video_head.proj_out"] == 0 and seen["blocks.1.attn2.to_q"] == 0
    assert seen["blocks.1.attn2.to_out:(2, 1)"] == 1, "one row for all, and for all steps"
    net.text_head.linear.register_forward_hook(lambda *_: pytest.fail("logits were stored"))
    ffn = Counter()
    last = net.blocks[2]
    few = last.text_route
    last.text_route = lambda h, *rest: (ffn.update([tuple(h.shape[:2])]), few(h, *rest))[1]
    finish(make(net, "v2t", B=2, steps=3))
    assert ffn == {(2, T): 3}


def test_padded_text_is_dropped(calls):
    net = model()
    seen = calls(net)
    finish(make(net, "t2v", B=2, steps=2, lengths=[2, 3]))
    assert seen[f"blocks.1.attn1.to_qkv:(4, {V + 3})"] == 2


@pytest.mark.parametrize("keep,rows", [("video", slice(V)), ("text", slice(V, None))])
@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize("lengths", [None, [2, 6]])
def test_kept_rows_are_those_of_the_whole(keep, rows, sees, lengths):
    net = model(video_sees_text=sees)
    x, tokens = torch.randn(2, *SHAPE), torch.randint(37, (2, T))
    lengths = None if lengths is None else torch.tensor(lengths)
    with torch.no_grad():
        conditions = net.conditions(torch.tensor([300.0, 700.0]), torch.tensor([900.0, 10.0]))
        context = net.encode_context(prompts(2)[0])
        whole = net.features(x, tokens, conditions, context, lengths)
        part = net.features(x, tokens, conditions, context, lengths, keep)
    torch.testing.assert_close(part, whole[:, rows], rtol=1e-9, atol=1e-9)


def test_conditions_of_a_schedule_are_those_of_its_steps():
    net = model()
    times = torch.tensor([1000.0, 640.0, 3.0]), torch.tensor([0.0, 500.0, 1000.0])
    with torch.no_grad():
        table = net.conditions(*times)
        for i in range(3):
            alone = net.conditions(*(t[i : i + 1] for t in times))
            for a, b in zip(table.at(torch.tensor([i])), alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "tokens,multiple,rows",
    [(3, 1, 4), (9, 1, 9), (8, 1, 9), (0, 1, 1), (0, 4, 1), (3, 4, 4), (4, 4, 8), (8, 8, 9)],
)
def test_equal_rows_of_a_context_collapse(tokens, multiple, rows):
    context = torch.zeros(2, C, 4)
    context[0, :tokens], context[1, : max(0, tokens - 1)] = 1.5, 0.5
    for c in range(tokens):
        context[0, c] += c
    short, repeats = sample.collapse(context, multiple)
    assert short.shape[1] == rows and repeats == C - rows + 1
    whole = torch.cat([short, short[:, -1:].expand(-1, repeats - 1, -1)], 1)
    assert torch.equal(whole, context)


class NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a number of a tensor is read by the host, which on a device waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            pytest.fail(f"{func} was called")
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "mode,choices",
    [
        ("t2v", {}),
        ("t2vt", {"text_steps": 5}),
        ("v2t", {"refresh_every": 2}),
        ("v2t", {"commit": "confidence"}),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"text_flow": "embedding"}])
def test_a_step_reads_nothing_on_the_host_and_its_tensors_stay(mode, choices, changes):
    if changes and "commit" in choices:
        return
    net = model(torch.float32, **changes)
    run = make(net, mode, steps=3, **choices)
    caches = [t for cache in run.step.caches or [] for t in cache]
    places = [t.data_ptr() for t in [*run.step.tensors(), *caches]]
    run.step(run.kinds[0])  # tables that are made once may copy
    with NoHost():
        for kind in run.kinds[1:]:
            run.step(kind)
    assert places == [t.data_ptr() for t in [*run.step.tensors(), *caches]]
    assert run.step.index.item() == len(run.kinds)


def test_confidence_commits_the_surest_first_and_they_stay():
    tokens, proposal = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[5, 6, 7, 8]])
    committed = torch.tensor([[False, True, False, False]])
    confidence = torch.tensor([[0.2, 0.1, 0.9, 0.2]])
    new, now = flow.commit_confident(tokens, proposal, confidence, committed, torch.tensor([3]))
    assert new.tolist() == [[5, 0, 7, 0]] and now.tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("steps", [3, T, 2 * T])
def test_confidence_commits_as_many_as_are_due(steps):
    net = model(mask_source=True)
    with torch.no_grad():
        net.text_head.linear.bias[-1] = -1e4  # the mask id itself is never drawn
    run = make(net, "v2t", steps=steps, commit="confidence")
    for i in run.steps():
        due = round(T * (i + 1) / steps)
        assert ((run.tokens != net.cfg.vocab).sum(1) == due).all()


def test_temperature_zero_takes_the_most_probable():
    net = model()
    runs = [finish(make(net, "v2t", steps=1, temperature=0.0)) for _ in range(2)]
    with torch.no_grad():
        latents, tokens = runs[0].step.video.x, sample.text_source(net, T, [0, 1])
        times = torch.zeros(2), torch.full((2,), 1000.0)
        logits = net(latents, tokens, *times, torch.zeros(2, C, 8)).logits
    assert torch.equal(runs[0].tokens, logits.argmax(-1))
    assert torch.equal(runs[0].tokens, runs[1].tokens)


def test_a_moving_video_has_no_cache():
    with pytest.raises(UsageError, match="refresh_every must be 1"):
        make(model(), "t2v", refresh_every=2)
