"""The table of threads in docs/serving.md, from the result of `python -m bench threads`."""

from pathlib import Path

from bench.harness.record import ROOT, percent, read
from bench.pages.tables import fill, table

RESULT = ROOT / "bench/results/cpu-threads.json"
HEAD = ["clips a second of two threads, beside one", "`OMP_NUM_THREADS=1`", "default"]


def tables(path: Path = RESULT) -> dict[str, str]:
    """What the page has between its markers. Errors: UsageError."""
    result = read(path)
    rows = {(row["task"], row["OpenMP"]): row for row in result["rows"]}
    lines = []
    for task in dict.fromkeys(row["task"] for row in result["rows"]):
        pair = [rows[task, which] for which in ("1", "default")]
        shown = [f"{row['speedup']:.2f}x" + percent(row, "speedup") for row in pair]
        lines.append([f"`{task}`", *shown])
    made, setting = result["environment"], result["setting"]
    said = (
        f"The embedded model, {setting['steps']} steps, {made['device']}, "
        f"{made['cpu']['cores usable']} cores, commit {made['commit']}."
    )
    return {"threads": f"{table(HEAD, lines)}\n\n{said}"}


def write(folder: Path) -> None:
    """Rewrites the table of folder/serving.md."""
    page = folder / "serving.md"
    page.write_text(fill(page.read_text(), tables()))
