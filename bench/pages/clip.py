"""The table of docs/few-steps.md: where a clip's time goes, of `python -m bench clip`."""

from pathlib import Path

from bench.clip import STAGES
from bench.harness.record import ROOT, read
from bench.pages.tables import fill, table

RESULT = ROOT / "bench/results/cpu-clip.json"


def tables(path: Path = RESULT) -> dict[str, str]:
    """What the page has between its markers. Errors: UsageError."""
    result, lines = read(path), []
    for row in result["rows"]:
        seconds = [row["seconds"][stage] for stage in STAGES]
        size = f"{row['frames']} frames of {row['side']} x {row['side']}, {row['run']}"
        shown = [f"{1000 * s:.0f}" for s in (*seconds, sum(seconds))]
        lines.append([size, row["who"], *shown])
    made = result["environment"]
    said = f"Milliseconds, {made['device']}, one thread, commit {made['commit']}."
    head = ["clip", "by", *STAGES, "in all"]
    return {"clip": f"{table(head, lines)}\n\n{said}"}


def write(folder: Path) -> None:
    """Rewrites the table of folder/few-steps.md."""
    page = folder / "few-steps.md"
    page.write_text(fill(page.read_text(), tables()))
