"""How a command meets its surroundings: a reader of its output that leaves, a terminal that knows
few characters, and signals that end it. Nothing large is imported here, for signals may come first.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)


class Outlet:
    """A text stream whose reader may leave: what is written from then on is dropped, so that the
    command's results and its exit code are as they would have been.

    harmless: the errors after which that holds. Of messages it is any, for a log may lie on the
        full disk that they tell of; results that a disk does not take are an error.
    """

    def __init__(self, stream, harmless: type[OSError] = BrokenPipeError):
        self._stream, self._harmless = stream, harmless

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except self._harmless:
            self._drain()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._harmless:
            self._drain()

    def _drain(self) -> None:
        """Send what is buffered, and all that follows, to nobody; else the interpreter would try
        once more at its end, complain, and exit with 120."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        self._stream.flush()


@contextmanager
def streams() -> Iterator[None]:
    """Within it stdout and stderr are outlets, and what their encoding lacks is written as an
    escape: a file's name is no reason to fail once the file is there."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr, OSError)
    try:
        yield
    finally:
        for outlet in (sys.stdout, sys.stderr):
            outlet.flush()
        sys.stdout, sys.stderr = before


def importing(name: str) -> bool:
    """Whether a package is half imported. An exception within torch's import may come up in C++
    that lets none through: the process aborts."""
    spec = getattr(sys.modules.get(name), "__spec__", None)
    return getattr(spec, "_initializing", False)


def send_later(number: int) -> None:
    """Sends this process a signal, in a moment."""
    time.sleep(0.05)
    os.kill(os.getpid(), number)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Within it SIGINT and SIGTERM raise KeyboardInterrupt, so that what is half written is taken
    away, and their numbers are in the list. A second one ends the process at once. What comes while
    torch is being imported waits for the end of that.

    Only in the main thread; elsewhere Python allows no handlers and the list stays empty.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def end(number, frame):
        if importing("torch"):
            _thread.start_new_thread(send_later, (number,))  # takes no lock, as a Timer would
            return
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        raise KeyboardInterrupt

    found = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored, as nohup and background jobs have it, stays so.
    before = {each: handler for each, handler in found.items() if handler is not signal.SIG_IGN}
    for each in before:
        signal.signal(each, end)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler or signal.SIG_DFL)
