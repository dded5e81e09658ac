"""What a run needs of a device's memory: by part before it starts, and, when it did not fit, the
stage and the flags that save most there.

Bytes throughout, 1 GB = 10^9 bytes. Weights, context K and V, modulations and the K/V cache are
exact. Activations and the VAE are formulae over tensors that torch holds at a time; workspaces of
libraries, the CUDA context (about 0.5 GB) and fragmentation come on top. No tensor library is
imported here.

Legend: B samples, L joint rows (video and text), D width, C context rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar, NamedTuple

from engine.config import (
    CHANNELS,
    CLIPS,
    COUNT,
    MAX_SIDE,
    MOST_FRAMES,
    MOST_ROWS,
    ModelConfig,
    Range,
    check_fields,
)
from engine.errors import OutOfMemory

ITEMSIZE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOADING, TEXT, ENCODING, DENOISING, DECODING = STAGES = (
    "loading",
    "text encoding",
    "VAE encoding",
    "denoising",
    "VAE decoding",
)

# Tensors alive at a time in the VAE, counted on meta tensors, in units of width x 4 frames x height
# x width: the residual block at full size, what its convolutions see of the frames before, and two
# kept frames for every convolution. One frame alone needs 3/8.
DECODER_UNITS, ENCODER_UNITS = 11.7, 8.2
TILE, TILE_STRIDE = 256, 192  # pixels, as enable_tiling() of diffusers sets


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run. batch: videos; guided: each is evaluated twice; steps: of the longer grid; dtype and
    vae_dtype: torch's, or their names; device: "cpu" or another. text_rows, context_rows: at most.
    noise_count: fresh noises that solver lcm adds to a video, one less than its steps. Errors:
    UsageError."""

    RANGES: ClassVar = {
        "num_frames": Range(1, MOST_FRAMES),
        **dict.fromkeys(("height", "width"), Range(1, MAX_SIDE)),
        **dict.fromkeys(("batch", "steps"), CLIPS),
        **dict.fromkeys(("text_rows", "context_rows"), Range(0, MOST_ROWS)),
        "noise_count": Range(0, CLIPS.high),
        "video_cache": COUNT,
    }
    CHOICES: ClassVar = {
        "mode": ("t2v", "t2vt", "v2t"),
        **dict.fromkeys(("dtype", "vae_dtype"), tuple(ITEMSIZE)),
        "precision": ("bf16", "fp8"),
        "offload": ("none", "text_encoder"),
        "video_cache": ("exact", "frozen"),
    }

    mode: str = "t2v"
    num_frames: int = 81
    height: int = 480
    width: int = 832
    batch: int = 1
    guided: bool = True
    steps: int = 50
    text_rows: int = 256
    context_rows: int = 512
    dtype: str = "bfloat16"
    precision: str = "bf16"
    device: str = "cuda"
    video_cache: str | int = "exact"
    noise_count: int = 0
    offload: str = "none"
    vae_tiling: bool = False
    vae_dtype: str = "float32"

    def __post_init__(self):
        for name in ("dtype", "vae_dtype"):
            object.__setattr__(self, name, str(getattr(self, name)).removeprefix("torch."))
        check_fields(self, "memory")

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def vae_itemsize(self) -> int:
        return ITEMSIZE[self.vae_dtype]

    @property
    def latent(self) -> tuple[int, int, int]:
        return (self.num_frames - 1) // 4 + 1, self.height // 8, self.width // 8

    @property
    def video_rows(self) -> int:
        return prod(self.latent) // 4

    @property
    def rows(self) -> int:
        return self.video_rows + self.text_rows

    @property
    def copies(self) -> int:
        """Samples that the network sees."""
        return self.batch * (2 if self.guided and self.mode != "v2t" else 1)


class Codecs(NamedTuple):
    """Sizes of the models beside the transformer; the defaults are Wan2.1's.

    text_encoder: parameters of the umT5 encoder, in the run's dtype.
    vae: parameters of the VAE.
    vae_width: channels of its layers at full size.
    vae_patch: pixels a side that it folds first.
    """

    text_encoder: int = 5_680_910_336
    vae: int = 126_892_531
    vae_width: int = 96
    vae_patch: int = 1


WAN = Codecs()


class Held(NamedTuple):
    """Bytes that are held during `stages`."""

    name: str
    bytes: int
    stages: tuple[str, ...]


class Parameters(NamedTuple):
    """Counts: `wide` stay fp32, `experts` are the feed-forward matrices, `narrow` is the rest."""

    narrow: int
    experts: int
    expert_rows: int
    wide: int


