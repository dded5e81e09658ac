"""One run at a time in a folder that is written over hours.

The lock belongs to the process: the system takes it back however the process ends, so a lock is
never stale and nothing has to be removed by hand.
"""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows, where nothing is trained
    fcntl = None

NAME = "run.lock"


@contextmanager
def locked(folder: Path, flag: str = "--output-path") -> Iterator[None]:
    """Hold `folder`, which exists, for this process. A second holder is refused at once, on another
    host too where the file system shares locks (NFS does). flag: the one that names the folder.

    Errors: UsageError with the holder's host and process id.
    """
    if fcntl is None:
        yield
        return

    file = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder}: one run at a time may write here; {_holder(file)} does. "
                f"Wait for it, stop it, or choose another {flag}."
            ) from None
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        os.close(file)


def _holder(file: int) -> str:
    """The holder, by what it wrote; it may not have come to that yet."""
    try:
        record = json.loads(os.pread(file, 4096, 0))
        return f"process {record['pid']} on {record['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
