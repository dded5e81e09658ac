"""Every backend of attention and of the experts that runs here, beside other people's kernels, in
turns at a model's shapes: how a new kernel is judged in one short call.

An operation has a process of its own, which says what it runs before it runs it: a kernel that
hangs or kills its process is a line of the report, and the others are measured without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.harness.groups import Group, each_checked, timed
from bench.harness.inputs import arguments
from bench.harness.models import Setting
from bench.ops import (
    COMPILED,
    FORWARD,
    disagreement,
    exact,
    group_of,
    limit_of,
    makers,
    notes,
    shapes,
    widened,
)

JUDGED = ("joint_attention", "routed_ffn", "fp8_ffn", "cross_attention")
SILENCE = 45.0  # seconds; importing everything took 15 once, a cold Triton kernel 10
ROUNDS, BUDGET = 40, 12.0  # seconds of an operation


def cases(setting: Setting) -> list[tuple[str, str]]:
    return [(op, "bfloat16") for op in JUDGED]


def adjusted(s: Setting) -> Setting:
    return s if s.preset == "quick" else replace(s, rounds=ROUNDS, budget=BUDGET)


def candidates(op: str, s: Setting, dtype: torch.dtype, inputs) -> dict[str, Callable]:
    """As `bench.ops` offers them, but nothing that is compiled by torch: that takes the minutes."""
    found = makers(op, s, dtype, inputs)
    found.pop(COMPILED, None)
    return found


@torch.no_grad()
def measure(op: str, dtype: str, s: Setting, without: tuple = ()) -> Iterator[Group | str]:
    kind, failed = getattr(torch, dtype), {}
    inputs = args, kwargs = arguments(op, shapes(s), s.device, kind)
    offered = {n: m for n, m in candidates(op, s, kind, inputs).items() if n not in without}
    wide, options = widened(inputs)
    truth = exact(op, s)(*wide, **options)
    del wide

    def bound(make: Callable) -> Callable:
        return lambda: partial(make(), *args, **kwargs)

    group = group_of(op, dtype, s, FORWARD, offered)
    group.notes = notes(op, s.device)
    calls, errors, resident = yield from each_checked(
        group,
        {name: bound(make) for name, make in offered.items()},
        lambda name, call: disagreement(call(), truth),
        failed,
        limit_of(op, dtype),
        s,
    )
    yield from timed(group, calls, errors, failed, limit_of(op, dtype), s, resident)