def parameters(cfg: ModelConfig) -> Parameters:
    """Exact. expert_rows: output channels of the feed-forward matrices, one fp8 scale each."""
    D, F, N = cfg.dim, cfg.ffn_dim, cfg.vocab_rows
    head = D if cfg.text_flow == "embedding" else N
    context = cfg.text_dim * D + D + D * D + D
    attention = 8 * D * D + 8 * D  # q, k, v and out, of the joint rows and of the context
    block = attention + 2 * (F + D)  # and the biases of two feed-forward layers
    narrow = 64 * D + D + N * D + context + cfg.layers * block + 64 * D + 64 + head * D + head
    time = cfg.freq_dim * D + D + D * D + D + 6 * D * D + 6 * D
    wide = 2 * time + cfg.layers * (6 + 4 + 2) * D + 4 * D + D
    return Parameters(narrow, cfg.layers * 4 * D * F, cfg.layers * 2 * (F + D), wide)


def weights(cfg: ModelConfig, job: Job) -> int:
    """Exact. fp8: a byte for each weight of the feed-forward layers, and an fp32 scale for each
    output channel."""
    size, count = job.itemsize, parameters(cfg)
    fp8 = job.precision == "fp8"
    experts = count.experts + 4 * count.expert_rows if fp8 else count.experts * size
    return count.narrow * size + experts + count.wide * max(4, size)


def activations(cfg: ModelConfig, job: Job) -> int:
    """The largest set of tensors alive at a time in one block, with fused operations.

    In attention: residual stream (fp32), its norm, qkv, rotated q and k, the output and its
    projection. In the feed-forward layer: the residual stream before and after attention, both
    norms, attention's output, the hidden rows and the result. By the events of torch's allocator
    on a CPU, from 1000 rows on: 0.7 to 1.2 times this with the compiled kernels, which keep hidden
    rows in the cache; 1.0 to 1.4 times in plain PyTorch with SDPA; `reference` attention stores its
    scores too, 4 bytes for every pair of rows and head.
    """
    size, wide = job.itemsize, max(4, job.itemsize)
    elements = job.copies * job.rows * cfg.dim
    hidden = job.copies * job.rows * cfg.ffn_dim
    fp8 = job.precision == "fp8"
    attention = elements * (wide + 8 * size)
    hidden_bytes = hidden * (1 if fp8 else size)
    feed_forward = elements * (2 * wide + (3 * size + 1 if fp8 else 4 * size)) + hidden_bytes
    after = elements * (3 * wide + (4 * size + 1 if fp8 else 5 * size))
    return max(attention, feed_forward, after)


def context_kv(cfg: ModelConfig, job: Job) -> int:
    """K and V of all layers for prompts as long as they may be; rows after a prompt's end are left
    out when it is shorter."""
    rows = job.copies * job.context_rows
    return cfg.layers * 2 * rows * cfg.dim * job.itemsize


def modulations(cfg: ModelConfig, job: Job) -> int:
    """fp32 shift, scale and gate of two sub-layers and two modalities, and the heads' norms, for
    every step."""
    return job.steps * (cfg.layers * 12 + 4) * cfg.dim * 4


def cached_kv(cfg: ModelConfig, job: Job) -> int:
    """Self-attention K and V of all layers and joint rows, which captioning keeps between steps."""
    if job.mode != "v2t" or job.video_cache in ("exact", 1):
        return 0
    return cfg.layers * 2 * job.batch * job.rows * cfg.dim * job.itemsize


def latents(job: Job) -> int:
    """fp32: the solver's state before and after a step, velocities, and what went into the step;
    again, where a capture puts the state back; and what the solver adds later."""
    tensors = 16 + job.noise_count
    return 4 * tensors * job.batch * CHANNELS * prod(job.latent)


def vae_peak(job: Job, codecs: Codecs, units: float) -> int:
    """Tensors alive at a time in the VAE, whose frames go through in chunks, and what is held of
    the whole clip beside them: its latents; with tiling all pixels; decoded on a CPU, all bytes.

    units: DECODER_UNITS or ENCODER_UNITS. Within 15% of the count on meta tensors for Wan2.1's VAE,
    but for the encoding of one frame, of which it says 22% more.
    """
    decoding, height, width = units == DECODER_UNITS, job.height, job.width
    pixels = 3 * job.batch * job.num_frames * height * width
    kept = 4 * job.batch * CHANNELS * prod(job.latent) * 3
    kept += 2 * pixels if decoding and job.device == "cpu" else 0
    joined = 0

    if job.vae_tiling and max(height, width) > TILE:
        video = job.vae_itemsize * pixels
        kept += int(video * _covered(height) * _covered(width)) if decoding else video
        joined = 2 * video if decoding else video  # rows of tiles, and all of them; or chunks
        height, width = min(height, TILE), min(width, TILE)

    area = height * width // codecs.vae_patch**2
    frames = 4 if job.num_frames > 1 else 1.5
    elements = units * job.batch * codecs.vae_width * frames * area
    return kept + max(int(elements * job.vae_itemsize), joined)


def _covered(size: int) -> float:
    """Pixels in all tiles of a side over its pixels."""
    return sum(min(TILE, size - start) for start in range(0, size, TILE_STRIDE)) / size


