"""docs/growth.md: its tables, and with `write` its pictures. What `univigu bench scale` measured on
a CPU is read from the committed result. Every run writes the same bytes."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

from bench.harness import models, record
from bench.harness.record import duration
from bench.pages.cost_numbers import SIZES, STEPS, rows
from bench.pages.growth_numbers import (
    CAPTION_FLAGS,
    FLAGS,
    FPS,
    HOLDS,
    LENGTHS,
    MODELS,
    OFFLOAD,
    TILING,
    cost,
    growth,
    length,
    limit,
    span,
    tiles_need_more,
)
from bench.pages.tables import fill, table
from bench.roofline import H100, H200
from engine.errors import UsageError
from engine.media.video import MAX_DECODED_BYTES
from engine.planning.memory import DECODING, DENOISING

SCALE = record.ROOT / "bench" / "results" / "cpu-scale.json"


def measured() -> str:
    if not SCALE.is_file():
        return "Not measured yet."
    found = record.read(SCALE)
    environment, setting = found["environment"], found["setting"]
    if setting["device"] != "cpu":
        raise UsageError(
            f"bench: {SCALE.name} must be of a CPU; got device {setting['device']!r}. "
            f"Run univigu bench scale --device cpu --output-path bench/results/{SCALE.stem}."
        )
    cfg = models.Setting(preset=setting["preset"]).cfg
    changed = " with changes" if environment["changed"] else ""
    said = (
        f"{environment['device']}, {environment['threads']} threads, commit "
        f"{environment['commit']}{changed}. One forward in bf16 of the benchmarks' small model: "
        f"{cfg.layers} layers of width {cfg.dim}, {setting['text_rows']} text rows, "
        f"{setting['context_rows']} prompt rows."
    )
    pictures = [
        f"![One forward along {along}](../bench/results/{SCALE.stem}-{along}.png)"
        for along in dict.fromkeys(row["along"] for row in found["rows"])
    ]
    along = [row for row in found["rows"] if row["along"] == "rows"]
    parts = [textwrap.fill(said, 118), measured_table(along), *pictures]
    return "\n\n".join(parts)


def measured_table(found: list[dict]) -> str:
    ours = [row for row in found if row["implementation"] == models.ENGINE]
    plain = {row["x"]: row for row in found if row["implementation"] == models.ENGINE_PLAIN}
    lines, before = [], None
    for row in sorted(ours, key=lambda row: row["x"]):
        x, seconds, predicted = row["x"], row["seconds"], row["predicted"]
        ends = [row["low"], row["high"]]
        interval = "one run" if None in ends else " to ".join(map(duration, ends))
        cells = [f"{x:,}", duration(seconds), interval]
        cells += [duration(predicted), f"{predicted / seconds:.2f}"] if predicted else ["", ""]
        cells.append(f"{growth(before, (x, seconds)):.2f}" if before else "")
        cells.append(duration(plain[x]["seconds"]) if x in plain else "not run")
        lines.append(cells)
        before = x, seconds
    head = ["video rows", "engine", "95% interval", "predicted", "predicted / measured"]
    return table([*head, "exponent", "plain PyTorch"], lines)


def cases() -> Iterable[tuple[str, int]]:
    return ((size, frames) for size in SIZES for frames in LENGTHS)


def time_table() -> str:
    lines = []
    for size, frames in cases():
        V = rows(size, frames)
        floor, best, h200 = cost("1.3B", V, H100, None), cost("1.3B", V), cost("1.3B", V, H200)
        runs = floor, best, h200, cost("14B", V)
        line = [f"{size}, {frames // FPS} s", f"{V:,}", span(floor.forward), span(best.forward)]
        lines.append([*line, *(span(STEPS * c.step) for c in runs), f"{best.attention:.0%}"])
    head = ["", "video rows", "forward, roofline", "forward", "run, roofline", "run", "run, H200"]
    return table([*head, "run, 14B", "attention"], lines)


def limits_table() -> str:
    lines = []
    for model in MODELS:
        for gpu, gigabytes in HOLDS.items():
            for size in SIZES:
                found = limit(model, size, gigabytes)
                line = [f"{model}, {gpu}, {size}", length(found.frames), str(found.frames)]
                V = rows(size, found.frames) if found.frames else 0
                run = cost(model, V, {"H100": H100, "H200": H200}[gpu]).step * STEPS if V else 0
                lines.append([*line, f"{V:,}", found.stage, span(run) if V else ""])
    return table(["", "longest", "frames", "video rows", "what ends it", "50 steps of it"], lines)


def flags_table(model: str, flags: dict[str, dict]) -> str:
    lines = []
    for name, fields in flags.items():
        found = [
            str(limit(model, size, gigabytes, tuple(fields.items())))
            for gigabytes in HOLDS.values()
            for size in SIZES
        ]
        lines.append([name, *found])
    heads = [f"{gpu}, {size}" for gpu in HOLDS for size in SIZES]
    return table(["flags", *heads], lines)


def file_limit() -> list[str]:
    """What `engine.media.read_video` takes of a file, whatever the GPU."""
    return [length(MAX_DECODED_BYTES // (y * x * 3)) for y, x in SIZES.values()]


def decoding_table() -> str:
    lines = []
    for model in MODELS:
        for name, fields in (("whole frames", OFFLOAD), ("tiles", OFFLOAD | TILING)):
            found = [
                length(limit(model, size, gigabytes, tuple(fields.items()), DENOISING).frames)
                for gigabytes in HOLDS.values()
                for size in SIZES
            ]
            lines.append([f"{model}, {name}", *found])
    heads = [f"{gpu}, {size}" for gpu in HOLDS for size in SIZES]
    return table(["", *heads], lines)


def answer() -> str:
    short, long = (cost("1.3B", rows("480p", n)).step for n in (81, 961))
    wall = {(model, size): limit(model, size, HOLDS["H100"]) for model in MODELS for size in SIZES}
    V = rows("480p", wall["1.3B", "480p"].frames)
    ended = [f"{size} with the {m}" for (m, size), end in wall.items() if end.stage == DECODING]
    before = [length(wall[model, "480p"].frames) for model in MODELS]
    after = [length(limit(m, "480p", HOLDS["H100"], tuple(OFFLOAD.items())).frames) for m in MODELS]
    whole, tiles = wall["1.3B", "4K"], limit("1.3B", "4K", HOLDS["H100"], tuple(TILING.items()))
    lines = (
        f"Time ends first. A guided step of the 1.3B at 480p is predicted to take {span(short)} on "
        f"an H100 for 5 s of video, and {span(long)} for 60 s: 12 times the video, "
        f"{long / short:.0f} times the time.",
        f"Memory ends next. Without flags, 80 GB hold about {V / 1e3:,.0f},000 video rows of the "
        f"1.3B: {before[0]} at 480p, or {length(wall['1.3B', '1080p'].frames)} at 1080p. 50 steps "
        f"over them take about {STEPS * cost('1.3B', V).step / 3600:.1f} hours. Denoising ends "
        f"there, by the activations of one block. The VAE ends first at {', '.join(ended)}.",
        "Take `--offload text-encoder` first: it changes no number. At 480p it moves the wall from "
        f"{before[0]} to {after[0]} with the 1.3B, and from {before[1]} to {after[1]} with the "
        f"14B. Take `--vae-tiling` where the VAE ends it: at 4K from {length(whole.frames)} to "
        f"{length(tiles.frames)} with the 1.3B. Leave it out of long videos: from about "
        f"{min(map(tiles_need_more, SIZES)) / FPS:.0f} s on, tiles need more memory than whole "
        "frames.",
    )
    return "\n\n".join(textwrap.fill(line, 118, break_on_hyphens=False) for line in lines)


def tables() -> dict[str, str]:
    """What docs/growth.md has between its markers, by name."""
    return {
        "answer": answer(),
        "measured": measured(),
        "time": time_table(),
        "limits": limits_table(),
        "flags, 1.3B": flags_table("1.3B", FLAGS),
        "flags, 14B": flags_table("14B", FLAGS),
        "captions, 1.3B": flags_table("1.3B", CAPTION_FLAGS),
        "captions, 14B": flags_table("14B", CAPTION_FLAGS),
        "files": table(["", *SIZES], [["longest file", *file_limit()]]),
        "decoding": decoding_table(),
        "tiles": table(
            ["", *SIZES],
            [["tiles need more from", *(f"{tiles_need_more(s) / FPS:.1f} s" for s in SIZES)]],
        ),
    }


def write(folder: Path) -> list[Path]:
    """Rewrites the tables of folder/growth.md, and folder/growth-*.png; -> their paths."""
    from bench.pages import growth_pictures  # needs matplotlib

    page = folder / "growth.md"
    page.write_text(fill(page.read_text(), tables()))
    return [page, *growth_pictures.write(folder)]
