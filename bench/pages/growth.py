"""docs/growth.md: its tables, and with `write` its pictures. What `univigu bench scale` measured on
a CPU is read from the committed result. Every run writes the same bytes."""

import textwrap
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
    SHOWN,
    TILING,
    cost,
    growth,
    length,
    limit,
    span,
    tiles_need_more,
)
from bench.pages.tables import fill, table
from bench.roofline import H100
from engine.errors import UsageError
from engine.media.video import MAX_DECODED_BYTES
from engine.planning.memory import DECODING

SCALE = record.ROOT / "bench" / "results" / "cpu-scale.json"


def measured() -> str:
    if not SCALE.is_file():
        return "Not measured yet."
    found = record.read(SCALE)

    environment = found["environment"]
    setting = found["setting"]
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

    along = [row for row in found["rows"] if row["along"] == "rows"]
    return f"{textwrap.fill(said, 118)}\n\n{measured_table(along)}"


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


def time_table() -> str:
    lines = []
    for size in SHOWN:
        for frames in LENGTHS[:4]:
            V = rows(size, frames)
            floor, best, large = cost("1.3B", V, H100, None), cost("1.3B", V), cost("14B", V)
            line = [f"{size}, {frames // FPS} s", f"{V:,}"]
            runs = (span(STEPS * c.step) for c in (floor, best, large))
            lines.append([*line, span(best.forward), *runs, f"{best.attention:.0%}"])
    head = ["", "video rows", "forward", "run, roofline", "run", "run, 14B", "attention"]
    return table(head, lines)


def limits_table() -> str:
    lines = []
    for model in MODELS:
        for name, fields in (FLAGS | CAPTION_FLAGS).items():
            flags = tuple(fields.items())
            found = [
                str(limit(model, size, gigabytes, flags))
                for gigabytes in HOLDS.values()
                for size in SHOWN
            ]
            lines.append([f"{model}, {name}", *found])
    heads = [f"{gpu}, {size}" for gpu in HOLDS for size in SHOWN]
    return table(["", *heads], lines)


def file_limit() -> str:
    """The longest file that `engine.media.read_video` takes, on any GPU."""
    found = [f"{length(MAX_DECODED_BYTES // (y * x * 3))} at {s}" for s, (y, x) in SIZES.items()]
    return ", ".join(found[:-1]) + f" and {found[-1]}."


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
        "files": file_limit(),
    }


def write(folder: Path) -> list[Path]:
    """Rewrites the tables of folder/growth.md, and folder/growth-*.png; -> their paths."""
    from bench.pages import growth_pictures  # needs matplotlib

    page = folder / "growth.md"
    page.write_text(fill(page.read_text(), tables()))
    return [page, *growth_pictures.write(folder)]
