"""The tables and pictures of docs/cost.md: what joint denoising of video and text costs beside two
diffusions. Formulae alone: nothing is measured, and every run writes the same bytes."""

import re
import textwrap
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from engine import memory, roofline
from engine.config import PRESETS, ModelConfig
from engine.errors import UsageError
from engine.roofline import H100, H200, REACHED, Ceilings, Part, Reached

CFG = PRESETS["wan2.1-1.3b"]
BLIND = replace(CFG, video_sees_text=False)  # video rows do not see text: their K and V stay true
STEPS, TEXT, FRAMES = 50, 256, 81
SIZES = {"480p": (480, 832), "720p": (720, 1280), "1080p": (1088, 1920), "4K": (2160, 3840)}
TEXTS = (64, 128, 256, 512, 1024, 2048, 4096)
CLIPS = (17, 41, 81, 161, 321, 961)  # frames: 1 s to 60 s at 16 a second
VIDEO, JOINT, AGAIN, ONCE, PROMPT = WAYS = (
    "video alone",
    "joint",
    "separate, video recomputed",
    "separate, video kept",
    "separate, prompt only",
)
COLOURS = dict(zip(WAYS, ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7"), strict=True))
MARKS = dict(zip(WAYS, "xosD^", strict=True))
HEAD = "text head and draw"
GROUPS = {  # what the ops of a step are shown as; the rest is "row operations"
    "joint_attention": "joint attention",
    "routed_ffn": "feed-forward experts",
    "linear": "projections",
    "cross_attention": "cross-attention",
    "vocab_sample": HEAD,
}
OTHER, PASS = "row operations, embedding, video head", "one pass over the video"
PREDICTED = "predicted, H100, published rates"


class Cost(NamedTuple):
    """Of a whole run. floor, seconds: at the data sheet, and at the rates that kernels reach."""

    flops: int
    floor: float
    seconds: float


def rows(size: str, frames: int = FRAMES) -> int:
    height, width = SIZES[size]
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)


@cache
def evaluations(way: str, V: int, T: int) -> tuple[tuple[int, tuple[Part, ...]], ...]:
    """(how often, its parts) of every kind of evaluation in a run of V video and T text rows."""

    def kind(count: int, mode: str, cfg: ModelConfig = CFG, V: int = V, T: int = T, **options):
        parts = roofline.step_parts(cfg, mode, video_rows=V, text_rows=T, **options)
        return count, tuple(parts)

    if way == JOINT:
        return (kind(STEPS, "t2vt", guided=True),)
    caption = {
        VIDEO: lambda: (),
        AGAIN: lambda: (kind(STEPS, "v2t"),),
        ONCE: lambda: (kind(1, "v2t", BLIND), kind(STEPS - 1, "v2t", BLIND, cached=True)),
        PROMPT: lambda: (kind(STEPS, "v2t", V=0),),
    }
    return (kind(STEPS, "t2v", T=0, guided=True), *caption[way]())


def time(way: str, V: int, T: int, ceilings: Ceilings = H100, reached: Reached | None = REACHED):
    runs = evaluations(way, V, T)
    return sum(n * roofline.predict(parts, ceilings, reached) for n, parts in runs)


@cache
def cost(way: str, V: int, T: int = TEXT) -> Cost:
    flops = sum(n * part.flops for n, parts in evaluations(way, V, T) for part in parts)
    return Cost(flops, time(way, V, T, reached=None), time(way, V, T))


def over_video(way: str, V: int, T: int, figure: str = "seconds") -> float:
    """What the text adds, as a share of the video alone."""
    return getattr(cost(way, V, T), figure) / getattr(cost(VIDEO, V, T), figure) - 1


def crossing(V: int, figure: str) -> int:
    """The least number of text rows at which joint costs more than two diffusions of which the
    second keeps the video's K and V."""
    low, high = 1, 2**20  # costs less; costs more
    while high - low > 1:
        T = (low + high) // 2
        more = getattr(cost(JOINT, V, T), figure) > getattr(cost(ONCE, V, T), figure)
        low, high = (low, T) if more else (T, high)
    return high


def by_group(way: str, V: int, T: int) -> dict[str, float]:
    """Predicted seconds of a run. Of a caption that keeps the video, its first evaluation is a
    group of its own."""
    found = dict.fromkeys([*GROUPS.values(), OTHER, PASS], 0.0)
    for n, parts in evaluations(way, V, T):
        for part in parts:
            group = PASS if way == ONCE and n == 1 else GROUPS.get(part.op, OTHER)
            found[group] += n * roofline.seconds(part, H100, REACHED)
    return found


class Weights(NamedTuple):
    """Parameters: bf16 ones, and those that stay fp32."""

    narrow: int
    wide: int

    @property
    def bytes(self) -> int:
        return 2 * self.narrow + 4 * self.wide


def networks(cfg: ModelConfig) -> dict[str, Weights]:
    """The joint network; Wan, which is its video half; a captioner that reads video, which has no
    video head; one that reads the prompt alone, which has no video half."""
    D, F, N, R, count = cfg.dim, cfg.ffn_dim, cfg.vocab_rows, cfg.layers, memory.parameters(cfg)
    expert = count.experts // 2 + R * (F + D)
    time = (count.wide - R * 12 * D - 5 * D) // 2
    whole = Weights(count.narrow + count.experts, count.wide)
    text = Weights(expert + 2 * N * D + N, time + 3 * D)
    head = Weights(64 * D + 64, 2 * D)
    video = Weights(expert + 65 * D + head.narrow, time + head.wide)
    return {
        "joint": whole,
        "Wan": Weights(whole.narrow - text.narrow, whole.wide - text.wide),
        "captioner": Weights(whole.narrow - head.narrow, whole.wide - head.wide),
        "text alone": Weights(whole.narrow - video.narrow, whole.wide - video.wide),
    }


def held(way: str, size: str, frames: int = FRAMES) -> dict[str, int]:
    """Bytes on the device in the stage of the run that holds most, with all its networks there. The
    text encoder and the VAE, which all ways share, are left out."""
    height, width = SIZES[size]
    job = memory.Job(num_frames=frames, height=height, width=width, steps=STEPS)
    network = networks(CFG)
    resident = {JOINT: ["joint"], VIDEO: ["Wan"], PROMPT: ["Wan", "text alone"]}
    names = resident.get(way, ["Wan", "captioner"])

    def stage(job: memory.Job) -> dict[str, int]:
        return {
            "kept video K and V": memory.cached_kv(CFG, job),
            "activations of a block": memory.activations(CFG, job),
            "prompt K and V, modulations, latents": memory.context_kv(CFG, job)
            + memory.modulations(CFG, job)
            + memory.latents(job),
        }

    if way == JOINT:
        largest = stage(replace(job, mode="t2vt", text_rows=TEXT))
    else:
        stages = [stage(replace(job, mode="t2v", text_rows=0))]
        if way in (AGAIN, ONCE):
            kept = "frozen" if way == ONCE else "exact"
            stages.append(stage(replace(job, mode="v2t", text_rows=TEXT, video_cache=kept)))
        largest = max(stages, key=lambda parts: sum(parts.values()))
    return {"weights": sum(network[name].bytes for name in names), **largest}


def table(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ruler, *lines])


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def percent(share: float) -> str:
    if share < 5e-5:
        return "under +0.01%"
    return f"+{100 * share:.2f}%" if share < 0.1 else f"+{100 * share:.1f}%"


