"""A process that runs bulk commands in children and kills them: `python bulk_runs.py JSON`.

It imports all that a command does and computes nothing, so that a child begins at once. For each
run of the argument it prints a line {"code": exit code, or -9, "parts": {name: inode},
"seconds": how long it took}. A run may have

kill: seconds after which it is killed, counted from the moment that it has written `more` parts
limit: bytes that a file may have
words: flags in addition
"""

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

from engine.cli import main
from engine.pipeline import Pipeline  # noqa: F401

PATIENCE = 120.0  # seconds that a run may take


def start(line: list[str], limit: int | None) -> int:
    child = os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os._exit(main(line))
    return child


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.glob("*-*.jsonl")}


def ended(child: int, folder: Path, kill: float | None = None, more: int = 0) -> int:
    """The exit code, or -9 of a child that was killed."""
    wanted, until = len(parts(folder)) + more, time.monotonic() + PATIENCE
    while time.monotonic() < until:
        if kill is not None and len(list(folder.glob("*-*.jsonl"))) >= wanted:
            until, kill = time.monotonic() + kill, None
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)

    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    folder = Path(asked["parts"])
    for run in asked["runs"]:
        begun, line = time.monotonic(), asked["line"] + run.pop("words", [])
        code = ended(start(line, run.pop("limit", None)), folder, **run)
        took = time.monotonic() - begun
        print(json.dumps({"code": code, "parts": parts(folder), "seconds": took}), flush=True)
