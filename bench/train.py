"""A training step: `engine.train_step` beside a plain PyTorch loop of the same model with the same
random numbers, fp32 master weights and moments, clipping and average; on a GPU beside diffusers'
Wan transformer, whose step is less work and less memory: video alone, no masters, no average."""

import gc
from collections.abc import Iterator

import torch
from torch.nn import functional as F

import engine
from bench import roofline
from bench.harness.groups import Group, allocated, attempt, build, timed
from bench.harness.models import (
    DIFFUSERS,
    ENGINE,
    PLAIN,
    Setting,
    bound,
    compiled,
    diffusers_model,
    ours,
)
from engine import flow
from engine.planning import train_flops
from engine.train.ahead import Ahead
from engine.train.objective import draw, drop_condition, text_rows

CASE = "training step"
LOOP, COMPILED = "plain PyTorch loop", f"{DIFFUSERS}, torch.compile, checkpointing"
POLICIES = ("none", "attention", "block")
AGREEMENT = 2e-2  # of two steps' losses and norms of gradients


def cases(setting: Setting) -> list[tuple[str, str]]:
    return [(CASE, "bfloat16")]


def settings(s: Setting, recompute: str = "none") -> engine.TrainConfig:
    """From the first step at full rate, as the plain loop. On a GPU no average: it takes 12 GB of
    the 1.3B's memory."""
    ema = {"ema": 0.0} if s.cuda else {}
    return engine.TrainConfig(
        stage="refine",
        batch_size=s.samples,
        t2v_share=0.0,
        v2t_share=0.0,
        recompute=recompute,
        warmup=1,
        **ema,
    )


def batch(s: Setting) -> dict[str, torch.Tensor]:
    g, B, T = torch.Generator().manual_seed(0), s.samples, s.text_rows
    ids = torch.randint(s.cfg.vocab, (B, T), generator=g)
    made = {
        "latents": torch.randn(B, 16, *s.latent, generator=g),
        "prompt_tokens": ids,
        "prompt_lengths": torch.full((B,), T),
        "caption_tokens": ids.flip(1),
        "context": torch.randn(B, s.context_rows, s.cfg.text_dim, generator=g),
        "null_context": torch.randn(s.context_rows, s.cfg.text_dim, generator=g),
    }
    return {name: x.to(s.device) for name, x in made.items()}


def plain_loop(s: Setting, dtype: torch.dtype):
    """What one would write without the engine's training; a call makes a step and gives its
    loss and the norm of its gradients."""
    model, config = ours(s, dtype, PLAIN).train(), settings(s)
    params = list(model.parameters())
    masters = [p.detach().float() for p in params]
    average = [m.clone() for m in masters]
    optimizer = torch.optim.AdamW(masters, lr=config.lr, betas=(0.9, 0.95), fused=True)
    rows, number = batch(s), 0

    def step():
        nonlocal number
        draws = draw(rows, config, model, number)
        x, velocity = flow.corrupt_video(rows["latents"], draws.noise, draws.sigma_B)
        tokens, targets, t_text = text_rows(model, rows, draws, config)
        out = model(x, tokens, 1000 * draws.sigma_B, t_text, drop_condition(rows, draws))
        loss = F.mse_loss(out.velocity.float(), velocity)
        loss = loss + F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        for master, p in zip(masters, params, strict=True):
            master.grad, p.grad = p.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(masters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, masters, 1 - config.ema)
        with torch.no_grad():
            torch._foreach_copy_(params, masters)
        number += 1
        return torch.stack([loss.detach(), norm])

    return step


def engine_step(s: Setting, dtype: torch.dtype, recompute: str):
    model = ours(s, dtype, bound(s, dtype, training=True))
    state, rows = engine.TrainState.create(model, settings(s, recompute)), batch(s)
    Ahead(state, progress=False)(rows)

    def step():
        metrics = engine.train_step(state, rows)
        return torch.stack([metrics["loss"], metrics["grad_norm"]])

    return step


def diffusers_step(s: Setting, dtype: torch.dtype):
    model = diffusers_model(s, dtype).train()
    model.enable_gradient_checkpointing()
    network = compiled(model, s.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    rows = batch(s)
    x, context = rows["latents"].to(dtype), rows["context"].to(dtype)
    time = torch.full((s.samples,), 500, device=s.device)

    def step():
        loss = F.mse_loss(network(x, time, context).sample.float(), rows["latents"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def name_of(recompute: str) -> str:
    return ENGINE if recompute == "none" else f"{ENGINE}, recompute={recompute}"


def steps(s: Setting, dtype: torch.dtype) -> dict:
    """Name -> a maker of a call that makes a step."""
    found = {
        name_of(policy): lambda policy=policy: engine_step(s, dtype, policy) for policy in POLICIES
    }
    if not s.cuda:
        return {LOOP: lambda: plain_loop(s, dtype)} | found
    del found[ENGINE]  # 138 GB at the 1.3B size, by the dry run
    return {COMPILED: lambda: diffusers_step(s, dtype)} | found


def measure(case: str, dtype: str, s: Setting) -> Iterator[Group]:
    """On a CPU interleaved and checked against the plain loop in fp32. On a GPU one after another,
    for two do not fit, nor does the loop: the engine's second policy must agree with its first."""
    kind = getattr(torch, dtype)
    cpu = not s.cuda
    truth = two(plain_loop(s, torch.float32)) if cpu else None

    group = {
        "flops": train_flops(s.cfg, **s.sizes),
        "parts": {
            name_of(policy): roofline.train_parts(
                s.cfg, recompute=policy, itemsize=kind.itemsize, ema=cpu, **s.sizes
            )
            for policy in POLICIES
        },
    }
    group["parts"][LOOP] = group["parts"][ENGINE]

    makers = steps(s, kind)
    for some in [makers] if cpu else [{name: make} for name, make in makers.items()]:
        failed, errors = {}, {}
        before = allocated(s.device)

        calls, _ = build(some, failed, s.device)
        for name, call in calls.items():
            if name == COMPILED:  # another loss
                errors[name] = None
                continue
            found = attempt(name, failed, lambda call=call: two(call))
            if found is not None:
                errors[name] = None if truth is None else error(found, truth)
                truth = found if truth is None else truth

        resident = dict.fromkeys(calls, allocated(s.device) - before)  # moments are there now
        this = Group(case, dtype, **group)
        yield from timed(this, calls, errors, failed, AGREEMENT, s, resident, s.rounds)

        calls = call = None
        gc.collect()  # states of two do not fit


def two(step) -> torch.Tensor:
    """Losses and norms of gradients of two steps: a wrong update shows in the second."""
    return torch.stack([step() for _ in range(2)]).cpu()


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest relative one."""
    return ((found - truth).abs() / truth).max().item()


def alone(case: str, dtype: str, implementation: str, s: Setting):
    return steps(s, getattr(torch, dtype))[implementation](), 3
