"""What a folder says of itself in pipeline.json, and how a clip is sampled."""

import json
import os
import stat
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import ClassVar

from engine.config.fields import GUIDANCE, SHIFT, STEPS, Range, check_fields
from engine.errors import ModelFileError, UsageError

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


EMBEDDED = Path(__file__).parents[1] / "assets" / "tiny"  # the model that comes with the package
FEW_STEPS = "few_steps"  # the folder in a pipeline folder of a model distilled from its own
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


def find_few_steps(path: Path, transformer_path=None) -> Path:
    """The model of few steps in a pipeline folder, few_steps/. Errors: UsageError where another
    transformer is named, ModelFileError where there is none."""
    if transformer_path is not None:
        raise UsageError(
            f"pipeline: one of few_steps and transformer_path must be given; got both, "
            f"{transformer_path}. Leave out one."
        )
    if not (path / FEW_STEPS).is_dir():
        raise ModelFileError(
            f"pipeline: {path} must hold {FEW_STEPS}/ to run in few steps; got none there. Name "
            "its model as transformer_path, see docs/few-steps.md."
        )
    return path / FEW_STEPS


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
