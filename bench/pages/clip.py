"""The tables of docs/few-steps.md: where a clip's time goes, of `python -m bench clip`, `few`."""

from pathlib import Path

from bench.clip import FEW, GUIDED, WHOLE
from bench.harness.record import ROOT, read
from bench.pages.tables import fill, table
from engine.cli.clip import STAGES
from engine.result import FIRST

RESULT, RESULT_FEW = (ROOT / f"bench/results/cpu-{name}.json" for name in ("clip", "few"))


def tables(clip: Path = RESULT, few: Path = RESULT_FEW) -> dict[str, str]:
    """What the page has between its markers. Errors: UsageError."""
    return {"clip": beside_diffusers(read(clip)), "few": beside_guided(read(few))}


def beside_diffusers(result: dict) -> str:
    lines = []
    for row in result["rows"]:
        seconds = [row["seconds"][stage] for stage in STAGES]
        shown = [f"{1000 * s:.0f}" for s in (*seconds, sum(seconds))]
        lines.append([f"{size_of(row)}, {row['run']}", row["who"], *shown])
    return said(table(["clip", "by", *STAGES, "in all"], lines), result)


def beside_guided(result: dict) -> str:
    names, lines, sizes = (*STAGES, FIRST, WHOLE), [], {}
    for row in result["rows"]:
        sizes.setdefault(size_of(row), {})[row["run"]] = row["seconds"]
    for size, seconds in sizes.items():
        for run in (GUIDED, FEW):
            shown = (f"{1000 * seconds[run][name]:.0f}" for name in names)
            lines.append([f"{size}, {run}", *shown])
        ratios = [seconds[GUIDED][name] / seconds[FEW][name] for name in names]
        lines.append(["so many times less", *(f"{ratio:.1f}" for ratio in ratios)])
    return said(table(["clip", *names], lines), result)


def size_of(row: dict) -> str:
    return f"{row['frames']} frames of {row['side']} x {row['side']}"


def said(lines: str, result: dict) -> str:
    made, rounds = result["environment"], len(result["rows"][0]["rounds"])
    where = f"{made['device']}, one thread, commit {made['commit']}"
    return f"{lines}\n\nMilliseconds, medians of {rounds} rounds, {where}."


def write(folder: Path) -> None:
    """Rewrites the table of folder/few-steps.md."""
    page = folder / "few-steps.md"
    page.write_text(fill(page.read_text(), tables()))
