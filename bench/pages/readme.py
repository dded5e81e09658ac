"""README's table of times, from the committed results of `make bench-cpu`."""

import textwrap
from pathlib import Path

from bench.harness.record import ROOT, duration, percent, read
from bench.pages.tables import fill, table

RESULTS = ROOT / "bench/results"
PARTS = {  # case of a result: what the row is called
    "cpu-infer": {
        "t2v, guided": "t2v, {steps} guided steps",
        "forward": "one forward",
    },
    "cpu-caption": {"v2t": "v2t, {caption_steps} steps"},
    "cpu-train": {"training step": "training step, batch {samples}"},
}
HEAD = ["", "bf16", "speed", "fp32", "speed", "peak memory, bf16"]


def cells(row: dict | None) -> list[str]:
    if row is None:
        return ["", ""]
    return [
        duration(row["seconds"]) + percent(row, "seconds"),
        f"{row['speedup']:.2f}x" + percent(row, "speedup"),
    ]


def lines(results: dict[str, dict]) -> list[list[str]]:
    found = []
    for name, cases in PARTS.items():
        result = results[name]
        for case, title in cases.items():
            rows = [row for row in result["rows"] if row["case"] == case]
            by = {(row["dtype"], row["implementation"]): row for row in rows}
            for implementation in dict.fromkeys(row["implementation"] for row in rows):
                low, wide = (by.get((d, implementation)) for d in ("bfloat16", "float32"))
                ours = implementation.startswith("engine")
                shown = f"**{implementation}**" if ours else implementation
                memory = f"{low['peak_bytes'] / 2**20:.0f} MiB"
                what = title.format(**result["setting"])
                found.append([f"{what}: {shown}", *cells(low), *cells(wide), memory])
    return found


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """What README has between its markers. Errors: UsageError."""
    results = {name: read(folder / f"{name}.json") for name in PARTS}
    environment = results["cpu-infer"]["environment"]
    commits = dict.fromkeys(result["environment"]["commit"] for result in results.values())
    said = (
        f"{environment['device']}, {environment['threads']} cores, torch {environment['torch']}, "
        f"commit {', '.join(commits)}."
    )
    return {"cpu": f"{textwrap.fill(said, 118)}\n\n{table(HEAD, lines(results))}"}


def write(folder: Path) -> None:
    """Rewrites the table of README.md beside `folder`."""
    page = folder.parent / "README.md"
    page.write_text(fill(page.read_text(), tables()))
