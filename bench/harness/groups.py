"""A group: implementations of one call that are checked, then timed in turns in one process."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.harness.models import Setting
from bench.harness.record import state
from bench.harness.timing import WARM_UP, Clock, interleaved, is_cuda


@dataclass
class Group:
    """more: fields of every row. parts: by implementation, what `bench.roofline` predicts from.
    times: seconds of each round; peaks: bytes; refused: why an implementation has no times;
    machine: clocks and load right after the rounds. An error of None was not taken."""

    case: str
    dtype: str
    flops: int | None = None
    bytes: int | None = None
    more: dict = field(default_factory=dict)
    parts: dict[str, list] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    machine: dict = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def attempt(name: str, failed: dict[str, str], make: Callable):
    """make(), or None with the reason noted: a peer that cannot run is a line of the report."""
    try:
        return make()
    except Exception as error:  # a peer's compiler may raise anything; the others still count
        if "CUDA error" in str(error):
            raise  # nothing runs in this process any more
        first = next(iter(str(error).splitlines()), "")
        failed[name] = f"{type(error).__name__}: {first[:160]}"
        return None


def build(
    makers: dict[str, Callable[[], Callable]], failed: dict[str, str], device: str
) -> tuple[dict[str, Callable], dict[str, int]]:
    """The calls that can be made, and the bytes on a GPU that each holds from then on."""
    calls, resident = {}, {}
    for name, make in makers.items():
        before = allocated(device)
        call = attempt(name, failed, make)
        if call is not None:
            calls[name], resident[name] = call, allocated(device) - before
    return calls, resident


def timed(
    group: Group,
    calls: dict[str, Callable],
    errors: dict[str, float],
    failed: dict[str, str],
    agreement: float,
    s: Setting,
    resident: dict[str, int] | None = None,
    rounds: int | None = None,
) -> Group:
    """Times the calls whose error was taken and is at most `agreement`. On a GPU `resident` and
    what a call allocates besides are its peak. rounds: of calls that the check has warmed
    up, as whole runs; None: those of the setting, after a warm-up."""
    for name, error in errors.items():
        if error is not None and not error <= agreement:
            failed[name] = f"differs by {error:.1e} from plain PyTorch in fp32"
    group.errors, group.refused = errors, failed
    calls = {n: c for n, c in calls.items() if n not in failed and n in errors}
    if s.cuda:
        peaks = {n: attempt(n, failed, lambda c=c: peak(c, s.device)) for n, c in calls.items()}
        calls = {n: c for n, c in calls.items() if n not in failed}
        group.peaks = {n: peaks[n] + (resident or {}).get(n, 0) for n in calls}
    if calls:
        warm_up = 0 if rounds or s.cuda else WARM_UP  # on a GPU `peak` was one
        group.times = interleaved(calls, Clock(s.device), rounds or s.rounds, s.budget, warm_up)
    group.machine = state(s.device)
    return group


def peak(call: Callable, device: str) -> int:
    """Bytes on a GPU that a call takes at most besides what was there; where it captures graphs
    their pool counts, so that it is not to be called twice."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def allocated(device: str) -> int:
    """Bytes on a GPU."""
    return torch.cuda.memory_allocated(device) if is_cuda(device) else 0
