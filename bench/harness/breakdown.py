"""Where one forward of the engine spends its time, by operation of the registry.

The model is bound to the same operations with a mark before and after each call, so that a part is
time of the forward itself, however the backend names its kernels, and all parts add up to it. On a
GPU marks are events of the stream: what a kernel waits for its launch is in its operation's time.
"""

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch

from bench import roofline
from bench.harness.ceilings import ceilings
from bench.harness.models import Setting, inputs, ours
from bench.harness.timing import is_cuda
from univigu_kernels import OPS
from univigu_kernels.registry import FOR_TEXT

WARM, FORWARDS = 2, 5
WHOLE, OTHER = "forward", "other PyTorch operations"
RUN_AS = {"context_embedder": "linear"}  # names of `bench.roofline` that the model runs as an op


class Stopwatch:
    """Seconds of calls, each from its first to its last moment."""

    def __init__(self, device: str):
        self.cuda, self.spans = is_cuda(device), []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def around(self, name: str, call: Callable) -> Callable:
        def watched(*args, **kwargs):
            begin = self.mark()
            result = call(*args, **kwargs)
            self.spans.append((name, begin, self.mark()))
            return result

        return watched

    def read(self) -> list[tuple[str, float]]:
        """(name, seconds) of the calls since it was last read; waits for the device."""
        spans, self.spans = self.spans, []
        if not self.cuda:
            return [(name, end - begin) for name, begin, end in spans]
        torch.cuda.synchronize()
        return [(name, begin.elapsed_time(end) / 1e3) for name, begin, end in spans]


def forwards(s: Setting, dtype: torch.dtype) -> list[list[tuple[str, float]]]:
    """The spans of FORWARDS forwards; the last of each is the whole."""
    watch, bound = Stopwatch(s.device), ours(s, dtype).ops
    watched = {op: watch.around(op, getattr(bound, op)) for op in OPS}
    for call, (op, _) in FOR_TEXT.items():
        watched[call] = watch.around(op, getattr(bound, call))
    model, x = ours(s, dtype, replace(bound, **watched)), inputs(s, dtype)
    whole, found = watch.around(WHOLE, model), []
    for _ in range(WARM + FORWARDS):
        whole(**x)
        found.append(watch.read())
    return found[WARM:]


def assigned(spans: list[tuple[str, float]], parts: list[roofline.Work], roof) -> list[dict]:
    """Rows of one forward, in the registry's order; what no operation took, and the prediction for
    what no operation does, is OTHER."""
    seconds, predicted = defaultdict(float), defaultdict(float)
    *within, (_, whole) = spans
    for op, span in within:
        seconds[op] += span
    seconds[OTHER] = whole - sum(seconds.values())
    for part in parts:
        op = RUN_AS.get(part.op, part.op)
        predicted[op if op in OPS else OTHER] += roofline.seconds(part, roof)
    calls = Counter(op for op, _ in spans)
    return [
        {"op": op, "calls": calls.get(op), "seconds": seconds[op], "predicted": predicted[op]}
        for op in (*OPS, OTHER)
        if op in seconds
    ]


@torch.inference_mode()
def breakdown(setting: Setting, dtype: str) -> list[dict]:
    """Breaks down the forward whose time is the median: {"op", "dtype", "calls" (null for OTHER),
    "seconds", "predicted" (by ceilings measured here)}; the seconds add up to the forward's."""
    kind = getattr(torch, dtype)
    runs = forwards(setting, kind)
    middle = statistics.median_low(run[-1][1] for run in runs)
    spans = next(run for run in runs if run[-1][1] == middle)
    parts = roofline.forward_parts(setting.cfg, itemsize=kind.itemsize, **setting.sizes)
    rows = assigned(spans, parts, ceilings(setting, kind))
    return [row | {"dtype": dtype} for row in rows]
