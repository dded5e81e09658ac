"""Frozen configurations and presets. No tensor library is imported here: `--help` must be
instant."""

import json
import math
import os
import stat
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import ClassVar, NamedTuple, get_args, get_origin

from engine.errors import ModelFileError, UsageError

MOST = 2**63  # every number of a configuration is below it, and so fits in 64 bits


class Range(NamedTuple):
    """The numbers from `low` to `high`, both included; `above`: low itself is not."""

    low: float
    high: float = math.inf
    above: bool = False

    def __contains__(self, number: float) -> bool:
        least = number > self.low if self.above else number >= self.low
        return least and number <= self.high and number < MOST

    def __str__(self) -> str:
        if self.high < math.inf:
            between = f"above {self.low} and at most" if self.above else f"between {self.low} and"
            return f"{between} {self.high}"
        return "positive" if self.above or self.low == 1 else f"at least {self.low}"

    def rule(self, number: float) -> str:
        """What the number breaks, in words."""
        if self.high < math.inf or abs(number) < MOST:
            return str(self)
        return f"{self} and {'below 2**63' if abs(number) < math.inf else 'finite'}"


COUNT, POSITIVE, NOT_NEGATIVE = Range(1), Range(0, above=True), Range(0)
SHARE, SEED = Range(0, 1), Range(-MOST, MOST - 1)
SIZE, LAYERS = Range(1, 2**24), Range(1, 1000)  # of a model, which is made before its file is read
SHIFT, GUIDANCE = Range(0, 1000, above=True), Range(-1000, 1000)
STEPS, CLIPS = Range(1, 10_000), Range(1, 10_000)  # of a run, which are listed before it starts


def check_fields(config, what: str) -> None:
    """Check every field of a frozen dataclass: its type, and its number or word against the class's
    RANGES and CHOICES; of a list, each entry. NumPy's numbers become Python's, so that they can be
    written as JSON.

    Errors: UsageError, which begins with `what`; NaN and infinity are in no range.
    """
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        union = get_origin(field.type) is UnionType
        kind, *others = get_args(field.type) if union else (field.type,)
        if value is None and NoneType in others:
            continue
        if others == [int] and not isinstance(value, kind):
            kind = int

        rules = config.RANGES.get(name), config.CHOICES.get(name)
        several = get_origin(kind)
        if several is None:
            value = checked(f"{what}: {name}", value, kind, *rules)
        elif isinstance(value, list | tuple):
            kind = get_args(kind)[0]
            numbered = enumerate(value)
            value = several(checked(f"{what}: {name}[{i}]", x, kind, *rules) for i, x in numbered)
        else:
            raise UsageError(f"{what}: {name} must be a list; got {value!r:.80}.")
        object.__setattr__(config, name, value)


def read_fields(config: type, stored: dict):
    """A `config` of those of a file's entries that are fields of it; the others are not read.
    Errors: ModelFileError for one that is missing or wrong."""
    needed = {field.name: field.default is MISSING for field in fields(config)}
    missing = [name for name, must in needed.items() if must and name not in stored]
    if missing:
        raise ModelFileError(f"{missing[0]} must be given; got none.")
    try:
        return config(**{name: value for name, value in stored.items() if name in needed})
    except UsageError as error:
        raise ModelFileError(str(error)) from None


def checked(what: str, value, kind: type, allowed: Range | None, known: tuple[str, ...] | None):
    """The value as a `kind`, in the range `allowed` or among the `known` words. Errors: UsageError,
    which begins with `what`."""
    if kind in NUMBERS:
        family, noun = NUMBERS[kind]
        if not isinstance(value, family) or isinstance(value, bool):
            raise UsageError(f"{what} must be {noun}; got {value!r:.80}.")
        if value not in allowed:
            raise UsageError(f"{what} must be {allowed.rule(value)}; got {value!s:.80}.")
        return kind(value)

    if not isinstance(value, kind):
        raise UsageError(f"{what} must be a {kind.__name__}; got {value!r:.80}.")
    if known is not None and value not in known:
        listed = ", ".join(known[:-1]) + " or " * (len(known) > 1) + known[-1]
        raise UsageError(f"{what} must be {listed}; got {value!r:.80}.")
    return value