def answer() -> str:
    V = rows("480p")
    video, joint = cost(VIDEO, V), cost(JOINT, V)
    time = {way: percent(over_video(way, V, TEXT)).lstrip("+") for way in WAYS}
    gigabytes = {way: sum(held(way, "480p").values()) / 1e9 for way in WAYS}
    lines = (
        f"All of it is predicted. 480p, {FRAMES} frames, {TEXT} text rows and {STEPS} guided steps "
        f"take {joint.flops / 1e15:.1f} PFLOP jointly and {joint.seconds:.1f} s on an H100 "
        f"({joint.floor:.1f} s at the roofline). The video alone takes {video.flops / 1e15:.1f} "
        f"PFLOP and {video.seconds:.1f} s, so the text adds {time[JOINT]} of time.",
        f"A second diffusion that writes the text afterwards adds {time[AGAIN]} where it computes "
        f"the video's rows in every step, {time[ONCE]} where it computes them once and keeps their "
        f"keys and values, and {time[PROMPT]} where it never sees the video.",
        f"Joint is cheaper than the one that keeps the video up to about {crossing(V, 'seconds')} "
        f"text rows at 480p and {crossing(rows('4K'), 'seconds')} at 4K, and dearer beyond. It "
        f"holds {gigabytes[JOINT]:.1f} GB; two networks hold {gigabytes[AGAIN]:.1f} GB, or "
        f"{gigabytes[ONCE]:.1f} GB with the video kept.",
    )
    return "\n\n".join(textwrap.fill(line, 118) for line in lines)