def estimate(cfg: ModelConfig, job: Job, codecs: Codecs = WAN) -> list[Held]:
    """What a run holds on its device, in its stages. offload="text_encoder": the encoder is on the
    device while it encodes; on a CPU there is no other place."""
    text = codecs.text_encoder * job.itemsize
    read = job.mode == "v2t"
    written = not read
    stages = tuple(
        stage
        for stage, used in zip(STAGES, (True, written, read, True, written), strict=True)
        if used
    )

    kept = stages
    if job.offload != "none" and job.device != "cpu":
        kept = tuple(stage for stage in stages if stage == TEXT)

    parts = [
        Held("transformer weights", weights(cfg, job), stages),
        Held("text encoder weights", text, kept),
        Held("VAE weights", job.vae_itemsize * codecs.vae, stages),
        Held("VAE encoding", vae_peak(job, codecs, ENCODER_UNITS), (ENCODING,)),
        Held("context K and V", context_kv(cfg, job), (DENOISING,)),
        Held(f"modulations of {job.steps} steps", modulations(cfg, job), (DENOISING,)),
        Held("activations of a block", activations(cfg, job), (DENOISING,)),
        Held("cached K and V", cached_kv(cfg, job), (DENOISING,)),
        Held("latents and solver state", latents(job), (DENOISING,)),
        Held("VAE decoding", vae_peak(job, codecs, DECODER_UNITS), (DECODING,)),
    ]
    return [part for part in parts if part.bytes and set(part.stages) & set(stages)]


def peaks(parts: list[Held]) -> dict[str, int]:
    """Bytes by stage."""
    return {
        stage: sum(part.bytes for part in parts if stage in part.stages)
        for stage in STAGES
        if any(stage in part.stages for part in parts)
    }


def readable(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def format_estimate(parts: list[Held]) -> str:
    """The parts, the stages they are held in, and each stage's sum, as a table."""
    sums = peaks(parts)
    rows = [
        (p.name, readable(p.bytes), "always" if len(p.stages) == len(sums) else ", ".join(p.stages))
        for p in parts
    ]
    largest = max(sums, key=sums.get)
    rows.append(("", "", ""))
    for stage, total in sums.items():
        rows.append((f"in all, {stage}", readable(total), "peak" if stage == largest else ""))
    return "\n".join(f"{name:<27}{size:>11}  {stages}".rstrip() for name, size, stages in rows)


def choices(job: Job) -> list[tuple[str, Job]]:
    """Flags that could save memory, and the run with each."""
    frames = (job.num_frames // 8) * 4 + 1
    height, width = (max(16, side // 2 // 16 * 16) for side in (job.height, job.width))
    given = [
        ("--vae-tiling", {"vae_tiling": True}),
        ("--vae-dtype bfloat16", {"vae_dtype": "bfloat16"}),
        ("--offload text-encoder", {"offload": "text_encoder"}),
        ("--precision fp8", {"precision": "fp8"}),
        ("--dtype bfloat16", {"dtype": "bfloat16"}),
        ("--video-cache exact", {"video_cache": "exact"}),
        ("one video at a time", {"batch": 1}),
    ]
    if job.mode != "v2t":
        given += [
            ("--guidance-scale 1", {"guided": False}),
            (f"--num-frames {frames}", {"num_frames": frames}),
            (f"--height {height} --width {width}", {"height": height, "width": width}),
        ]
    return [(flag, replace(job, **change)) for flag, change in given]


def savings(stage: str, cfg: ModelConfig, job: Job, codecs: Codecs) -> list[tuple[str, int]]:
    """(flag, bytes that it saves in `stage`), the largest first; those that save nothing left
    out."""

    def total(job: Job) -> int:
        return peaks(estimate(cfg, job, codecs)).get(stage, 0)

    saved = [(flag, total(job) - total(changed)) for flag, changed in choices(job)]
    return sorted((s for s in saved if s[1] > 0), key=lambda s: -s[1])


def is_out_of_memory(error: BaseException) -> bool:
    """Compares names, because torch may not be loaded; on a CPU it raises a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    said = ("can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in said)


@contextmanager
def explain_oom(name: str, describe: Callable[[], dict]) -> Iterator[None]:
    """Re-raises an allocator's failure as OutOfMemory, with the three flags that the estimate says
    save most in this stage.

    describe: called only then; returns fields of `Job`, and under "cfg" and "codecs" the model and
        the sizes of VAE and text encoder (Wan2.1's if left out). Without "cfg" nothing is
        estimated.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
            raise
        got = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(" .:")[:200]
        raise OutOfMemory(
            f"memory: {name} ran out of memory ({got}). {advice(name, **describe())}"
        ) from error


def advice(stage: str, cfg: ModelConfig | None = None, codecs: Codecs = WAN, **job) -> str:
    """What saves most in a stage of this run."""
    if cfg is None:
        return "Use fewer frames or a smaller size."
    job |= {"mode": "v2t"} if stage == ENCODING else {}
    flags = savings(stage, cfg, Job(**job), codecs)[:3]
    said = " or ".join(f"{flag} ({readable(saved)} less)" for flag, saved in flags)
    return f"By the estimate these save most: {said or 'a smaller model'}."