NUMBERS = {int: (Integral, "a whole number"), float: (Real, "a number")}
SOLVERS = ("euler", "unipc", "lcm")
GRIDS, HIGHEST = ("num_inference_steps", "sigmas", "timesteps"), {"sigmas": 1, "timesteps": 1000}


def check_grid(name: str, values) -> tuple[float, ...]:
    """The sigmas or timesteps of a run as Python's numbers. Errors: UsageError unless they are as
    many numbers as STEPS allows that fall, the first at most HIGHEST, the last above 0."""
    found = values.tolist() if hasattr(values, "tolist") else values
    numbers = list(found) if isinstance(found, list | tuple) else []
    fits = all(isinstance(n, Real) and not isinstance(n, bool) for n in numbers)
    fits = fits and len(numbers) in STEPS and numbers[0] <= HIGHEST[name]
    if not fits or not all(a > b for a, b in pairwise([*numbers, 0])):
        raise UsageError(
            f"sample: {name} must be 1 to {STEPS.high} numbers that fall, from at most "
            f"{HIGHEST[name]} to above 0 (the 0 is added); got {found!r:.60}."
        )
    return tuple(map(float, numbers))


def one_grid(given: dict) -> None:
    """Errors: UsageError where more than one of the GRIDS is given."""
    names = [name for name in GRIDS if given.get(name) is not None]
    if len(names) > 1:
        raise UsageError(
            f"sample: one of {', '.join(GRIDS)} must be given; got {' and '.join(names)}. "
            "Leave out all but one."
        )


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Uni-ViGU. Latent channels (16), patch (1, 2, 2) and eps are the same in all
    of them.

    heads: of attention.
    head_dim: channels of a head; the width D is heads * head_dim.
    layers: blocks.
    ffn_dim: hidden width of the feed-forward layers.
    text_dim: width of the text encoder's rows.
    freq_dim: sinusoids of the time embedding.
    vocab: tokens of the text stream without the mask id.
    mask_source: the text starts from mask ids, which add one row (index `vocab`) to both ends.
    video_sees_text: False hides text keys from video queries, which makes the cached v2t exact.
    text_flow: "discrete" (token ids in, logits out) or "embedding" (vectors in, text velocity out).

    Errors: UsageError.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("heads", "head_dim", "ffn_dim", "text_dim", "freq_dim", "vocab"), SIZE),
        "layers": LAYERS,
    }
    CHOICES: ClassVar = {"text_flow": ("discrete", "embedding")}

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    vocab: int
    mask_source: bool = False
    video_sees_text: bool = True
    text_flow: str = "discrete"

    def __post_init__(self):
        check_fields(self, "model")
        if self.head_dim % 2 or self.freq_dim % 2:
            got = f"head_dim {self.head_dim}, freq_dim {self.freq_dim}"
            raise UsageError(f"model: head_dim and freq_dim must be even; got {got}.")
        if self.text_flow == "embedding" and self.mask_source:
            raise UsageError(
                "model: mask_source must be False with text_flow=embedding; its source is Gaussian."
            )

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def case(self) -> dict[str, int]:
        """Width, heads, head_dim and hidden width, by the letters that `univigu_kernels.bind`
        takes; rows come from what is to be run."""
        return {"D": self.dim, "H": self.heads, "K": self.head_dim, "F": self.ffn_dim}

    @property
    def vocab_rows(self) -> int:
        return self.vocab + self.mask_source

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        if name not in PRESETS:
            raise UsageError(f"model: preset must be one of {', '.join(PRESETS)}; got {name!r}.")
        return PRESETS[name]


