"""The processes of a benchmark: each has a time limit, what it measured is heard while it runs, and
none outlives the one that started it."""

import ctypes
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from bench.harness import record

MARK = "bench result: "  # libraries print too
PR_SET_PDEATHSIG = 1  # linux/prctl.h
LOOK = 0.5  # seconds between looks at a silent process


def end_with(parent: int) -> None:
    """Asks the kernel to kill this process as soon as its parent ends, also by SIGKILL: without
    this a killed benchmark goes on using the GPU. Linux only. parent: its id, for it may have ended
    already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def tell(result) -> None:
    """Hands one result of this process, a child, to its parent."""
    print(MARK + json.dumps(result), flush=True)


def child(
    *arguments: str,
    until: float = math.inf,
    silence: float = math.inf,
    frugal: bool = False,
    heard: Callable[[object], None] = lambda result: None,
) -> tuple[list, str | None]:
    """Run `python -m bench` with these arguments -> what it told, and why that is not all or None.

    until: the moment of time.monotonic() at which it is killed.
    silence: seconds after which it is killed if it told nothing new.
    frugal: glibc gives back what is freed; left alone, it raises the size from which it does, and
        a training step seems to need 350 MiB more.
    heard: called with each result as it comes.
    """
    if until <= time.monotonic():
        return [], "no time was left"
    paths = [str(record.ROOT), str(record.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)} if frugal else {}
    command = [sys.executable, "-W", "ignore", "-m", "bench", "under", str(os.getpid()), *arguments]
    results = []

    def take(line: bytes) -> None:
        results.append(json.loads(line.decode().removeprefix(MARK)))
        heard(results[-1])

    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=env)
        try:
            why = _listen(process, take, until, silence)
        finally:
            process.kill()
            process.wait()
        if why is None and process.returncode:
            errors.seek(0)
            last = (errors.read().decode().strip().splitlines() or ["nothing"])[-1]
            why = f"the process ended with {process.returncode} and said: {last[:300]}"
    return results, why


def _listen(process, take: Callable[[bytes], None], until: float, silence: float) -> str | None:
    """Gives each marked line to `take` until the process has ended -> why it was given up."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout])
    reader.daemon = True  # a compiler's workers may hold the pipe open after the process
    reader.start()

    begun = news = time.monotonic()
    ended = False
    while True:
        if not ended and process.poll() is not None:
            ended = True
            reader.join(LOOK)

        try:
            line = lines.get(timeout=0 if ended else max(0, min(LOOK, until - time.monotonic())))
        except queue.Empty:
            now = time.monotonic()
            if ended:
                return None
            if now >= until:
                return f"the process ran past the time limit, after {now - begun:.0f} s"
            if now - news > silence:
                return f"the process was silent for {silence:.0f} s"
            continue

        if line.startswith(MARK.encode()):
            news = time.monotonic()
            take(line)


class Children:
    """Children of one benchmark, and why those that failed are not in its table."""

    def __init__(self, name: str, setting: str, limit: float, say: Callable[[str], None]):
        self.name, self.text, self.say = name, setting, say
        self.until, self.failed = time.monotonic() + limit, {}

    def __call__(self, said: str, *arguments: str, **options) -> list:
        """The child's results, as far as it came. The setting is its last argument."""
        self.say(f"{self.name}: {said}")
        results, why = child(*arguments, self.text, until=self.until, **options)
        self.failed |= {} if why is None else {said: why}
        return results
