"""The table of docs/reliability.md, from the committed result of `make torture`."""

import json
import textwrap
from pathlib import Path

from bench.harness.record import ROOT
from bench.pages.tables import fill, table
from engine.errors import UsageError

RESULT = ROOT / "bench/results/torture.json"
HEAD = ["promise", "how it is tested", "trials", "last result"]
PROMISES = {  # part of the result: what is promised, and what is done to see it
    "corruptions": (
        "Damage is an error that names the file, changes nothing that is read, or is found by its "
        "hash",
        "bits, pages, lengths, files of models, checkpoints, shards, adapters and videos changed",
    ),
    "hostile files": (
        "A hostile file runs no code, reads nothing outside of its folder, and ends in an error or "
        "without harm, within 10 s of the processor and 512 MiB",
        "pickles with code, lying headers, bombs, devices, absurd JSON, odd videos",
    ),
    "kills": (
        "A process may end at any moment: what has a final name is whole, and the same command "
        "given again ends with the same files",
        "SIGKILL, SIGTERM and SIGINT at random moments of five commands",
    ),
    "full disks": (
        "So may the room on the disk",
        "files limited to a random size (RLIMIT_FSIZE)",
    ),
    "threaded clips": (
        "One `Pipeline` serves any number of threads: clips and captions are those of one thread, "
        "bit for bit",
        "{threads} threads, generate and caption mixed, against the same calls alone",
    ),
}


def read(path: Path = RESULT) -> dict:
    """Errors: UsageError for a result without all parts."""
    found = json.loads(path.read_text())
    if found["parts"].keys() != PROMISES.keys():
        got = ", ".join(found["parts"]) or "none"
        raise UsageError(f"{path}: must have all parts of `make torture`; got {got}. Run it again.")
    return found


def verdicts(part: dict) -> dict[str, int]:
    """What became of the trials, over all of their kinds."""
    total: dict[str, int] = {}
    for counts in part.get("by subject", part.get("by kind", {})).values():
        for verdict, count in counts.items() if isinstance(counts, dict) else ():
            total[verdict] = total.get(verdict, 0) + count
    return total


def last(part: dict) -> str:
    """A cell: faults, and what the others ended in."""
    faults = len(part["faults"])
    counted = {k: n for k, n in sorted(verdicts(part).items()) if k != "fault"}
    said = [f"{count:,} {verdict}" for verdict, count in counted.items()]
    said = said or [f"{part['trials'] - faults:,} right"]
    return "; ".join([f"**{faults} wrong**" if faults else "0 wrong", *said])


def damage(found: dict) -> str:
    """What became of the damaged inputs, by kind."""
    part = found["parts"]["corruptions"]
    ends = sorted(end for end in verdicts(part) if end != "fault")
    lines = []
    for name, counts in sorted(part["by subject"].items()):
        shown = [f"{counts.get(end, 0) or '-'}" for end in ends]
        lines.append([name, f"{sum(counts.values()):,}", *shown])
    return table(["damaged", "trials", *ends], lines)


def tables(found: dict) -> dict[str, str]:
    """What the page has between its markers."""
    lines = []
    for name, (promise, how) in PROMISES.items():
        part = found["parts"][name]
        lines.append([promise, how.format(**part), f"{part['trials']:,}", last(part)])

    made, commits = found["environment"], {}
    for name, part in found["parts"].items():
        commits.setdefault(part["commit"], []).append(name)
    of = "; ".join(
        f"commit {commit}" + (f" ({', '.join(names)})" if len(commits) > 1 else "")
        for commit, names in commits.items()
    )
    said = (
        f"{of[0].upper()}{of[1:]}; {made['device']}, {made['cpu']['cores usable']} cores, torch "
        f"{made['torch']}, seed {found['seed']}, {found['scale']:.0%} of the counts of a whole run."
    )
    return {
        "torture": f"{table(HEAD, lines)}\n\n{textwrap.fill(said, 120)}",
        "damage": damage(found),
    }


def write(folder: Path) -> None:
    """Rewrites the table of folder/reliability.md."""
    page = folder / "reliability.md"
    page.write_text(fill(page.read_text(), tables(read())))
