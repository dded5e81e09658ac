"""The numbers of docs/cost.md: what joint denoising of video and text costs beside two diffusions.
Formulae alone: nothing is measured."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from bench import roofline
from bench.roofline import H100, REACHED, Ceilings, Reached, Work
from engine.config import PRESETS, ModelConfig
from engine.planning import memory

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
    """The cost of a whole run. floor, seconds: at the data sheet, and at the rates that kernels
    reach."""

    flops: int
    floor: float
    seconds: float


def rows(size: str, frames: int = FRAMES) -> int:
    height, width = SIZES[size]
    return ((frames - 1) // 4 + 1) * (height // 16) * (width // 16)


@cache
def evaluations(way: str, V: int, T: int) -> tuple[tuple[int, tuple[Work, ...]], ...]:
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
