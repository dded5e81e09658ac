"""A group: implementations of one call that are checked, then timed in turns in one process."""

import gc
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

import torch

from bench.harness.models import Setting
from bench.harness.record import state
from bench.harness.timing import WARM_UP, Clock, is_cuda, turns

TELL = 1.0  # seconds of timing between two reports of a child


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
    errors: dict[str, float | None],
    failed: dict[str, str],
    agreement: float,
    s: Setting,
    resident: dict[str, int] | None = None,
    rounds: int | None = None,
) -> Iterator[Group]:
    """Times the calls whose error was taken and is at most `agreement` -> the group, again and
    again while it grows: a process that is killed has told what it had.

    resident: bytes on a GPU that each call holds; with what more it allocates, its peak.
    rounds: of calls that the check has warmed up, as whole runs; None: those of the setting, after
        a warm-up.
    """
    for name, error in errors.items():
        refuse(name, error, failed, agreement)
    group.errors, group.refused = errors, failed
    calls = {n: c for n, c in calls.items() if n not in failed and n in errors}
    clock, once = Clock(s.device), (rounds or s.rounds) == 1
    firsts: dict[str, list[float]] = {}
    for name, call in calls.items() if s.cuda or once else ():
        if s.cuda:
            bytes_ = attempt(name, failed, lambda call=call: peak(call, s.device))
            if bytes_ is None:
                continue
            group.peaks[name] = bytes_ + (resident or {}).get(name, 0)
        if once:
            firsts[name] = [clock(call)]
            yield replace(group, times=dict(firsts))
    calls = {n: c for n, c in calls.items() if n not in failed}

    group.times, told = firsts if once else {n: [] for n in calls}, time.monotonic()
    warm_up = 0 if rounds or s.cuda else WARM_UP  # on a GPU `peak` was one
    for name, seconds in () if once else turns(calls, clock, rounds or s.rounds, s.budget, warm_up):
        group.times[name].append(seconds)
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            yield whole(group)
    group.machine = state(s.device)
    yield group


def last(groups: Iterator[Group]) -> Group:
    """The group as it is in the end."""
    *_, found = groups
    return found


def whole(group: Group) -> Group:
    """Cut to the rounds in which all have had their turn; in the first, those that had one."""
    fewest = min(map(len, group.times.values())) or 1
    return replace(group, times={n: t[:fewest] for n, t in group.times.items() if t})


def refuse(name: str, error: float | None, failed: dict[str, str], agreement: float) -> None:
    if error is not None and not error <= agreement:
        failed[name] = f"differs by {error:.1e} from plain PyTorch in fp32"


def each_checked(
    group: Group,
    makers: dict[str, Callable[[], Callable]],
    error_of: Callable[[str, Callable], float],
    failed: dict[str, str],
    agreement: float,
    s: Setting,
) -> Generator[Group | str, None, tuple[dict, dict, dict]]:
    """Builds, checks and times once each implementation, one after another -> its name before it
    runs, the group after; returns calls, errors and resident bytes, as `timed` takes them."""
    clock = Clock(s.device)
    calls, errors, resident = {}, {}, {}
    group.errors, group.refused = errors, failed

    for name, make in makers.items():
        yield name
        made, kept = build({name: make}, failed, s.device)

        for call in made.values():
            error = attempt(name, failed, lambda name=name, call=call: error_of(name, call))
            if error is None:
                continue
            errors[name] = error
            refuse(name, error, failed, agreement)
            if name not in failed:
                calls[name], resident[name] = call, kept[name]
                group.times[name] = [clock(call)]

        notes = dict.fromkeys(group.times, "one call, alone")
        yield replace(group, notes=group.notes | notes, times=dict(group.times))

    return calls, errors, resident


def peak(call: Callable, device: str) -> int:
    """Most bytes on a GPU that a call takes beyond what was there. Where it captures graphs their
    pool counts, so it must not be called twice."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def allocated(device: str) -> int:
    """Bytes on a GPU."""
    return torch.cuda.memory_allocated(device) if is_cuda(device) else 0
