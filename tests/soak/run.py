"""What `make soak` asks of a server, and what it found as JSON; 25 minutes on two cores.

    python tests/soak/run.py --output-path bench/results/serve-soak.json

A server of its own for each part, with the embedded model and one thread; on SQLite, and the same
parts on PostgreSQL where Debian's package is installed. Exit code 1 where there was a fault.
"""

import argparse
import json
import os
import random
import socket
import sys
import tempfile
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (HERE, HERE.parent / "support", ROOT / "kernels", ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # as the servers

import cancels  # noqa: E402
import databases  # noqa: E402
import deaths  # noqa: E402
import newest  # noqa: E402
import traffic  # noqa: E402
from alone import Alone  # noqa: E402
from serving import Served  # noqa: E402

from bench.harness import record  # noqa: E402

RUNS = {
    "requests": traffic.run,
    "server deaths": partial(deaths.run, deaths.kill_server),
    "runner deaths": partial(deaths.run, deaths.kill_runner),
    "cancels": cancels.run,
    "newest client": newest.run,
}
COUNTS = {
    "requests": 1000,
    "server deaths": 30,
    "runner deaths": 20,
    "cancels": 50,
    "newest client": 1,
}
DATABASES = "SQLite", "PostgreSQL"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def part(name: str, database: str, scale: float, seed: int) -> dict:
    """One part, on a server and a database of its own."""
    count, begun = max(1, round(scale * COUNTS[name])), time.monotonic()
    load = os.getloadavg()[0]
    room = databases.postgres() if database == "PostgreSQL" else nullcontext("")
    with tempfile.TemporaryDirectory() as made, room as url:
        alone = Alone(Path(made))
        how = {"database": url, "port": free_port()}
        served = Served(Path(made) / "data", "--attempts", "100", **how)
        try:
            found = RUNS[name](served, alone, count, random.Random(seed), say)
        finally:
            served.close()
    found |= {"seconds": round(time.monotonic() - begun), "share of the counts": scale}
    return found | {"load before": round(load, 1), "load after": round(os.getloadavg()[0], 1)}


def write(path: Path, result: dict) -> None:
    """The result as JSON; parts of the file that were not run stay."""
    before = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    parts = before["parts"] | result["parts"]
    path.write_text(json.dumps(result | {"parts": parts}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of every count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COUNTS, help="one part; the file's others stay")
    parser.add_argument("--database", choices=DATABASES, help="on this one alone")
    parser.add_argument("--output-path", type=Path)
    asked = parser.parse_args()

    faults = 0
    for name in [asked.only] if asked.only else COUNTS:
        for database in [asked.database] if asked.database else DATABASES:
            found = part(name, database, asked.scale, asked.seed)
            machine = record.machine("cpu")
            found["commit"] = machine["commit"]
            result = {"parts": {f"{name}, {database}": found}, "environment": machine}
            if asked.output_path:
                write(asked.output_path, result)
            faults += len(found["faults"])
            print(f"{name}, {database}: {found['trials']} trials, {found['faults']}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
