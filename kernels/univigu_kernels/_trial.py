"""The choice among backends by a trial on the user's card, remembered in a file.

A child process proves each candidate first: twice on small problems and on the model's own shape,
against plain PyTorch in the same dtype and in float32. Those that hang, die, differ between two
runs or are wrong are rejected, with the reason. Those that are proven are then timed in turns. The
file that remembers it is named after the card, the versions of what ran and the kernels' sources.
"""

import contextlib
import hashlib
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from time import monotonic

import torch

from . import _child
from ._card import card_of
from ._libraries import versions

RUNNING = 20.0  # seconds that a candidate may run in all, its compilation apart
PATIENCE = 120.0  # seconds that a child may take to start, to compile or to check
ENTRIES = 256  # of the file
MODULE = f"{__package__}._trial_child"
Once = Callable[[str, Callable[[], str]], str]


@dataclass(frozen=True)
class Request:
    """What is tried: the op whose OP is in `module`, one of its kinds, at the sizes of `case`,
    and the candidates among its backends. dtype: a name of torch."""

    module: str
    kind: str
    case: Mapping[str, int]
    device: str
    dtype: str
    candidates: tuple[str, ...]

    def key(self) -> str:
        shape = {letter: int(size) for letter, size in sorted(self.case.items())}
        return json.dumps([self.module, self.kind, shape, self.dtype, self.candidates])


