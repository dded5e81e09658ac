"""The tables of docs/server.md: flags, and the results of `python -m bench serve` and of the
soak."""

import ast
import inspect
from pathlib import Path

from bench.harness.record import ROOT, read
from bench.pages import soak
from bench.pages.tables import fill, table

RESULT = ROOT / "bench/results/cpu-serve.json"


def flags() -> str:
    """The limits of a server with their defaults, as the command's help says them."""
    from engine.serve import Settings, settings

    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(settings)).body
        if isinstance(node, ast.ClassDef) and node.name == "Settings"
    )
    lines = []
    for field, said in zip(body, body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and field.target.id in Settings.RANGES:
            default = getattr(Settings(), field.target.id)
            words = " ".join(said.value.value.split())
            lines.append([f"`--{field.target.id.replace('_', '-')}`", str(default), words])
    return table(["flag", "default", "what"], lines)


def tables(path: Path = RESULT) -> dict[str, str]:
    """What the page has between its markers. Errors: UsageError."""
    result = read(path)
    made = result["environment"]
    said = f"The embedded model, {made['device']}, one thread, commit {made['commit']}."

    overhead = [
        [
            str(r["steps"]),
            *(f"{1000 * r[k]:.0f}" for k in ("call", "job")),
            f"{1000 * r['added']:.1f}",
        ]
        for r in result["videos"]
    ]
    head = ["steps of a clip", "call, ms", "job, ms", "added, ms (median of pairs)"]
    by = {(r["clients"], r["most together"]): r for r in result["captions"]}
    captions = []
    for clients in dict.fromkeys(row["clients"] for row in result["captions"]):
        alone, together = by[clients, 1], by[clients, 8]
        shown = [
            f"{r['captions_per_s']:.1f}; {1000 * r['median']:.0f} ms" for r in (alone, together)
        ]
        captions.append([str(clients), *shown])
    head_captions = [
        "clients at a time",
        "one by one: captions a second; median",
        "up to 8 together",
    ]
    return {
        "overhead": f"{table(head, overhead)}\n\n{said}",
        "captions": f"{table(head_captions, captions)}\n\n{said}",
        "flags": flags(),
        "soak": soak.rows(soak.read()),
    }


def write(folder: Path) -> None:
    """Rewrites the tables of folder/server.md."""
    page = folder / "server.md"
    page.write_text(fill(page.read_text(), tables()))
