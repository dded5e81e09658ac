"""The table of the soak in docs/server.md, from the committed result of tests/soak/run.py."""

import json
import textwrap
from pathlib import Path

from bench.harness.record import ROOT
from bench.pages.tables import table

RESULT = ROOT / "bench/results/serve-soak.json"
HEAD = ["what is done", "what must hold", "times", "faults", "found"]
DATABASES = "SQLite", "PostgreSQL"
PARTS = {  # part of the result: what is done, what must hold
    "requests": (
        "{clients} clients ask for small videos",
        "None is lost; decoded frames and captions are those of the same call alone; the gauge of "
        "jobs in each scrape can be true; memory grows by less than a tenth",
    ),
    "server deaths": (
        "SIGKILL for the server, {jobs} jobs asked for meanwhile",
        "Each that was accepted is completed, once, as above",
    ),
    "runner deaths": ("SIGKILL for the runner, {jobs} jobs asked for meanwhile", "The same"),
    "cancels": (
        "A video of 95 steps is cancelled at a random one",
        "At most one step more is done after the answer; the next job is right",
    ),
    "newest client": (
        "openai {openai} makes {calls} calls",
        "They give what they promise; the video is that of the call alone",
    ),
}


def found(name: str, part: dict) -> str:
    """A cell: what was measured."""
    if name == "requests":
        first, last = part["memory, MB"][0], part["memory, MB"][-1]
        grown = [
            f"{who} {first[who]:.0f} MB after {first['jobs']} jobs, {last[who]:.0f} MB after all"
            for who in ("server", "runner")
        ]
        return f"{part['scrapes']} scrapes, up to {part['most queued']} queued; {'; '.join(grown)}"
    if name.endswith("deaths"):
        return f"{part['jobs begun again']} jobs begun again"
    if name == "cancels":
        waits = part["until the next job, s"]
        beyond = [f"{n} more in {count}" for n, count in part["steps after the answer"].items()]
        return (
            f"{', '.join(beyond)}; a step {part['a step, s']} s, the next job began after "
            f"{waits['median']} s (at most {waits['most']} s)"
        )
    return "-"


def read(path: Path = RESULT) -> dict:
    return json.loads(path.read_text())


def rows(result: dict) -> str:
    """The table, and on what it was measured."""
    lines = []
    titles = [f"{name}, {database}" for name in PARTS for database in DATABASES]
    for title in filter(result["parts"].get, titles):
        name, _, database = title.partition(", ")
        part = result["parts"][title]
        done, holds = (text.format(**part) for text in PARTS[name])
        share = part["share of the counts"]
        times = f"{part['trials']:,}" + (f" ({share:.0%} of the whole)" if share != 1 else "")
        faults = len(part["faults"])
        shown = f"**{faults}**" if faults else "0"
        lines.append([f"{database}: {done}", holds, times, shown, found(name, part)])

    made = result["environment"]
    commits = ", ".join(dict.fromkeys(part["commit"] for part in result["parts"].values()))
    loads = [
        part[when] for part in result["parts"].values() for when in ("load before", "load after")
    ]
    said = (
        f"The embedded model, {made['device']}, {made['cpu']['cores usable']} cores shared with "
        f"other work (load {min(loads)} to {max(loads)}), one thread, torch {made['torch']}, "
        f"commit {commits}."
    )
    absent = [title for title in titles if title not in result["parts"]]
    said += f" Not run: {'; '.join(absent)}." if absent else ""
    return f"{table(HEAD, lines)}\n\n{textwrap.fill(said, 120)}"