@dataclass(frozen=True)
class Trial:
    """times: (backend, seconds), the fastest first. rejected: (backend, reason) of what was found
    unfit; untried: of what could not be tried, which says nothing about it."""

    times: tuple[tuple[str, float], ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    untried: tuple[tuple[str, str], ...] = ()


@dataclass
class _Findings:
    """What is known of the candidates so far. running: seconds of each."""

    proved: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    untried: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    running: dict[str, float] = field(default_factory=dict)
    done: bool = False

    def take(self, event: dict) -> None:
        match event:
            case {"proved": name}:
                self.proved.append(name)
            case {"rejected": name, "reason": why}:
                self.rejected[name] = why
            case {"untried": name, "reason": why}:
                self.untried[name] = why
            case {"timed": name, "seconds": took}:
                self.seconds.setdefault(name, []).append(took)
            case {"done": True}:
                self.done = True

    def reject(self, name: str, why: str) -> None:
        self.rejected[name] = why
        self.proved = [other for other in self.proved if other != name]

    def left(self, candidates: Sequence[str]) -> list[str]:
        known = {*self.proved, *self.rejected, *self.untried}
        return [name for name in candidates if name not in known]


class _Child:
    """One process of a trial. Within `with`; afterwards it is gone."""

    def __init__(self, request: dict):
        self.errors = tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = _child.start(MODULE, start_new_session=True, **pipes)
        self.buffer = b""
        with contextlib.suppress(BrokenPipeError):  # it has ended: the next read says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *error) -> None:
        """What a candidate started goes too. A device that still works for it may keep it for a
        while after SIGKILL: it is waited for."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def event(self, seconds: float) -> dict | None:
        """The next; None at its end. Errors: TimeoutError."""
        deadline = monotonic() + seconds
        while b"\n" not in self.buffer:
            ready, *_ = select.select([self.process.stdout], [], [], max(0, deadline - monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(self.process.stdout.fileno(), 1 << 16)
            if not data:
                return None
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def exit_reason(self) -> str:
        """How it ended, and the last line that it said."""
        code = self.process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.errors.seek(0)
        said = self.errors.read().decode(errors="replace").strip().splitlines()
        return f"{how}: {said[-1][:300]}" if said else how


def _follow(child: _Child, findings: _Findings, running: float, patience: float) -> str | None:
    """Takes its events until it is done, or until one candidate has ended it: then that one is
    rejected. -> why it never came to a candidate, or None."""
    now, name = "starting", None
    while not findings.done:
        spent = findings.running.get(name, 0.0)
        limit = running - spent if now == "running" else patience
        began = monotonic()
        try:
            event = child.event(max(limit, 0.01))
        except TimeoutError:
            took = running if now == "running" else patience
            why = f"its trial did not end: {now} for {took:g} s"
            if name is None:
                return why
            findings.reject(name, why)
            return None

        if now == "running":
            findings.running[name] = spent + monotonic() - began
        if event is None:
            if name is None:
                return f"the trial's process ended by {child.exit_reason()}"
            findings.reject(name, f"ended its trial's process by {child.exit_reason()}")
            return None
        findings.take(event)
        now, name = event.get("now", "between"), event.get("backend", name)
    return None


def hold(request: Request, running: float = RUNNING, patience: float = PATIENCE) -> Trial:
    """Runs it: a process, and another one after each candidate that ends its."""
    findings = _Findings()
    while not findings.done:
        asked = asdict(request) | {
            "to_prove": findings.left(request.candidates),
            "proved": findings.proved,
        }
        findings.seconds.clear()
        with _Child(asked) as child:
            failed = _follow(child, findings, running, patience)
        if failed is not None:
            rest = [*findings.left(request.candidates), *findings.proved]
            findings.untried |= dict.fromkeys(rest, failed)
            break

    times = {name: median(took) for name, took in findings.seconds.items() if findings.done}
    ordered = sorted(times.items(), key=lambda pair: pair[1])
    return Trial(tuple(ordered), *(tuple(x.items()) for x in (findings.rejected, findings.untried)))


@cache
def sources() -> str:
    """Hash of the kernels' sources and of the compiled module."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in (".py", ".so"):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def place(device: torch.device) -> dict:
    """What a trial holds for: the card, versions, and sources."""
    card = "cpu"
    if device.type == "cuda":
        card = f"{torch.cuda.get_device_name(device)}, {card_of(device)}"
    return {"card": card, "versions": versions(), "sources": sources()}


def file_of(place: dict, folder: Path) -> Path:
    """Where its trials are remembered."""
    digest = hashlib.sha256(json.dumps(place, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"trials-{digest}.json"


def _pairs(value: object, kind: type) -> tuple:
    return tuple((str(name), kind(x)) for name, x in value)


def _entry(entry: object, candidates: Sequence[str]) -> Trial | None:
    """A trial as the file holds it, if it is one of just these candidates."""
    try:
        times, rejected = _pairs(entry["times"], float), _pairs(entry["rejected"], str)
    except (TypeError, KeyError, ValueError, OverflowError):
        return None
    tried = [name for name, _ in (*times, *rejected)]
    sound = sorted(tried) == sorted(candidates) and all(0 < time < 1e6 for _, time in times)
    return Trial(times, rejected) if sound else None


def read(file: Path) -> dict:
    """The entries of the file; a damaged file, and one that cannot be read, has none."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["trials"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return {}
    return entries if isinstance(entries, dict) else {}


def write(file: Path, place: dict, entries: dict) -> None:
    """Replaces the file as a whole, with the newest ENTRIES; a folder that cannot be written keeps
    none, and the next start repeats its trials."""
    kept = dict(list(entries.items())[-ENTRIES:])
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=file.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                json.dump({**place, "trials": kept}, stream, indent=1)
            os.replace(temporary, file)
        except BaseException:
            os.unlink(temporary)
            raise


def remembered(request: Request, folder: Path | None) -> Trial:
    """The trial that the folder holds, or a new one, which is added to it unless something could
    not be tried. folder: None where the user has no home."""
    if folder is None:
        return hold(request)
    where, key = place(torch.device(request.device)), request.key()
    file = file_of(where, folder)
    if trial := _entry(read(file).get(key), request.candidates):
        return trial

    trial = hold(request)
    if not trial.untried:
        others = {k: entry for k, entry in read(file).items() if k != key}
        write(file, where, others | {key: {"times": trial.times, "rejected": trial.rejected}})
    return trial


def shared(request: Request, folder: Path | None, once: Once | None) -> Trial:
    """The remembered trial or a new one; with `once`, rank 0's on every rank."""
    if once is None:
        return remembered(request, folder)

    def make() -> str:
        return json.dumps(asdict(remembered(request, folder)))

    found = json.loads(once(f"trial/{request.key()}", make))
    parts = (found["times"], found["rejected"], found["untried"])
    return Trial(*(tuple(map(tuple, pairs)) for pairs in parts))
