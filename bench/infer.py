"""The engine beside its peers: one forward of the whole network, and whole guided t2v runs."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from bench import roofline
from bench.harness.groups import Group, attempt, build, each_checked, timed
from bench.harness.models import (
    AGREEMENT,
    DIFFUSERS,
    ENGINE,
    ENGINE_PLAIN,
    PLAIN,
    Setting,
    compiled,
    diffusers_model,
    error,
    inputs,
    ours,
)
from engine import sample
from engine.graphs import Ahead, Graphs
from engine.planning import forward_flops
from engine.run import Run
from engine.schedule import schedule

FORWARD, RUN = "forward", "t2v, guided"
COMPILED, NO_TEXT = f"{DIFFUSERS}, torch.compile", f"{ENGINE}, no text rows"
PROMPT_TOKENS, NULL_TOKENS, GUIDANCE, SHIFT = 20, 1, 5.0, 3.0  # other context rows are zeros


def cases(setting: Setting) -> list[tuple[str, str]]:
    """fp32 on a CPU alone: a GPU has no fast products for it."""
    found = [(FORWARD, "bfloat16"), (RUN, "bfloat16"), (FORWARD, "float32")]
    return found[:2] if setting.cuda else found


def forwards(s: Setting, dtype: torch.dtype) -> dict:
    """Name -> a maker of a call that gives the velocity. The engine's encode the context too, as
    diffusers' does."""
    x = inputs(s, dtype)

    def diffusers(compiling: bool):
        model = diffusers_model(s, dtype)
        model = compiled(model, s.device) if compiling else model
        return lambda: model(x["video"].to(dtype), x["t_video"], x["context"]).sample

    def engine_forward(kernels: str):
        model = ours(s, dtype, kernels)
        return lambda: model(**x).velocity

    return {
        DIFFUSERS: lambda: diffusers(False),
        COMPILED: lambda: diffusers(True),
        ENGINE_PLAIN: lambda: engine_forward(PLAIN),
        ENGINE: lambda: engine_forward("auto"),
    }


def forward_truths(s: Setting) -> dict[str, torch.Tensor]:
    """By plain PyTorch in fp32: with text rows, and without for diffusers."""
    model, x = ours(s, torch.float32, PLAIN), inputs(s, torch.float32)
    joint = model(**x).velocity
    alone = model(**x | {"tokens": x["tokens"][:, :0]}).velocity
    return {DIFFUSERS: alone, COMPILED: alone, ENGINE_PLAIN: joint, ENGINE: joint}


def prompts(s: Setting, dtype: torch.dtype) -> list[torch.Tensor]:
    """Context of a prompt and of its null [B, C, E]."""
    g, made = torch.Generator().manual_seed(1), []
    for tokens in (min(PROMPT_TOKENS, s.context_rows), NULL_TOKENS):
        rows = torch.zeros(s.samples, s.context_rows, s.cfg.text_dim)
        rows[:, :tokens] = torch.randn(s.samples, tokens, s.cfg.text_dim, generator=g)
        made.append(rows.to(s.device, dtype))
    return made


def diffusers_run(s: Setting, dtype: torch.dtype, compiling: bool):
    """The loop of diffusers' WanPipeline: two evaluations a step, fp32 latents."""
    from diffusers import UniPCMultistepScheduler

    x, (cond, null) = inputs(s, dtype), prompts(s, dtype)
    model = diffusers_model(s, dtype)
    model = compiled(model, s.device) if compiling else model
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

    def call():
        scheduler = UniPCMultistepScheduler(flow_shift=SHIFT, **options)
        scheduler.set_timesteps(s.steps, device=s.device)
        latents = x["video"].clone()
        for t in scheduler.timesteps:
            now, low = t.expand(len(latents)), latents.to(dtype)
            text, plain = (
                model(low, now, context, return_dict=False)[0] for context in (cond, null)
            )
            guided = plain + GUIDANCE * (text - plain)
            latents = scheduler.step(guided, t, latents, return_dict=False)[0]
        return latents

    return call


