"""The tables and pictures of docs/growth.md: how a forward and a run grow, and where memory ends.
Measured on the CPU by `univigu bench scale`; the rest are formulae. Every run writes the same
bytes."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench.cost_page import SIZES, STEPS, TEXT, fill, rows, table
from engine import memory, roofline
from engine.config import PRESETS
from engine.errors import UsageError
from engine.memory import DECODER_UNITS, DECODING, DENOISING, ENCODING, WAN, Job
from engine.roofline import H100, H200, REACHED, Ceilings, Reached

ROOT = Path(__file__).resolve().parent.parent
SCALE = ROOT / "bench" / "results" / "cpu-scale.json"
FPS = 16
LENGTHS = (81, 241, 481, 961, 1921, 4801)  # frames: 5 s to 300 s
MODELS = {"1.3B": PRESETS["wan2.1-1.3b"], "14B": PRESETS["wan2.1-14b"]}
HOLDS = {"H100": 80, "H200": 141}  # GB
OFFLOAD, FP8 = {"offload": "text_encoder"}, {"precision": "fp8"}
UNGUIDED, TILING = {"guided": False}, {"vae_tiling": True}
FLAGS = {  # of t2vt: what stands in the table, and fields of `Job`
    "none": {},
    "`--vae-tiling`": TILING,
    "`--offload text-encoder`": OFFLOAD,
    "`--precision fp8`": FP8,
    "`--guidance-scale 1`": UNGUIDED,
    "offload, fp8": OFFLOAD | FP8,
    "offload, guidance 1": OFFLOAD | UNGUIDED,
    "offload, tiling": OFFLOAD | TILING,
    "offload, tiling, fp8": OFFLOAD | TILING | FP8,
    "offload, tiling, fp8, guidance 1": OFFLOAD | TILING | FP8 | UNGUIDED,
    "offload, fp8, guidance 1": OFFLOAD | FP8 | UNGUIDED,
}
FROZEN = {"mode": "v2t", "video_cache": "frozen"}
CAPTION_FLAGS = {
    "none": {"mode": "v2t"},
    "`--offload text-encoder`": {"mode": "v2t"} | OFFLOAD,
    "offload, tiling": {"mode": "v2t"} | OFFLOAD | TILING,
    "offload, tiling, fp8": {"mode": "v2t"} | OFFLOAD | TILING | FP8,
    "`--video-cache frozen`": FROZEN,
    "frozen, offload": FROZEN | OFFLOAD,
    "frozen, offload, tiling, fp8": FROZEN | OFFLOAD | TILING | FP8,
}
LETTERS = {DENOISING: "D", DECODING: "V", ENCODING: "E"}
UNITS = ("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, 730)
YEARS = "years", 365.25 * 86400, math.inf


class Limit(NamedTuple):
    """frames: of the longest video that fits, 0 where one frame does not; stage: what needs most
    where it is 4 frames longer."""

    frames: int
    stage: str

    def __str__(self) -> str:
        return f"{length(self.frames)} {LETTERS.get(self.stage, 'W')}"


def length(frames: int) -> str:
    if frames < 5:
        return "1 frame" if frames else "nothing"
    return f"{frames / FPS:.1f} s"


def span(seconds: float) -> str:
    """In three digits."""
    name, unit, _ = next(u for u in (*UNITS, YEARS) if seconds < u[1] * u[2])
    value = seconds / unit
    digits = max(0, 2 - math.floor(math.log10(value)))
    return f"{value:,.{digits}f} {name}"


class Cost(NamedTuple):
    """Seconds: one forward of one sample, and one guided step. attention: joint attention's share
    of the step."""

    forward: float
    step: float
    attention: float


@cache
def cost(model: str, V: int, ceilings: Ceilings = H100, reached: Reached | None = REACHED) -> Cost:
    cfg, sizes = MODELS[model], {"video_rows": V, "text_rows": TEXT}
    forward = roofline.forward_parts(cfg, **sizes)
    step = roofline.step_parts(cfg, "t2vt", guided=True, **sizes)
    attention = [part for part in step if part.op == "joint_attention"]
    whole, share = (roofline.predict(p, ceilings, reached) for p in (step, attention))
    return Cost(roofline.predict(forward, ceilings, reached), whole, share / whole)


def job(size: str, frames: int = 81, **fields) -> Job:
    height, width = SIZES[size]
    made = Job(mode="t2vt", height=height, width=width, steps=STEPS, text_rows=TEXT)
    return replace(made, num_frames=frames, **fields)


@cache
def peaks(model: str, size: str, frames: int, flags: tuple = ()) -> dict[str, int]:
    """Bytes by stage. flags: items of fields of `Job`."""
    return memory.peaks(memory.estimate(MODELS[model], job(size, frames, **dict(flags))))


@cache
def limit(model: str, size: str, gigabytes: float, flags: tuple = (), but: str = "") -> Limit:
    """but: a stage that is not looked at."""

    def needed(frames: int) -> tuple[int, str]:
        found = peaks(model, size, frames, flags)
        return max((held, stage) for stage, held in found.items() if stage != but)

    low, high = -1, 1  # in fours: fits, does not
    while needed(4 * high + 1)[0] <= gigabytes * 1e9:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = needed(4 * middle + 1)[0] <= gigabytes * 1e9
        low, high = (middle, high) if fits else (low, middle)
    return Limit(max(0, 4 * low + 1), needed(4 * high + 1)[1])


def tiles_need_more(size: str) -> int:
    """Frames from which decoding in tiles takes more memory than decoding whole frames, or 0 where
    it always takes less."""
    for frames in range(1, LENGTHS[-1] + 1, 4):
        whole, tiles = (
            memory.vae_peak(job(size, frames, vae_tiling=tiling), WAN, DECODER_UNITS)
            for tiling in (False, True)
        )
        if tiles > whole and frames > 1:
            return frames
    return 0


def growth(low: tuple[float, float], high: tuple[float, float]) -> float:
    """The exponent of a power law through two points."""
    return math.log(high[1] / low[1]) / math.log(high[0] / low[0])


def measured() -> str:
    if not SCALE.is_file():
        return "Not measured yet."
    from bench import models, record

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
    parts = [textwrap.fill(said, 118), measured_table(along, record.duration, models), *pictures]
    return "\n\n".join(parts)


def measured_table(found: list[dict], duration, models) -> str:
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
    """What `engine.video.read_video` takes of a file, whatever the GPU."""
    from engine.video import MAX_DECODED_BYTES

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
    from bench import growth_pictures

    page = folder / "growth.md"
    page.write_text(fill(page.read_text(), tables()))
    return [page, *growth_pictures.write(folder)]
