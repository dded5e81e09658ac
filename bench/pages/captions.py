"""The table of docs/captions.md: where a caption's time goes, of `python -m bench caption-time`."""

from pathlib import Path

from bench.caption_time import EMBEDDED_MODEL, STAGES, STEPS
from bench.harness.record import ROOT, read
from bench.pages.tables import fill, table

RESULT = ROOT / "bench/results/cpu-caption-time.json"
NAMES = {
    "file": "file alone",
    "vae": "VAE alone",
    "encode": "file and VAE at once",
    "constants": "made once",
    "steps": f"{STEPS} steps",
    "words": "words",
    "call": "in all",
    "first": "first tokens after",
}


def tables(path: Path = RESULT) -> dict[str, str]:
    """What the page has between its markers. Errors: UsageError."""
    result = read(path)
    lines = []
    for row in result["rows"]:
        model = "embedded" if row["model"] == EMBEDDED_MODEL else "d = 1536, 2 layers"
        size = f"{row['frames']} frames of {row['side']} x {row['side']}, {model}, {row['cache']}"
        lines.append([size, *(f"{1000 * row['seconds'][stage]:.0f}" for stage in STAGES)])

    made, rounds = result["environment"], len(result["rows"][0]["rounds"])
    where = f"{made['device']}, one thread, commit {made['commit']}"
    said = f"Milliseconds, medians of {rounds} rounds in turns, {where}."
    head = ["caption", *(NAMES[stage] for stage in STAGES)]
    return {"caption-time": f"{table(head, lines)}\n\n{said}"}


def write(folder: Path) -> None:
    """Rewrites the table of folder/captions.md."""
    page = folder / "captions.md"
    page.write_text(fill(page.read_text(), tables()))
