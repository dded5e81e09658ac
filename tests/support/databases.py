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


@contextmanager
def postgres() -> Iterator[str]:
    """The URL of a server on a socket in a folder of its own. Errors: RuntimeError where there is
    no PostgreSQL."""
    folder = binaries()
    if folder is None:
        raise RuntimeError(MISSING)
    room = Path(tempfile.mkdtemp(prefix="univigu-pg-"))
    who = {}
    if os.getuid() == 0:  # PostgreSQL does not run as root
        who = {"user": "nobody"}
        shutil.chown(room, "nobody")

    data, quiet = str(room / "data"), {"stdout": subprocess.DEVNULL, "cwd": room}
    subprocess.run(
        [folder / "initdb", "-D", data, "-U", "univigu", "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True,
        **who,
        **quiet,
    )
    options = ["-D", data, "-k", str(room), "-c", "listen_addresses=", "-c", "fsync=off"]
    with open(os.devnull, "w") as log:
        process = subprocess.Popen([folder / "postgres", *options], stderr=log, **who, **quiet)
    try:
        until(lambda: (room / ".s.PGSQL.5432").exists() and accepts(folder, room), 60)
        yield f"postgresql+psycopg://univigu@/postgres?host={room}"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.wait(30)
        shutil.rmtree(room)
