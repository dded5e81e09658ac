"""The process in which a trial runs: `python -m univigu_kernels._trial_child`.

The first line of its input is a request in JSON, see `_trial.Request`; every line of its output is
an event: what it does now, and what it found. What a backend does to the process, it does to this
one. It ends with its input: whoever asked has gone.
"""

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from time import perf_counter

import torch
from torch import Tensor

from . import _triton
from ._libraries import LIBRARIES
from ._spec import Backend, Op, Problem

ROUNDS = 5
TIMED = 3.0  # seconds of a backend's timed calls after which no further round begins
EPS = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LIBRARY_NAMES = {name for name, *_ in LIBRARIES}


class Events:
    """Lines of JSON to the parent, by a descriptor of their own: what a library prints to standard
    output goes to standard error."""

    def __init__(self):
        self.stream = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **event) -> None:
        print(json.dumps(event), file=self.stream, flush=True)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def fault(found: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor]) -> str | None:
    """Why a result is wrong: the root mean square of its error is more than twice that of plain
    PyTorch in the same dtype (three times for a gradient), or its largest error more than twice
    that: one wrong element of many is not seen in the mean, and the largest of many roundings
    varies."""
    for at, (x, p, t) in enumerate(zip(found, plain, truth, strict=True)):
        what = f"gradient {at}" if at else "the result"
        if x.shape != t.shape:
            return f"{what} has the shape {tuple(x.shape)}, not {tuple(t.shape)}"

        times, error, usual = 3 if at else 2, x.to(t.dtype) - t, p.to(t.dtype) - t
        for name, size, more in (("mean error", _rms, 1), ("largest error", _largest, 2)):
            limit = more * times * size(usual) + EPS[p.dtype] * size(t)
            if not size(error) <= limit:  # NaN is below nothing
                return f"{what} has a {name} of {size(error):.3g}; {limit:.3g} is allowed"
    return None


class Trialist:
    """Proves and times the backends of one op for one class of shapes."""

    def __init__(self, request: dict, say: Callable[..., None]):
        self.op: Op = import_module(request["module"]).OP
        self.kind, self.case = request["kind"], request["case"]
        self.device = torch.device(request["device"])
        self.dtype = getattr(torch, request["dtype"])
        self.wide = torch.float64 if self.dtype == torch.float32 else torch.float32
        self.say, self.sought = say, {}

    def backend(self, name: str) -> Backend:
        return next(b for b in self.op.backends if b.name == name)

    def running(self, backend: Backend, first: bool = False) -> Callable:
        """Its call, between "running" and "checking". A library's first may compile, too."""

        def call(*args, **kwargs):
            may_compile = first and backend.name in LIBRARY_NAMES
            self.say(now="compiling" if may_compile else "running", backend=backend.name)
            result = backend.call(*args, **kwargs)
            synchronize(self.device)
            return result

        return call

    def prove(self, backend: Backend, problems: Sequence[Problem]) -> str | None:
        """Why it is not to be used, or None."""
        for problem in problems:
            results = []
            for repeat in range(2):
                results.append(problem.run(self.running(backend, first=repeat == 0)))
                synchronize(self.device)
                self.say(now="checking", backend=backend.name)

            if problem.name not in self.sought:
                wanted = problem.plain(self.dtype), problem.plain(self.wide)
                self.sought[problem.name] = wanted
            if why := fault(results[0], *self.sought[problem.name]):
                return f"wrong in {problem.name}: {why}"
            if not all(map(torch.equal, *results)):
                return f"differs between two runs of {problem.name}"
        return None

    def seconds(self, backend: Backend, timed: Callable[[Callable], object]) -> float:
        """Times one call, on a GPU by the device's own clock."""
        self.say(now="running", backend=backend.name)
        if self.device.type != "cuda":
            start = perf_counter()
            timed(backend.call)
            return perf_counter() - start

        with torch.cuda.device(self.device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            timed(backend.call)
            after.record()
            after.synchronize()
            return before.elapsed_time(after) / 1000

    def time(self, names: Sequence[str], timed: Callable[[Callable], object]) -> None:
        """In turns, so that a card's clocks, which fall as it warms, fall for all."""
        spent = dict.fromkeys(names, 0.0)
        for turn in range(ROUNDS + 1):
            for name in names:
                if spent[name] > TIMED and turn > 1:
                    continue
                took = self.seconds(self.backend(name), timed)
                spent[name] += took
                if turn > 0:  # the first warms up
                    self.say(timed=name, seconds=took)

    def run(self, to_prove: Sequence[str], proved: Sequence[str]) -> None:
        made = self.case, self.kind, self.device, self.dtype
        problem, timed = self.op.trials.real(*made)
        problems, able = [*self.op.trials.small(*made), problem], list(proved)

        for name in to_prove:
            backend = self.backend(name)
            try:
                with _triton.watched(lambda now, name=name: self.say(now=now, backend=name)):
                    why = self.prove(backend, problems)
            except torch.OutOfMemoryError as error:
                self.say(untried=name, reason=f"memory ran out in its trial: {_line(error)}")
            except Exception as error:  # reported as the reason why the backend was rejected
                self.say(
                    rejected=name, reason=f"{type(error).__name__} in its trial: {_line(error)}"
                )
            else:
                self.say(**({"rejected": name, "reason": why} if why else {"proved": name}))
                able += [] if why else [name]

        self.sought.clear()
        self.time(able, timed)
        self.say(done=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    events = Events()
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_input, daemon=True).start()
    torch.set_float32_matmul_precision("highest")
    with torch.no_grad():
        Trialist(request, events.say).run(request["to_prove"], request["proved"])


if __name__ == "__main__":
    main()
