"""A model of three layers and its sampling runs, small enough to run whole in a test."""

from dataclasses import replace

import torch

import engine
from engine import sample
from engine.run import Run
from engine.schedule import schedule

SHAPE, V, T, C = (16, 2, 4, 4), 8, 6, 9


def model(dtype=torch.float64, kernels="reference", **changes):
    torch.manual_seed(0)
    small = dict(layers=3, heads=2, head_dim=16, ffn_dim=32, text_dim=8)
    cfg = replace(engine.ModelConfig.preset("tiny"), **small | changes)
    net = engine.UniViGU(cfg, dtype=dtype, kernels=kernels)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net.eval()


def prompts(B, tokens=3):
    """Contexts as a text encoder makes them: zeros after the prompt; the null has one token."""
    g = torch.Generator().manual_seed(9)
    cond, null = torch.zeros(2, B, C, 8).unbind()
    cond[:, :tokens] = torch.randn(B, tokens, 8, generator=g)
    null[:, :1] = torch.randn(1, 1, 8, generator=g)
    return cond, null


def make(net, mode, B=2, steps=4, lengths=None, guidance=3.0, graphs=None, **choices):
    plan = schedule(mode, steps, 3.0, "unipc", "exact", text_steps=choices.pop("text_steps", None))
    cond, null = prompts(B) if mode != "v2t" else (torch.zeros(B, C, 8), None)
    first = choices.pop("seed", 0)
    seeds = list(range(first, first + B))
    latents = sample.video_noise(SHAPE, seeds, "cpu")
    tokens = sample.text_source(net, T, seeds)
    request = sample.Request(plan, latents, tokens, cond, null, guidance, lengths, seeds, **choices)
    return Run(net, request, graphs)


def finish(run):
    for _ in run.steps():
        pass
    return run
