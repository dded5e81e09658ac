"""pytest-benchmark's entries for developers: each operation by each backend, forward and backward.

    make bench K=adaln BASE=main      beside the kernels of another commit (`bench.developers`)
    pytest bench/speed.py             this checkout alone

The shapes are those of `univigu bench ops`; nothing is checked here and no cache flushed. The
environment variable UNIVIGU_BENCH_OP names the one operation to run.
"""

import os

import pytest
import torch

import univigu_kernels
from bench import ops
from bench.harness.inputs import arguments
from bench.harness.models import default
from univigu_kernels import OPS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SETTING = default(DEVICE, quick=False)


def entries() -> list[tuple[str, str, str, str]]:
    """(operation, dtype, pass, backend); attention by scores alone is left out."""
    only = os.environ.get("UNIVIGU_BENCH_OP") or None
    return [
        (op, dtype, which, backend.name)
        for op, dtype in ops.cases(SETTING)
        if only in (None, op) and op in OPS
        for which in (ops.FORWARD, ops.BACKWARD)[: 1 + OPS[op].differentiable]
        for backend in ops.backends(op, DEVICE, getattr(torch, dtype))
        if not (backend.name == "reference" and op in ops.ATTENTION)
    ]


@pytest.mark.parametrize(("op", "dtype", "which", "backend"), entries())
def test_speed(benchmark, op, dtype, which, backend):
    kind = getattr(torch, dtype)
    inputs = args, kwargs = arguments(op, ops.shapes(SETTING), DEVICE, kind)
    call = next(b.call for b in OPS[op].backends if b.name == backend)
    backward = ops.differentiated(call, inputs, kind) if which == ops.BACKWARD else None

    def timed():
        with torch.no_grad():
            call(*args, **kwargs) if backward is None else backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = op
    benchmark.extra_info["kernels"] = univigu_kernels.__file__
    benchmark(timed)
