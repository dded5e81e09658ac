"""The choice among attention backends by one timed trial, remembered in a file.

A trial runs each candidate's forward on normal random data at the model's shape, without text
lengths, and takes the median. Its results are kept under the device, the versions of what ran, the
shape, the dtype and the candidates.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from ._libraries import versions
from ._spec import Backend, Case

# Not cross_attention: its own kernels take a prompt's 20 rows where the libraries need all 512.
OPS = ("joint_attention",)
WARM_UP, RUNS = 2, 5
ENTRIES = 256  # of the file


class Trial(NamedTuple):
    """(backend, seconds), the fastest first, and (backend, error) of those that raised."""

    times: tuple[tuple[str, float], ...]
    failed: tuple[tuple[str, str], ...]


def inputs(op: str, case: Case, device: torch.device, dtype: torch.dtype) -> tuple:
    """Arguments of the op at `case`, the same at each call; the global generators are left alone.

    Of B, V, T, C, H and K (see _spec) joint_attention needs all but C.
    """
    generator = torch.Generator(device).manual_seed(0)
    rows = case["V"] + case["T"]
    keys = rows if op == "joint_attention" else case["C"]
    q, k, v = (
        torch.randn(
            case["B"], n, case["H"], case["K"], generator=generator, device=device, dtype=dtype
        )
        for n in (rows, keys, keys)
    )
    return (q, k, v, case["V"]) if op == "joint_attention" else (q, k, v)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of RUNS calls after WARM_UP more, by the device's own clock on a GPU."""
    for _ in range(WARM_UP):
        call()
    if device.type != "cuda":
        return median(_clocked(call) for _ in range(RUNS))
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        events[-1].synchronize()
        pairs = zip(events, events[1:], strict=False)
        return median(before.elapsed_time(after) / 1000 for before, after in pairs)


def _clocked(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


@torch.no_grad()
def run(
    op: str, backends: Sequence[Backend], case: Case, device: torch.device, dtype: torch.dtype
) -> tuple[Trial, bool]:
    """-> (the trial, whether to keep it: not if memory ran out, or nothing could run)."""
    times, failed, lasting = [], [], True
    arguments = inputs(op, case, device, dtype)
    for backend in backends:
        try:
            time = seconds(lambda call=backend.call: call(*arguments), device)
        except Exception as error:  # reported as the reason why the backend was rejected
            text = " ".join(str(error).split())[:300]
            failed.append((backend.name, f"{type(error).__name__} in its trial: {text}"))
            lasting &= not isinstance(error, torch.OutOfMemoryError)
        else:
            times.append((backend.name, time))
    times.sort(key=lambda pair: pair[1])
    return Trial(tuple(times), tuple(failed)), lasting and bool(times)


def key(
    op: str, backends: Sequence[Backend], case: Case, device: torch.device, dtype: torch.dtype
) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    shape = {letter: int(case[letter]) for letter in "BVTCHK" if letter in case}
    names = [backend.name for backend in backends]
    return json.dumps([op, name, versions(), shape, str(dtype), names])


def _entry(trial: object, names: set[str]) -> Trial | None:
    """A trial as the file holds it, if it is one of just these backends."""
    try:
        times = tuple((str(name), float(time)) for name, time in trial["times"])
        failed = tuple((str(name), str(error)) for name, error in trial["failed"])
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    tried = [name for name, _ in (*times, *failed)]
    sound = sorted(tried) == sorted(names) and all(0 < time < 1e6 for _, time in times)
    return Trial(times, failed) if sound else None


def read(file: Path | None) -> dict:
    """The entries of the file; a damaged file, and one that cannot be read, has none."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return entries if isinstance(entries, dict) else {}


def write(file: Path | None, entries: dict) -> None:
    """Replaces the file as a whole, with the newest ENTRIES; a folder that cannot be written keeps
    none, and the next start repeats its trials."""
    if file is None:
        return
    kept = dict(list(entries.items())[-ENTRIES:])
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump(kept, stream, indent=1)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise


def remembered(
    file: Path | None,
    op: str,
    backends: Sequence[Backend],
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
) -> Trial:
    """The trial that the file holds, or a new one, which is added to it."""
    what = (op, backends, case, device, dtype)
    name, names = key(*what), {backend.name for backend in backends}
    if trial := _entry(read(file).get(name), names):
        return trial
    trial, lasting = run(*what)
    if lasting:
        others = {k: entry for k, entry in read(file).items() if k != name}
        write(file, others | {name: trial._asdict()})
    return trial
