"""A model of one layer and its settings, small enough to train in a test."""

from dataclasses import replace

import torch

import engine


def config(**changes):
    base = engine.TrainConfig(stage="refine", steps=6, batch_size=4, warmup=2, lr=1e-2, seed=3)
    return replace(base, **changes)


def model(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    small = {"layers": 1, "heads": 2, "head_dim": 16, "ffn_dim": 32, "text_dim": 8}
    cfg = replace(engine.ModelConfig.preset("tiny"), **small | changes)
    return engine.UniViGU(cfg, dtype=dtype)


def distilling(**changes):
    """Settings of stage distill."""
    return config(**{"stage": "distill", "student_steps": (2,), "teacher_steps": 4} | changes)


def lively(dtype=torch.float32, **changes):
    """A model whose text moves too: its head's zeros would pass no gradient on."""
    net = model(dtype, **changes)
    with torch.no_grad():
        torch.nn.init.normal_(net.text_head.linear.weight, std=0.1)
    return net


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)