def runs(s: Setting, dtype: torch.dtype) -> dict:
    """Guided t2v by UniPC; calls give the latents. The engine's with the prompt as text rows too,
    and without."""
    x, context = inputs(s, dtype), prompts(s, dtype)

    def engine_run(text_rows: int, kernels: str = "auto", graphs: Graphs | None = None):
        model, plan = ours(s, dtype, kernels), schedule("t2v", s.steps, SHIFT, "unipc", "exact")
        tokens, seeds = x["tokens"][:, :text_rows], range(s.samples)
        request = sample.Request(plan, x["video"], tokens, *context, GUIDANCE, seeds=seeds)
        Ahead(model)(request, progress=False)

        def call():
            run = Run(model, request, graphs)
            for _ in run.steps():
                pass
            return run.latents

        return call

    rows = min(PROMPT_TOKENS, s.text_rows)  # as many text rows as the prompt has tokens
    found = {
        DIFFUSERS: lambda: diffusers_run(s, dtype, False),
        COMPILED: lambda: diffusers_run(s, dtype, True),
        ENGINE: lambda: engine_run(rows),
        NO_TEXT: lambda: engine_run(0),
    }
    if s.cuda:
        found[f"{ENGINE}, CUDA graphs"] = lambda: engine_run(rows, graphs=Graphs())
        found[f"{NO_TEXT}, CUDA graphs"] = lambda: engine_run(0, graphs=Graphs())
    found["truth with text"] = lambda: engine_run(rows, PLAIN)
    found["truth without text"] = lambda: engine_run(0, PLAIN)
    return found


def checked(s: Setting) -> Setting:
    """Two steps, and on a GPU one latent frame: plain PyTorch in fp32 would take 9 s of a step of
    the 1.3B at 67 TFLOP/s."""
    return replace(s, steps=2, latent=(1, *s.latent[1:]) if s.cuda else s.latent)


def run_errors(s: Setting, dtype: torch.dtype, failed: dict[str, str]) -> dict[str, float]:
    """Against plain PyTorch in fp32 that sees the same rows."""
    s = checked(s)
    exact = runs(s, torch.float32)
    without, joint = (exact[f"truth {with_} text"]()() for with_ in ("without", "with"))
    errors = {}
    for name, make in runs(s, dtype).items():
        if name.startswith("truth"):
            continue
        result = attempt(name, failed, lambda make=make: make()())
        truth = without if DIFFUSERS in name or NO_TEXT in name else joint
        if result is not None:
            errors[name] = error(result, truth)
    return errors


@torch.inference_mode()
def measure(case: str, dtype: str, s: Setting) -> Iterator[Group]:
    kind = getattr(torch, dtype)
    failed: dict[str, str] = {}
    rounds = None

    if case == FORWARD:
        truths = forward_truths(s)
        parts = roofline.forward_parts(s.cfg, itemsize=kind.itemsize, **s.sizes)
        flops = forward_flops(s.cfg, **s.sizes).total
        group = Group(case, dtype, flops=flops, parts={ENGINE: parts, ENGINE_PLAIN: parts})
        group.notes = dict.fromkeys(group.parts, f"{s.text_rows} text rows more")
        calls, errors, resident = yield from each_checked(
            group,
            forwards(s, kind),
            lambda name, call: error(call(), truths[name]),
            failed,
            AGREEMENT[dtype],
            s,
        )
    else:
        errors = run_errors(s, kind, failed)

        makers = {n: m for n, m in runs(s, kind).items() if n in errors}
        calls, resident = build(makers, failed, s.device)
        # The prompt and one of its empty rows, in multiples of 64 on a GPU: `sample.collapse`.
        kept = min(s.context_rows, 64 if s.cuda else PROMPT_TOKENS + 1)
        sizes = s.sizes | {"itemsize": kind.itemsize, "context_rows": kept}

        rows = {ENGINE: min(PROMPT_TOKENS, s.text_rows), NO_TEXT: 0}
        parts = {
            name: s.steps
            * roofline.step_parts(
                s.cfg, "t2v", cached=False, guided=True, **sizes | {"text_rows": text}
            )
            for name, text in rows.items()
        }
        group = Group(case, dtype, parts=parts)
        rounds = s.run_rounds

    yield from timed(group, calls, errors, failed, AGREEMENT[dtype], s, resident, rounds)


def alone(case: str, dtype: str, implementation: str, s: Setting):
    kind = getattr(torch, dtype)
    makers = forwards(s, kind) if case == FORWARD else runs(s, kind)
    return torch.inference_mode()(makers[implementation]()), 3 if case == FORWARD else 1
