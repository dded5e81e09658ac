"""`make torture`: what docs/reliability.md counts, and its result as JSON; 20 minutes on two cores.

    python tests/torture/run.py --output-path bench/results/torture.json

A trial is drawn from the seed and its number, so a fault comes back with both. Exit code 1 where
there was a fault.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from functools import partial, reduce
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = map(str, (HERE, HERE.parent / "support", ROOT / "kernels", ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # a pool of threads would not survive a fork

import clips  # noqa: E402
import corruptions  # noqa: E402
import hostile  # noqa: E402
import kills  # noqa: E402
import subjects  # noqa: E402

import engine.cli.commands  # noqa: E402, F401 (what a trial would import is imported once)
from bench.harness import record  # noqa: E402

COUNTS = {
    "corruptions": 2000,
    "hostile files": 500,
    "kills": 60,
    "full disks": 20,
    "threaded clips": 200,
}
LANES = (  # processes, and what each does one after the other; a part in several is shared out
    ("corruptions",),
    ("corruptions",),
    ("corruptions",),
    ("hostile files", "threaded clips"),
    ("kills", "full disks"),
)
APART = 10**6  # numbers of trials between the processes that share a part


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lane(counts: dict, first: int, seed: int, root: Path, given: dict) -> dict:
    """The parts of `counts`, one after the other. first: the number of the first corruption."""
    runs = {"corruptions": partial(corruptions.run, first=first), "hostile files": hostile.run}
    runs |= {"kills": kills.run_kills, "full disks": kills.run_full_disks}
    runs |= {"threaded clips": clips.run}
    found = {}
    for name, count in counts.items():
        begun, folder = time.monotonic(), root / f"{name}-{first}"
        folder.mkdir()
        found[name] = runs[name](given, count, seed, folder, say)
        found[name]["seconds"] = round(time.monotonic() - begun)
    return found


def send_lane(pipe, *given) -> None:
    pipe.send(lane(*given))


def summed(a, b):
    """Counts added and lists joined, at any depth."""
    if isinstance(a, dict):
        return {k: summed(a[k], b[k]) if k in a and k in b else (a | b)[k] for k in a | b}
    return a + b


def shares(counts: dict[str, int]) -> list[dict[str, int]]:
    """What each of LANES does of these counts."""
    found = []
    for index, names in enumerate(LANES):
        mine = {}
        for name in filter(counts.get, names):
            before, lanes = (sum(name in n for n in part) for part in (LANES[:index], LANES))
            mine[name] = (counts[name] + lanes - 1 - before) // lanes
        found.append({name: count for name, count in mine.items() if count})
    return found


def all_lanes(counts: dict[str, int], *given) -> dict:
    """The parts, in processes that have what was imported here. Errors: RuntimeError."""
    fork, pending = get_context("fork"), []
    for index, mine in enumerate(shares(counts)):
        ours, theirs = fork.Pipe(duplex=False)
        fork.Process(target=send_lane, args=(theirs, mine, index * APART, *given)).start()
        theirs.close()
        pending.append(ours)

    try:
        return reduce(summed, [ours.recv() for ours in pending])
    except EOFError:
        raise RuntimeError("a part ended without a result; its traceback is above") from None


def write(path: Path, result: dict) -> None:
    """The result as JSON. Of a run of one part, the file's other parts stay, if they are of the
    same scale and seed; each says its commit."""
    before = json.loads(path.read_text()) if path.exists() else {"parts": {}}
    same = all(before.get(name) == result[name] for name in ("scale", "seed"))
    parts = (before["parts"] if same else {}) | result["parts"]
    path.write_text(json.dumps(result | {"parts": parts}, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of every count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COUNTS, help="one part; the file's others stay")
    parser.add_argument("--output-path", type=Path)
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(COUNTS)
    counts = {name: max(1, round(asked.scale * COUNTS[name])) for name in names}

    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        (root / "whole").mkdir()
        os.chdir(root)
        found = all_lanes(counts, asked.seed, root, subjects.make(root / "whole"))
        os.chdir(ROOT)
    machine = record.machine("cpu")
    parts = {name: found[name] | {"commit": machine["commit"]} for name in names}
    result = {"scale": asked.scale, "seed": asked.seed, "parts": parts, "environment": machine}
    if asked.output_path:
        write(asked.output_path, result)

    faults = 0
    for name, one in found.items():
        faults += len(one["faults"])
        print(f"{name}: {one['trials']} trials, {len(one['faults'])} faults, {one['seconds']} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