PRESETS = {
    "tiny": ModelConfig(
        heads=3, head_dim=64, layers=4, ffn_dim=512, text_dim=64, freq_dim=64, vocab=37
    ),
    "tiny-embedding": ModelConfig(
        heads=2,
        head_dim=40,
        layers=4,
        ffn_dim=192,
        text_dim=64,
        freq_dim=64,
        vocab=37,
        text_flow="embedding",
    ),
    "wan2.1-1.3b": ModelConfig(
        heads=12, head_dim=128, layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256, vocab=256384
    ),
    "wan2.1-14b": ModelConfig(
        heads=40, head_dim=128, layers=40, ffn_dim=13824, text_dim=4096, freq_dim=256, vocab=256384
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training.

    stage: "recall" (text target = prompt, condition heavily dropped), "refine" (text target =
        detailed caption) or "distill" (few steps without guidance learn a teacher's many, see
        `engine.train.distill`).
    condition_dropout: share of samples whose prompt condition is replaced by a null, half of them
        by the encoded empty string (guidance's null) and half by zeros (captioning's null).
        None: 0.8 in recall, 0.3 in refine.
    t2v_share, v2t_share: shares of samples trained at the corners that inference visits and
        independent times meet with probability zero. t2v: the text rows hold the clean prompt at
        text time 0 and give no text loss. v2t: the video is clean at video time 0 and gives no
        video loss, and the condition is zeros.
    steps: optimizer steps of the whole run.
    lr: of AdamW.
    muon_lr: of Muon on the blocks' matrices; 0 leaves them to AdamW.
    warmup: steps in which the learning rates rise to their full values.
    weight_decay: of AdamW and Muon.
    grad_clip: the largest norm of all gradients together.
    ema: decay of the parameters' average, which is what is saved; 0: none is kept.
    batch_size: samples of a step, of all ranks together.
    micro_batch_size: samples that a rank computes at a time; 0: all of its own.
    lambda_text: weight of the text loss against the video loss.
    text_loss: "ce" (cross-entropy) or "kl".
    flow_shift: more puts more samples, or in distill more steps, at high noise.
    text_exponent: n of the text's kappa(t) = t ** n.
    seed: of every random number of the run.
    recompute: none, attention or block; see `engine.recompute`.
    precision: bf16 (the model's dtype) or fp8: experts run forward in e4m3, see `engine.fp8`.
    freeze: names of parameters that stay as they are, separated by commas, * for anything.
    lora_rank: of two factors added to each matrix of the blocks, which are then all that is
        trained; 0: full training.
    student_steps: of distill, the numbers of steps that the student learns, which training takes in
        turn.
    teacher_steps: of distill, the steps of the teacher, a multiple of each of the student's.
    guidance_scale: of distill, the teacher's.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("steps", "batch_size"), COUNT),
        **dict.fromkeys(("student_steps", "teacher_steps"), COUNT),
        **dict.fromkeys(("lr", "grad_clip", "flow_shift", "text_exponent"), POSITIVE),
        **dict.fromkeys(("muon_lr", "weight_decay", "lambda_text", "guidance_scale"), NOT_NEGATIVE),
        **dict.fromkeys(("micro_batch_size", "lora_rank", "warmup"), NOT_NEGATIVE),
        **dict.fromkeys(("ema", "t2v_share", "v2t_share", "condition_dropout"), SHARE),
        "seed": SEED,
    }
    CHOICES: ClassVar = {
        "stage": ("recall", "refine", "distill"),
        "text_loss": ("ce", "kl"),
        "recompute": ("none", "attention", "block"),
        "precision": ("bf16", "fp8"),
    }

    stage: str = "recall"
    steps: int = 1000
    batch_size: int = 64
    lr: float = 1e-3
    muon_lr: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.999
    condition_dropout: float | None = None
    t2v_share: float = 0.2
    v2t_share: float = 0.2
    lambda_text: float = 1.0
    text_loss: str = "ce"
    flow_shift: float = 3.0
    text_exponent: float = 1.0
    seed: int = 0
    micro_batch_size: int = 0
    recompute: str = "none"
    precision: str = "bf16"
    freeze: str = ""
    lora_rank: int = 0
    student_steps: tuple[int, ...] = ()
    teacher_steps: int = 24
    guidance_scale: float = 3.0

    def __post_init__(self):
        check_fields(self, "train")
        if self.freeze and self.lora_rank:
            raise UsageError(
                "train: freeze must be left out with lora_rank, which freezes the whole model; "
                f"got {self.freeze!r}."
            )
        if self.t2v_share + self.v2t_share > 1:
            got = f"{self.t2v_share} + {self.v2t_share}"
            raise UsageError(f"train: t2v_share + v2t_share must be at most 1; got {got}.")

    @property
    def dropout(self) -> float:
        if self.condition_dropout is not None:
            return self.condition_dropout
        return 0.8 if self.stage == "recall" else 0.3


@dataclass(frozen=True)
class MeshConfig:
    """How processes are arranged; at most one dimension is -1, for all that the others leave.

    dp_replicate: copies of the parameters.
    dp_shard: ranks that share parameters and have data of their own.
    sp: ranks that share each sample.
    cfg: 2 where sampling has a rank for the prompt and one for its null.
    """

    AXES: ClassVar[tuple[str, ...]] = ("dp_replicate", "dp_shard", "sp", "cfg")
    RANGES: ClassVar = dict.fromkeys(AXES, Range(-1))
    CHOICES: ClassVar = {}

    dp_replicate: int = 1
    dp_shard: int = -1
    sp: int = 1
    cfg: int = 1

    def __post_init__(self):
        check_fields(self, "parallel")

    def shape(self, processes: int) -> tuple[int, int, int, int]:
        """Errors: UsageError where the dimensions do not make up the processes."""
        sizes = [getattr(self, name) for name in self.AXES]
        fixed = math.prod(n for n in sizes if n != -1)
        valid = all(n >= 1 or n == -1 for n in sizes) and sizes.count(-1) <= 1
        valid = valid and self.cfg in (1, 2)
        if valid and processes % fixed == 0:
            sizes = [processes // fixed if n == -1 else n for n in sizes]
        if not valid or math.prod(sizes) != processes:
            got = ", ".join(f"{k} {v}" for k, v in zip(self.AXES, sizes, strict=True))
            raise UsageError(
                f"parallel: {' * '.join(self.AXES)} must be the {processes} processes, with cfg 1 "
                f"or 2 and at most one -1; got {got}. Change torchrun's --nproc-per-node or these."
            )
        return tuple(sizes)


FRAME_STRIDE, PIXEL_STRIDE = 4, 16  # the VAE's 4 x 8 x 8 and the 2 x 2 patch
MAX_SIDE, MOST_FRAMES, MOST_ROWS = 8192, 65_536, 65_536  # of a video, and of its text


@dataclass(frozen=True)
class SamplingConfig:
    """How a model asks to be sampled, as distilled ones do: what a caller leaves out. None: it does
    not say.

    num_inference_steps, sigmas, timesteps, flow_shift, solver, guidance_scale, text_steps: as in
        `Pipeline.generate`; of the first three at most one.
    caption_steps: num_inference_steps of `Pipeline.caption`.

    Errors: UsageError.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("num_inference_steps", "text_steps", "caption_steps"), STEPS),
        "flow_shift": SHIFT,
        "guidance_scale": GUIDANCE,
    }
    CHOICES: ClassVar = {"solver": SOLVERS}

    num_inference_steps: int | None = None
    sigmas: tuple | None = None
    timesteps: tuple | None = None
    flow_shift: float | None = None
    solver: str | None = None
    guidance_scale: float | None = None
    text_steps: int | None = None
    caption_steps: int | None = None

    def __post_init__(self):
        one_grid(vars(self))
        for name in HIGHEST:
            if getattr(self, name) is not None:
                object.__setattr__(self, name, check_grid(name, getattr(self, name)))
        check_fields(self, "sampling")


@dataclass(frozen=True)
class PipelineConfig:
    """What a folder says about itself in pipeline.json; the defaults are Wan2.1's.

    latent_space: "normalized" (the model works on (z - mean) / std) or "raw".
    context_rows: rows of the prompt.
    text_rows: rows of the text stream; 0 where the model has no trained text branch.
    num_frames, height, width: size of a video, in frames and pixels.
    fps: frames a second.
    sampling: how the model is sampled where the caller does not say.
    """

    RANGES: ClassVar = {
        "context_rows": Range(1, MOST_ROWS),
        "text_rows": Range(0, MOST_ROWS),
        "num_frames": Range(1, MOST_FRAMES),
        **dict.fromkeys(("height", "width"), Range(1, MAX_SIDE)),
        "fps": Range(1, 240),
    }
    CHOICES: ClassVar = {"latent_space": ("normalized", "raw")}

    latent_space: str = "normalized"
    context_rows: int = 512
    text_rows: int = 256
    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: int = 16
    sampling: SamplingConfig | None = None

    def __post_init__(self):
        check_fields(self, "pipeline")
        check_size(self.num_frames, self.height, self.width)

    @property
    def case(self) -> dict[str, int]:
        """Samples of a guided step, and rows of video, text and context."""
        video_rows = ((self.num_frames - 1) // 4 + 1) * (self.height // 16) * (self.width // 16)
        return {"B": 2, "V": video_rows, "T": self.text_rows, "C": self.context_rows}

    def shape(
        self, num_frames: int | None = None, height: int | None = None, width: int | None = None
    ) -> tuple[int, int, int, int]:
        """Latents [16,F,Y,X] of one sample; None takes the folder's own size. Errors:
        UsageError."""
        frames = self.num_frames if num_frames is None else num_frames
        height = self.height if height is None else height
        width = self.width if width is None else width
        check_size(frames, height, width)
        return 16, (frames - 1) // FRAME_STRIDE + 1, height // 8, width // 8


LARGEST_FILE = 2**26  # bytes of a JSON file


def nearest_valid(what: str, value: int, stride: int, offset: int, most: int) -> None:
    """Raises UsageError with the two nearest of stride * k + offset."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UsageError(f"size: {what} must be a whole number; got {value!r:.80}.")
    if value > most:
        raise UsageError(f"size: {what} must be at most {most}; got {value!s:.80}.")
    if value < 1 or (value - offset) % stride:
        low = (value - offset) // stride * stride + offset
        rule = f"{stride}k+1" if offset else f"a multiple of {stride}"
        near = [v for v in (low, low + stride) if v > 0]
        raise UsageError(
            f"size: {what} must be {rule}; got {value}. Nearest: {' or '.join(map(str, near))}."
        )


def check_size(num_frames: int, height: int, width: int) -> None:
    nearest_valid("num_frames", num_frames, FRAME_STRIDE, 1, MOST_FRAMES)
    nearest_valid("height", height, PIXEL_STRIDE, 0, MAX_SIDE)
    nearest_valid("width", width, PIXEL_STRIDE, 0, MAX_SIDE)


def read_pipeline_config(path: Path) -> PipelineConfig:
    file = path / "pipeline.json"
    if not os.path.lexists(file):
        return PipelineConfig(text_rows=0)
    try:
        record = json.loads(read_file(file))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} in place of an object")
        unknown = set(record) - {f.name for f in fields(PipelineConfig)}
        if unknown:
            raise ValueError(f"unknown keys {sorted(unknown)}")
        if record.get("sampling") is not None:
            record["sampling"] = SamplingConfig(**record["sampling"])
        return PipelineConfig(**record)
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"pipeline: {file} must be a pipeline configuration; got {error}."
        ) from None


def read_file(path: Path) -> bytes:
    """The content of a small file. Errors: OSError for what is no file, such as a pipe, which would
    be waited for, or a device, which may have no end; and for more than 64 MiB."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no file, but a folder, pipe or device")
    if not status.st_size:  # some of /proc's look like this and wait for ever
        raise OSError("an empty file")
    if status.st_size > LARGEST_FILE:
        raise OSError(f"{status.st_size} bytes, more than {LARGEST_FILE}")
    return path.read_bytes()
