"""The tables of times in docs/measured.md and README, from the committed results."""

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
COMPILED, PLAIN = "diffusers, torch.compile", "plain PyTorch"
SHORT = {COMPILED: "compiled diffusers", f"{PLAIN} loop": PLAIN}
FIRST_PAGE = [  # what, result, case, the other implementation, ours
    ("H200: a forward", "h200-infer", "forward", COMPILED, "engine"),
    ("CPU: a forward", "cpu-infer", "forward", COMPILED, "engine"),
    ("CPU: a video", "cpu-infer", "t2v, guided", COMPILED, "engine"),
    ("CPU: a caption", "cpu-caption", "v2t", PLAIN, "engine, video exact"),
    ("CPU: a training step", "cpu-train", "training step", f"{PLAIN} loop", "engine"),
]


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
    """What docs/measured.md has between its markers. Errors: UsageError."""
    results = {name: read(folder / f"{name}.json") for name in PARTS}
    environment = results["cpu-infer"]["environment"]
    commits = dict.fromkeys(result["environment"]["commit"] for result in results.values())
    said = (
        f"{environment['device']}, {environment['threads']} cores, torch {environment['torch']}, "
        f"commit {', '.join(commits)}."
    )
    return {"cpu": f"{textwrap.fill(said, 118)}\n\n{table(HEAD, lines(results))}"}


def first_page(folder: Path = RESULTS) -> dict[str, str]:
    """What README has between its markers: bf16, beside the fastest other implementation that ran.
    Errors: UsageError."""
    found = []
    for what, name, case, theirs, ours in FIRST_PAGE:
        times = {
            row["implementation"]: row
            for row in read(folder / f"{name}.json")["rows"]
            if row["case"] == case and row["dtype"] == "bfloat16"
        }
        pair = times[theirs], times[ours]
        shown = [duration(row["seconds"]) + percent(row, "seconds") for row in pair]
        speed = pair[0]["seconds"] / pair[1]["seconds"]
        what = f"[{what}](bench/results/{name}.md)"
        peer = f"{SHORT.get(theirs, theirs)}, {shown[0]}"
        found.append([what, peer, shown[1], f"{speed:.2f}x"])
    return {"speed": table(["", "beside", "engine", "speed"], found)}


def write(folder: Path) -> list[Path]:
    """Rewrites the table of folder/measured.md, and that of README.md beside the folder."""
    pages = {folder / "measured.md": tables(), folder.parent / "README.md": first_page()}
    for page, made in pages.items():
        page.write_text(fill(page.read_text(), made))
    return list(pages)
