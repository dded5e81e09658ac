"""The numbers of docs/growth.md that are formulae: how a run grows, and where memory ends."""

import math
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from bench import roofline
from bench.pages.cost_numbers import SIZES, STEPS, TEXT
from bench.roofline import H100, REACHED, Ceilings, Reached
from engine.config import PRESETS
from engine.planning import Job, memory
from engine.planning.memory import DECODER_UNITS, DECODING, DENOISING, ENCODING, WAN

FPS = 16
LENGTHS = (81, 241, 481, 961, 1921, 4801)  # frames: 5 s to 300 s
MODELS = {"1.3B": PRESETS["wan2.1-1.3b"], "14B": PRESETS["wan2.1-14b"]}
HOLDS = {"H100": 80, "H200": 141}  # GB
SHOWN = ("480p", "720p", "1080p")
OFFLOAD, FP8 = {"offload": "text_encoder"}, {"precision": "fp8"}
UNGUIDED, TILING = {"guided": False}, {"vae_tiling": True}
FLAGS = {  # of t2vt: what stands in the table, and fields of `Job`
    "none": {},
    "`--offload text-encoder`": OFFLOAD,
    "`--vae-tiling`": TILING,
    "`--precision fp8`": FP8,
    "`--guidance-scale 1`": UNGUIDED,
    "offload, fp8": OFFLOAD | FP8,
}
CAPTION = {"mode": "v2t"}
FROZEN = CAPTION | {"video_cache": "frozen"}
CAPTION_FLAGS = {
    "caption": CAPTION,
    "caption, offload": CAPTION | OFFLOAD,
    "caption, frozen": FROZEN,
    "caption, frozen, offload": FROZEN | OFFLOAD,
}
LETTERS = {DENOISING: "D", DECODING: "V", ENCODING: "E"}
UNITS = ("s", 1, 120), ("min", 60, 120), ("h", 3600, 48), ("days", 86400, math.inf)


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
    name, unit, _ = next(u for u in UNITS if seconds < u[1] * u[2])
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
def limit(model: str, size: str, gigabytes: float, flags: tuple = ()) -> Limit:
    def needed(frames: int) -> tuple[int, str]:
        found = peaks(model, size, frames, flags)
        return max((held, stage) for stage, held in found.items())

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
