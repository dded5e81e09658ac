"""Backends that hurt, for trials: an OP as a module of the kernels has it. They do so in the
trial's own process, which finds this module on its path."""

import os
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch

from univigu_kernels import OPS, Backend

JOINT = OPS["joint_attention"]
CALLS = count()


def fast(*args, **kwargs):
    """As flash attention: the results of sdpa."""
    sdpa = next(b for b in JOINT.backends if b.name == "sdpa")
    return sdpa.call(*args, **kwargs)


def slow(*args, **kwargs):
    time.sleep(0.03)
    return fast(*args, **kwargs)


def loud(*args, **kwargs):
    print('{"proved": "raises"}')
    return fast(*args, **kwargs)


def hangs(*args, **kwargs):
    if child := os.environ.get("STAND_IN_CHILD"):  # what it starts must go with it
        if os.fork() == 0:
            Path(child).write_text(str(os.getpid()))
            time.sleep(600)
    time.sleep(600)


def hangs_later(*args, **kwargs):
    """When it is timed: eight calls on small problems and two on the real shape prove it."""
    with open(os.environ["STAND_IN_CALLS"], "a+") as calls:
        calls.write(".")
    if Path(calls.name).stat().st_size > 10:
        time.sleep(600)
    return fast(*args, **kwargs)


def dies(*args, **kwargs):
    print("about to die", file=sys.stderr, flush=True)
    os.abort()


def leaves(*args, **kwargs):
    os._exit(0)


def raises(*args, **kwargs):
    raise NotImplementedError("no kernel\nfor this head_dim")


def runs_out(*args, **kwargs):
    raise torch.OutOfMemoryError("no room")


def other_shape(*args, **kwargs):
    return fast(*args, **kwargs)[:, :-1]


def at(row):
    """One wrong element, in a row of a problem of more than 900."""

    def wrong(*args, **kwargs):
        o = fast(*args, **kwargs).clone()
        if o.shape[1] > 900:
            o[0, row, 0, 0] += 1.0
        return o

    return wrong


def reads_padding(q, k, v, video_rows, text_lengths=None, **kwargs):
    """Right as long as padding holds numbers: it is weighted with 0."""
    o = fast(q, k, v, video_rows, text_lengths, **kwargs)
    return o if text_lengths is None else o + 0 * v.sum()


def forgets_lengths(q, k, v, video_rows, text_lengths=None, **kwargs):
    return fast(q, *map(torch.nan_to_num, (k, v)), video_rows, None, **kwargs)


def noisy(*args, **kwargs):
    """Within the error that is allowed, and another one each time."""
    o = fast(*args, **kwargs)
    return o * (1 + 2.0**-24 * (1 + next(CALLS) % 2))


class _Wrong(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 1.01 * gradient


def wrong_gradient(q, k, v, *args, **kwargs):
    return fast(q, k, _Wrong.apply(v), *args, **kwargs)


def example(device, dtype, generator):
    return JOINT.example(device, dtype, generator)


CALLS_BY_NAME = {
    "fast": fast,
    "slow": slow,
    "loud": loud,
    "hangs": hangs,
    "hangs_later": hangs_later,
    "dies": dies,
    "leaves": leaves,
    "raises": raises,
    "runs_out": runs_out,
    "other_shape": other_shape,
    "wrong_first": at(0),
    "wrong_last": at(-1),
    "wrong_at_the_text": at(1000),
    "reads_padding": reads_padding,
    "forgets_lengths": forgets_lengths,
    "noisy": noisy,
    "wrong_gradient": wrong_gradient,
    "reference": JOINT.reference,
}
OP = replace(
    JOINT,
    backends=tuple(Backend(name, call) for name, call in CALLS_BY_NAME.items()),
    example=example,
)