def ways_table() -> str:
    V, lines = rows("480p"), []
    for way in WAYS:
        found, more = cost(way, V), [percent(over_video(way, V, TEXT, f)) for f in Cost._fields]
        more = [f" ({share})" if way != VIDEO else "" for share in more]
        times = found.floor, found.seconds
        cells = [f"{found.flops / 1e15:.2f}{more[0]}", *map("{:.1f}{}".format, times, more[1:])]
        lines.append([way, *cells, f"{time(way, V, TEXT, H200):.1f}"])
    h100 = ["s, H100, roofline", "s, H100, published rates"]
    return table(["way", "PFLOP", *h100, "s, H200, published rates"], lines)


def texts_table(figure: str) -> str:
    V = rows("480p")
    lines = [
        [way, *(percent(over_video(way, V, T, figure)) for T in TEXTS)]
        for way in WAYS
        if way != VIDEO
    ]
    return table(["text rows", *map(str, TEXTS)], lines)


def sizes_table(sizes: list[tuple[str, int]]) -> str:
    """sizes: (name, video rows)."""
    lines = []
    for name, V in sizes:
        cells = [name, f"{V:,}", duration(cost(VIDEO, V).floor), duration(cost(VIDEO, V).seconds)]
        lines.append(cells + [percent(over_video(way, V, TEXT)) for way in WAYS[1:]])
    head = ["", "video rows", "video alone, roofline", "video alone, published rates"]
    return table([*head, *WAYS[1:]], lines)


def crossings_table() -> str:
    cases = [(size, FRAMES) for size in SIZES] + [
        ("480p", clip) for clip in CLIPS if clip != FRAMES
    ]
    lines = []
    for size, frames in cases:
        V = rows(size, frames)
        found = [str(crossing(V, figure)) for figure in ("flops", "floor", "seconds")]
        lines.append([f"{size}, {frames} frames", f"{V:,}", *found, f"{V / 3 / STEPS:.0f}"])
    head = ["", "video rows", "by FLOPs", "by time, roofline", "by time, published rates"]
    return table([*head, "V / 3N"], lines)


def terms_table() -> str:
    V, lines = rows("480p"), []
    cases = [(way, T) for T in (TEXT, TEXTS[-1]) for way in (JOINT, ONCE)]
    video = by_group(VIDEO, V, 0)
    found = [by_group(way, V, T) for way, T in cases]
    for group in video:
        lines.append([group, *(f"{f[group] - video[group]:.2f}" for f in found)])
    lines.append(["in all", *(f"{sum(f.values()) - sum(video.values()):.2f}" for f in found)])
    return table(["seconds", *(f"{way}, T = {T}" for way, T in cases)], lines)


def memory_table() -> str:
    lines = [
        [way, f"{held(way, '480p')['weights'] / 1e9:.1f}"]
        + [f"{sum(held(way, size).values()) / 1e9:.1f}" for size in SIZES]
        for way in WAYS
    ]
    return table(["GB", "weights", *(f"all, {size}" for size in SIZES)], lines)


def tables() -> dict[str, str]:
    """What docs/cost.md has between its markers, by name."""
    return {
        "answer": answer(),
        "ways": ways_table(),
        "text, FLOPs": texts_table("flops"),
        "text, time": texts_table("seconds"),
        "resolution": sizes_table([(size, rows(size)) for size in SIZES]),
        "frames": sizes_table([(f"{clip} frames", rows("480p", clip)) for clip in CLIPS]),
        "crossings": crossings_table(),
        "terms": terms_table(),
        "memory": memory_table(),
    }


MARKED = re.compile(r"(<!-- generated: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table between its markers. Errors: UsageError where markers and tables are
    not the same names, once each."""
    names = [name for _, name, _ in MARKED.findall(page)]
    marks = page.count("<!-- generated:"), page.count("<!-- end -->")
    if sorted(names) != sorted(tables) or marks != (len(names), len(names)):
        raise UsageError(
            f"cost page: markers must be of {', '.join(tables)}, each once and ended; "
            f"got {', '.join(names)}. Mend the page."
        )
    return MARKED.sub(lambda m: f"{m[1]}{tables[m[2]]}\n{m[3]}", page)


def write(folder: Path) -> None:
    """Rewrites the tables of folder/cost.md, and folder/cost-*.png."""
    from bench import cost_pictures

    page = folder / "cost.md"
    page.write_text(fill(page.read_text(), tables()))
    cost_pictures.write(folder)
