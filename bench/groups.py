"""A group: implementations of one call that are checked, then timed in turns in one process."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.models import Setting
from bench.timing import WARM_UP, Clock, interleaved


@dataclass
class Group:
    """more: fields of every row. parts: by implementation, what `engine.roofline` predicts from.
    times: seconds of each round; peaks: bytes; refused: why an implementation has no times."""

    case: str
    dtype: str
    flops: int | None = None
    bytes: int | None = None
    more: dict = field(default_factory=dict)
    parts: dict[str, list] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def attempt(name: str, failed: dict[str, str], make: Callable):
    """make(), or None with the reason noted: a peer that cannot run is a line of the report."""
    try:
        return make()
    except Exception as error:  # a peer's compiler may raise anything; the others still count
        first = next(iter(str(error).splitlines()), "")
        failed[name] = f"{type(error).__name__}: {first[:160]}"
        return None


def build(
    makers: dict[str, Callable[[], Callable]], failed: dict[str, str], device: str
) -> tuple[dict[str, Callable], dict[str, int]]:
    """The calls that can be made, and the bytes on a GPU that each holds from then on."""
    calls, resident = {}, {}
    for name, make in makers.items():
        before = _allocated(device)
        call = attempt(name, failed, make)
        if call is not None:
            calls[name], resident[name] = call, _allocated(device) - before
    return calls, resident


def timed(
    group: Group,
    calls: dict[str, Callable],
    errors: dict[str, float],
    failed: dict[str, str],
    agreement: float,
    s: Setting,
    resident: dict[str, int] | None = None,
    run: bool = False,
) -> Group:
    """Times the calls whose error was taken and is at most `agreement`. On a GPU `resident` and
    what a call allocates besides are its peak. run: a whole sampling run; its kernels ran in the
    check, so that a GPU alone, where steps are captured, is warmed up again."""
    for name, error in errors.items():
        if not error <= agreement:
            failed[name] = f"differs by {error:.1e} from plain PyTorch in fp32"
    sound = {n: c for n, c in calls.items() if n not in failed and n in errors}
    group.errors, group.refused = errors, failed
    if resident is not None and _cuda(s.device):
        group.peaks = {n: resident[n] + peak(call, s.device) for n, call in sound.items()}
    if sound:
        rounds, warm_up = (s.run_rounds, _cuda(s.device)) if run else (s.rounds, WARM_UP)
        group.times = interleaved(sound, Clock(s.device), rounds, s.budget, warm_up)
    return group


def peak(call: Callable, device: str) -> int:
    """Bytes on a GPU that a call takes at most besides what was there; its second, for the first
    compiles."""
    call()
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = _allocated(device)
    call()
    return torch.cuda.max_memory_allocated(device) - before


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated(device) if _cuda(device) else 0


def _cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"
