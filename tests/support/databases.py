"""A PostgreSQL server of one's own, where Debian's package is installed."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from serving import until

MISSING = "no PostgreSQL in /usr/lib/postgresql; install Debian's package postgresql"


def binaries() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


def accepts(folder: Path, room: Path) -> bool:
    return not subprocess.run([folder / "pg_isready", "-q", "-h", str(room)]).returncode


class Cluster:
    """A PostgreSQL server on a socket in a folder of its own, which may stop and start.

    Errors: RuntimeError where there is no PostgreSQL.
    """

    def __init__(self):
        self.folder, self.who = binaries(), {}
        if self.folder is None:
            raise RuntimeError(MISSING)
        self.room = Path(tempfile.mkdtemp(prefix="univigu-pg-"))
        if os.getuid() == 0:  # PostgreSQL does not run as root
            self.who = {"user": "nobody"}
            shutil.chown(self.room, "nobody")

        self.url = f"postgresql+psycopg://univigu@/postgres?host={self.room}"
        self.data = str(self.room / "data")
        command = [self.folder / "initdb", "-D", self.data, "-U", "univigu", "-A", "trust"]
        command += ["--no-sync", "-E", "UTF8"]
        quiet = {"stdout": subprocess.DEVNULL, "cwd": self.room}
        subprocess.run(command, check=True, **quiet, **self.who)
        self.start()

    def start(self) -> None:
        options = ["-D", self.data, "-k", str(self.room), "-c", "listen_addresses="]
        command = [self.folder / "postgres", *options, "-c", "fsync=off"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.room}
        self.process = subprocess.Popen(command, **quiet, **self.who)
        until(lambda: accepts(self.folder, self.room), 60)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)  # its fast shutdown, which ends all connections
        self.process.wait(30)


@contextmanager
def cluster() -> Iterator[Cluster]:
    started = Cluster()
    try:
        yield started
    finally:
        started.stop()
        shutil.rmtree(started.room)


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server that runs."""
    with cluster() as started:
        yield started.url
