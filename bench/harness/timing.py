"""How times are taken and what is said of them.

Implementations take turns, round by round, in one process; a case is repeated in fresh processes,
spread over the run, because the memory that a process happens to get and what else the machine does
move a median in a way that the rounds of one process do not show. A figure is the geometric mean
over the processes of the medians over rounds. Its interval is where the same figure of another run
on this machine is expected, 95% of the time: in logarithms, t * s * sqrt(2 / processes), s the
standard deviation between processes, its square the mean over the implementations of a case. t has
processes - 1 degrees of freedom however many these are: what slows a process slows all of them.
With one process there is no interval.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

WARM_UP, LEAST = 1, 3  # calls before the rounds, after a check; rounds that no budget ends
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # 97.5%
HEAD_START = 2_000_000  # cycles of a GPU, 1 ms: launching an operation takes a tenth of that


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def lap(laps: dict[str, float], name: str, call: Callable) -> Callable:
    """The same call, whose seconds go to laps[name]."""

    def run(*args, **kwargs):
        begin = time.perf_counter()
        found = call(*args, **kwargs)
        laps[name] = time.perf_counter() - begin
        return found

    return run


class Clock:
    """Seconds of one call: device events on a GPU, after its L2 cache was overwritten; elsewhere
    the monotonic clock."""

    def __init__(self, device: str):
        self.cuda = is_cuda(device)
        if self.cuda:
            size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
            self.flush = torch.empty(size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable) -> float:
        if not self.cuda:
            begun = time.perf_counter()
            call()
            return time.perf_counter() - begun
        self.flush.zero_()
        torch.cuda._sleep(HEAD_START)  # or what is timed of a short kernel is its launch
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def turns(
    calls: dict[str, Callable],
    clock: Clock,
    rounds: int,
    budget: float = math.inf,
    warm_up: int = WARM_UP,
) -> Iterator[tuple[str, float]]:
    """(name, seconds) of every call, round by round. Rounds end early, after LEAST, when `budget`
    seconds are over."""
    for call in calls.values():
        for _ in range(warm_up):
            clock(call)
    begun = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST and time.perf_counter() - begun > budget:
            break
        for name, call in calls.items():
            yield name, clock(call)


def interleaved(calls: dict[str, Callable], *args, **options) -> dict[str, list[float]]:
    """Seconds of every call, round by round: `turns` to their end."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, seconds in turns(calls, *args, **options):
        times[name].append(seconds)
    return times


class Figure(NamedTuple):
    """A time or a ratio, and where another run's is expected; None with one process."""

    value: float
    low: float | None = None
    high: float | None = None


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t; beyond the table its expansion, right to 0.3%."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    return 1.96 + 2.37 / freedom + 2.8 / freedom**2


def figures(samples: dict[str, list[list[float]]]) -> dict[str, Figure]:
    """samples: of each implementation of a case, the seconds (or ratios) of each round of each
    process."""
    medians = {name: [statistics.median(rounds) for rounds in s] for name, s in samples.items()}
    width = _half_width(list(medians.values()))
    found = {}
    for name, values in medians.items():
        value = statistics.geometric_mean(values)
        found[name] = Figure(value)
        if width is not None:
            found[name] = Figure(value, value * math.exp(-width), value * math.exp(width))
    return found


def speedups(samples: dict[str, list[list[float]]], base: str) -> dict[str, Figure]:
    """Times of `base` over those of each implementation, round by round: what slows a process, or
    some seconds of it, leaves them alone."""
    ratios = {
        name: [
            [b / own for b, own in zip(*rounds, strict=True)]
            for rounds in zip(samples[base], processes, strict=True)
        ]
        for name, processes in samples.items()
    }
    exactly = [1.0] * 3 if len(ratios.pop(base)) > 1 else [1.0]
    return {base: Figure(*exactly), **figures(ratios)}


def _half_width(medians: list[list[float]]) -> float | None:
    processes = len(medians[0]) if medians else 0
    if processes < 2:
        return None
    spreads = [statistics.variance([math.log(m) for m in values]) for values in medians]
    deviation = math.sqrt(statistics.fmean(spreads))
    return student(processes - 1) * deviation * math.sqrt(2 / processes)
