"""One trial: a call in a process of its own, forked from one that has the engine imported.

What the call returned or raised, what it did beside (started, connected, ran), its time and the
memory that it took come back. It is killed after LIMIT seconds of the processor or PATIENCE by the
clock, and gets no more than ROOM bytes of addresses.
"""

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import MissingPackage, ModelFileError, NonFinite, OutOfMemory, UsageError

LIMIT = 10  # seconds of the processor
PATIENCE = 6.0 * LIMIT  # by the clock: the machine may be busy, and a wait takes no processor
MEMORY = 2**29  # bytes that a call may add to the process's peak
ROOM = 2**32  # bytes of addresses beyond those that the parent has
MARKER = "RAN"  # the name of what a hostile payload leaves where it runs
DEEP = 100_000  # levels of a document
ENGINE_ERRORS = (ModelFileError, UsageError, NonFinite, OutOfMemory, MissingPackage)
ACTS = ("subprocess.", "socket.connect", "socket.bind", "os.system", "os.exec", "os.posix_spawn")


@dataclass(frozen=True)
class Trial:
    """A hostile input.

    what: in words.
    call: what is tried; returns a digest.
    refuse: it must be an error: there is nothing that could rightly be read.
    """

    what: str
    call: Callable[[], str]
    refuse: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    value: what it returned, a string; None where it raised or died.
    error: the text of an engine error.
    fault: what no call may do: another error, a death, a time, a peak, an act; "" for none.
    """

    value: str | None = None
    error: str | None = None
    fault: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _addresses() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _call(call: Callable[[], str], acts: list[str]) -> dict:
    """What is sent to the parent."""
    try:
        found = {"value": call()}
    except ENGINE_ERRORS as error:
        found = {"error": str(error)}
    except BaseException as error:  # the trial is whether there are any
        found = {"fault": f"raised {type(error).__name__}: {error}"[:300]}
    return {"fault": f"did {acts[0]}"} if acts else found


def _child(call: Callable[[], str], pipe: int, quiet: Path) -> None:
    """Never returns."""
    faulthandler.disable()
    sink = os.open(quiet, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(sink, descriptor)
    sys.stdin = open(os.devnull)
    limit = _addresses() + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    acts: list[str] = []
    sys.addaudithook(lambda event, _: acts.append(event) if event.startswith(ACTS) else None)

    sent = json.dumps(_call(call, acts)).encode()
    while sent:
        sent = sent[os.write(pipe, sent) :]
    os._exit(0)


def attempt(call: Callable[[], str], folder: Path) -> Outcome:
    """Make the call in a child.

    folder: gets a file of what the call printed.
    """
    before, begun = _resident(), time.monotonic()
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ours)
        _child(call, theirs, folder / "printed")

    os.close(theirs)
    said = b""
    while True:
        left = begun + PATIENCE - time.monotonic()
        if left <= 0 or not select.select([ours], [], [], left)[0]:
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(ours, 2**16)
        if not piece:
            break
        said += piece

    os.close(ours)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - begun
    peak = max(0, used.ru_maxrss * 1024 - before)
    if status:
        code = os.waitstatus_to_exitcode(status)
        slow = used.ru_utime + used.ru_stime >= LIMIT or seconds >= PATIENCE
        fault = f"took more than {LIMIT} s" if slow else f"ended with {code}"
        return Outcome(fault=fault, seconds=seconds, peak_bytes=peak)
    found = json.loads(said)
    if peak > MEMORY and "fault" not in found:
        found = {"fault": f"took {peak >> 20} MiB"}
    return Outcome(**found, seconds=seconds, peak_bytes=peak)
