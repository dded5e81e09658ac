"""How one forward grows: with rows, frames, resolution, samples and text rows, one at a time."""

from collections.abc import Iterator
from dataclasses import replace

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
from engine.planning import forward_flops

# Latents by what grows; rows are frames * height * width / 4. The last sizes of a GPU's are those
# that one forward of the 1.3B takes seconds for.
SMALL = {
    "rows": [
        (1, 16, 64),
        (2, 16, 64),
        (4, 16, 64),
        (8, 16, 64),
        (16, 16, 64),
        (32, 16, 64),
        (64, 16, 64),
    ],
    "frames": [(frames, 30, 52) for frames in (1, 3, 5, 9, 13, 21)],
    "resolution": [(5, 16, 28), (5, 30, 52), (5, 46, 80), (5, 60, 104)],
    "batch": [1, 2, 4, 8],
    "text": [0, 16, 64, 256, 1024],
}
LARGE = {
    "rows": [(frames, 60, 104) for frames in (1, 3, 5, 11, 21, 41)],
    "resolution": [(21, 30, 52), (21, 60, 104), (21, 90, 160)],
    "batch": [1, 2],
    "text": [0, 256, 1024],
}
QUICK = {"rows": [(1, 4, 4), (2, 4, 4)], "batch": [1, 2], "text": [0, 3]}
PLAIN_ROWS = 8192  # more rows are the engine's alone: a plain forward takes half a minute there


def grown(along: str, value, s: Setting) -> Setting:
    field = {"batch": "samples", "text": "text_rows"}.get(along, "latent")
    return replace(s, **{field: value})


def x_of(along: str, s: Setting) -> int:
    frames, height, _ = s.latent
    return {
        "rows": s.video_rows,
        "frames": 4 * frames - 3,
        "resolution": 8 * height,
        "batch": s.samples,
        "text": s.text_rows,
    }[along]


def sizes(s: Setting) -> dict[str, list]:
    if s.preset == "quick":
        return QUICK
    return LARGE if s.cuda else SMALL


def adjusted(s: Setting) -> Setting:
    return replace(s, rounds=min(5, s.rounds), budget=8.0)


def cases(setting: Setting) -> list[tuple[str, str]]:
    return [(along, "bfloat16") for along in sizes(setting)]


@torch.inference_mode()
def measure(along: str, dtype: str, s: Setting) -> Iterator[Group]:
    kind = getattr(torch, dtype)
    for value in sizes(s)[along]:
        now = grown(along, value, s)
        x = inputs(now, kind)
        failed, errors = {}, {}

        makers = {ENGINE: "auto"}
        if now.samples * now.video_rows <= PLAIN_ROWS:
            makers = {ENGINE_PLAIN: PLAIN} | makers

        calls, resident = build(
            {
                name: lambda kernels=kernels, x=x, now=now: _forward(now, kind, kernels, x)
                for name, kernels in makers.items()
            },
            failed,
            s.device,
        )
        # Against plain PyTorch in the same dtype, and not beyond its rows: in fp32 a forward of the
        # largest takes minutes.
        truth = None
        for name, call in calls.items():
            result = attempt(name, failed, call)
            if result is not None:
                errors[name] = None if truth is None else error(result, truth)
                truth = result if name == ENGINE_PLAIN else truth

        parts = roofline.forward_parts(now.cfg, itemsize=kind.itemsize, **now.sizes)
        more = {"along": along, "x": x_of(along, now), "video_rows": now.video_rows}
        more |= {"text_rows": now.text_rows, "samples_n": now.samples}

        group = Group(
            "forward",
            dtype,
            forward_flops(now.cfg, **now.sizes).total,
            more=more,
            parts=dict.fromkeys(makers, parts),
        )
        yield from timed(group, calls, errors, failed, AGREEMENT[dtype], now, resident)


def _forward(s: Setting, dtype: torch.dtype, kernels: str, x: dict):
    model = ours(s, dtype, kernels)
    return lambda: model(**x).velocity
