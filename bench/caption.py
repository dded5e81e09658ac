"""v2t: the engine's exact, refreshed and frozen captions beside the official arithmetic in plain
PyTorch, which evaluates the whole network at each step and samples from its logits."""

from collections.abc import Iterator

import torch

from bench import roofline
from bench.harness.groups import Group, attempt, build, timed
from bench.harness.models import (
    AGREEMENT,
    ENGINE,
    ENGINE_PLAIN,
    PLAIN,
    Setting,
    error,
    inputs,
    ours,
)
from engine import sample
from engine.graphs import Ahead, Graphs
from engine.run import Run, cache_drift
from engine.schedule import schedule

CASE = "v2t"
EXACT, REFRESHED, FROZEN = (f"{ENGINE}, video {kind}" for kind in ("exact", "refreshed", "frozen"))
REFRESH_EVERY, GRAPHS = 10, ", CUDA graphs"


def cases(setting: Setting) -> list[tuple[str, str]]:
    return [(CASE, "bfloat16")]


def refreshes(s: Setting) -> dict[str, int]:
    every = {EXACT: 1, REFRESHED: min(REFRESH_EVERY, s.caption_steps), FROZEN: s.caption_steps}
    return every | {f"{n}{GRAPHS}": steps for n, steps in every.items()} if s.cuda else every


def plan_of(s: Setting):
    return schedule("v2t", s.caption_steps, 1.0, "euler", "exact")


def request_of(plan, x: dict, every: int) -> sample.Request:
    """What `inputs` ask of the sampler."""
    return sample.Request(
        plan,
        x["video"],
        x["tokens"],
        torch.zeros_like(x["context"]),
        seeds=range(len(x["tokens"])),
        refresh_every=every,
    )


def captions(s: Setting, dtype: torch.dtype) -> dict:
    """Name -> a maker of a call that gives a finished run, or plain PyTorch's tokens."""
    x, plan = inputs(s, dtype), plan_of(s)

    def plain():
        model, still = ours(s, dtype, PLAIN), torch.zeros_like(x["t_video"])

        def call():
            tokens, empty = x["tokens"], torch.zeros_like(x["context"])
            for time, probability in zip(plan.text_times, plan.probabilities, strict=True):
                out = model(x["video"], tokens, still, torch.full_like(still, time), empty)
                draws = torch.multinomial(out.logits.flatten(0, 1).float().softmax(-1), 1)
                jump = torch.rand(tokens.shape, device=tokens.device) < probability
                tokens = torch.where(jump, draws.view_as(tokens), tokens)
            return tokens

        return call

    def engine_run(every: int, graphs: Graphs | None):
        model = ours(s, dtype)
        request = request_of(plan, x, every)
        Ahead(model)(request, progress=False)

        def call():
            run = Run(model, request, graphs)
            for _ in run.steps():
                pass
            return run

        return call

    def maker(name: str, every: int):
        return lambda: engine_run(every, Graphs() if name.endswith(GRAPHS) else None)

    return {ENGINE_PLAIN: plain} | {n: maker(n, every) for n, every in refreshes(s).items()}


def first_logits(s: Setting, dtype: torch.dtype, name: str) -> torch.Tensor:
    """The logits of the first evaluation; of cached ones, of the second that follows it with the
    same tokens and time."""
    x, plan = inputs(s, dtype), plan_of(s)
    if name == ENGINE_PLAIN:
        still = torch.zeros_like(x["t_video"])
        model = ours(s, dtype, PLAIN)
        times = still, torch.full_like(still, plan.text_times[0])
        return model(x["video"], x["tokens"], *times, torch.zeros_like(x["context"])).logits
    step = Run(ours(s, dtype), request_of(plan, x, refreshes(s)[name])).step
    for cached in (False, True)[: 2 if step.caches is not None else 1]:
        kind = sample.Kind(False, True, cached)
        h_BTD = step.text_rows(step.features(kind, step.video.x, step.tokens))
    head = step.model.text_head.linear
    return torch.nn.functional.linear(h_BTD, head.weight, head.bias)


def replay_error(s: Setting, dtype: torch.dtype, name: str) -> float:
    """The share of tokens in which a captured run differs from an eager one of the same seed."""
    eager, replayed = (
        captions(s, dtype)[which]()().tokens for which in (name.removesuffix(GRAPHS), name)
    )
    return (eager != replayed).float().mean().item()


def drifts(s: Setting, dtype: torch.dtype, calls: dict) -> dict[str, str]:
    """What cached captions are off the exact ones of the same seed, in words."""
    exact, found = calls[EXACT]().tokens, {}
    for name in calls.keys() & {REFRESHED, FROZEN}:
        run = calls[name]()
        drift = cache_drift(exact, run.tokens, run.cache_change())[0]
        found[name] = (
            "random weights: {text_agreement:.0%} of tokens, K and V {kv_change:.1%} off"
        ).format(**drift)
    return found


@torch.inference_mode()
def measure(case: str, dtype: str, s: Setting) -> Iterator[Group]:
    kind = getattr(torch, dtype)
    truth = first_logits(s, torch.float32, ENGINE_PLAIN)
    errors, failed = {}, {}

    for name in captions(s, kind):
        logits = attempt(name, failed, lambda name=name: first_logits(s, kind, name))
        errors |= {} if logits is None else {name: error(logits, truth)}
    for name in errors.keys() & refreshes(s).keys():
        if name.endswith(GRAPHS):
            errors[name] = attempt(name, failed, lambda name=name: replay_error(s, kind, name))

    calls, resident = build(captions(s, kind), failed, s.device)
    # A prompt of zeros is one row, but where its length would have to be read from a device.
    zeros = 64 if s.cuda else 1
    sizes = s.sizes | {"itemsize": kind.itemsize, "context_rows": zeros}

    exact, cached = (
        roofline.step_parts(s.cfg, "v2t", cached=cached, guided=False, **sizes)
        for cached in (False, True)
    )
    whole = roofline.forward_parts(s.cfg, **s.sizes, itemsize=kind.itemsize)

    steps = s.caption_steps
    parts = {ENGINE_PLAIN: steps * whole}
    for name, every in refreshes(s).items():
        computed = -(-steps // every)
        parts[name] = computed * exact + (steps - computed) * cached

    group = Group(case, dtype, parts=parts)
    group.notes = drifts(s, kind, calls) if calls.keys() >= {EXACT, FROZEN} else {}
    yield from timed(group, calls, errors, failed, AGREEMENT[dtype], s, resident, s.run_rounds)


def alone(case: str, dtype: str, implementation: str, s: Setting):
    return torch.inference_mode()(captions(s, getattr(torch, dtype))[implementation]()), 1
