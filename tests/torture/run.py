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
LANES = ("corruptions",), ("hostile files", "kills", "full disks", "threaded clips")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def lane(names: tuple[str, ...], counts: dict, seed: int, root: Path, given: dict) -> dict:
    """The parts of COUNTS with these names, one after the other."""
    runs = {"corruptions": corruptions.run, "hostile files": hostile.run, "kills": kills.run_kills}
    runs |= {"full disks": kills.run_full_disks, "threaded clips": clips.run}
    found = {}
    for name in names:
        begun, folder = time.monotonic(), root / name
        folder.mkdir()
        found[name] = runs[name](given, counts[name], seed, folder, say)
        found[name]["seconds"] = round(time.monotonic() - begun)
    return found


def both_lanes(names: list[str], *given) -> dict:
    """The parts, on two processes, which have what was imported here. Errors: RuntimeError."""
    fork, pending = get_context("fork"), []
    for chosen in LANES:
        ours, theirs = fork.Pipe(duplex=False)
        mine = tuple(name for name in chosen if name in names)
        child = fork.Process(
            target=lambda to, mine: to.send(lane(mine, *given)), args=(theirs, mine)
        )
        child.start()
        theirs.close()
        pending.append(ours)
    try:
        return {name: one for ours in pending for name, one in ours.recv().items()}
    except EOFError:
        raise RuntimeError(
            "torture: a part must end with a result; its traceback is above"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="of every count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=COUNTS, help="one part")
    parser.add_argument("--output-path", type=Path)
    asked = parser.parse_args()
    names = [asked.only] if asked.only else list(COUNTS)
    counts = {name: max(1, round(asked.scale * COUNTS[name])) for name in names}

    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        (root / "whole").mkdir()
        os.chdir(root)
        found = both_lanes(names, counts, asked.seed, root, subjects.make(root / "whole"))
        os.chdir(ROOT)
    result = {"scale": asked.scale, "seed": asked.seed}
    result |= {"parts": {name: found[name] for name in names}}
    result["environment"] = record.machine("cpu")
    if asked.output_path:
        asked.output_path.write_text(json.dumps(result, indent=1) + "\n")

    faults = 0
    for name, one in found.items():
        faults += len(one["faults"])
        print(f"{name}: {one['trials']} trials, {len(one['faults'])} faults, {one['seconds']} s")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
