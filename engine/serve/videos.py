"""Videos as the wire has them: what a client may ask, and what it is told of a job."""

import json
import math
import re
from collections.abc import Iterable
from fractions import Fraction
from typing import Annotated, Literal

import sqlalchemy as sql
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.config import FRAME_STRIDE, PIXEL_STRIDE, SOLVERS, PipelineConfig
from engine.serve.errors import WireError, invalid, nearest, of_validation
from engine.serve.settings import Settings
from engine.serve.store import FAILED

SEEDS = 2**63
LORA = re.compile(r"([A-Za-z0-9_.-]{1,80})(?::(-?\d{1,4}(?:\.\d{1,9})?))?")


class VideoRequest(BaseModel):
    """What POST /v1/videos takes. OpenAI's fields come first; what is ours goes into the Python
    client's `extra_body`."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=False, allow_inf_nan=False)

    prompt: str = Field(description="What the video shows.")
    model: str | None = Field(None, description="The id of /v1/models, or left out.")
    seconds: str | None = Field(
        None, description="Length of the video: its frames less one, by its frame rate."
    )
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, multiples of 16.")
    mode: Literal["t2v", "t2vt"] = Field("t2v", description="t2vt: a video and its caption.")
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = Field(
        None, description="The same seed gives the same video; left out, the server draws one."
    )
    num_inference_steps: Annotated[int, Field(ge=1)] | None = None
    guidance_scale: Annotated[float, Field(ge=-1000, le=1000)] | None = None
    negative_prompt: str = ""
    flow_shift: Annotated[float, Field(ge=0.001, le=1000)] | None = None
    solver: Literal[SOLVERS] | None = None
    text_steps: Annotated[int, Field(ge=1)] | None = None
    lora: str = Field(
        "", description='"NAME:SCALE,..." of the adapters that the server was started with.'
    )


class Video(BaseModel):
    """A job of /v1/videos."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    error: dict | None
    prompt: str
    remixed_from_video_id: None = None
    seconds: str
    size: str
    mode: str
    caption: str | None
    seed: int
    num_frames: int
    fps: int
    timings: dict[str, float] | None = None


def plain_seconds(frames: int, fps: int) -> str:
    """What a client sends back for the same frames, at most nine digits after the point."""
    seconds = Fraction(frames - 1, fps)
    return str(seconds.numerator) if seconds.denominator == 1 else f"{float(seconds):.9g}"


def frames_of(seconds: str, fps: int, most: int) -> int:
    """The frames, 4k+1 of them, of so many seconds. Errors: WireError, which names the nearest."""
    try:
        exact = float(seconds) * fps if len(seconds) <= 20 else math.nan
    except ValueError:
        exact = math.nan
    if not 0 <= exact < 2**20:
        raise invalid(f"seconds must be a number from 0 on; got {seconds!r:.40}.", "seconds")

    steps = exact / FRAME_STRIDE
    k = round(steps)
    highest = (most - 1) // FRAME_STRIDE
    if abs(steps - k) > 1e-6 or k > highest:
        around = {min(math.floor(steps), highest), min(math.ceil(steps), highest)}
        names = " or ".join(plain_seconds(FRAME_STRIDE * n + 1, fps) for n in sorted(around))
        rule = f"frames are seconds x {fps} + 1, 4k+1 of them and at most {most}"
        raise invalid(f"seconds: {rule}; got {seconds}. The nearest: {names}.", "seconds")
    return FRAME_STRIDE * k + 1


def size_of(size: str, most_pixels: int) -> tuple[int, int]:
    """(width, height). Errors: WireError."""
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    if found is None:
        raise invalid(f"size must be WIDTHxHEIGHT, such as 832x480; got {size!r:.40}.", "size")

    width, height = map(int, found.groups())
    for side in (width, height):
        if side % PIXEL_STRIDE or side == 0:
            near = max(PIXEL_STRIDE, PIXEL_STRIDE * round(side / PIXEL_STRIDE))
            raise invalid(
                f"size: both sides must be multiples of {PIXEL_STRIDE}; got {side} in {size}. "
                f"The nearest: {near}.",
                "size",
            )
    if width * height > most_pixels:
        raise invalid(
            f"size: a video may have {most_pixels} pixels (--most-pixels); {size} has "
            f"{width * height}.",
            "size",
        )
    return width, height


def adapters_of(lora: str, known: Iterable[str]) -> dict[str, float]:
    """Scales by name, in the order in which they are added. Errors: WireError."""
    found: dict[str, float] = {}
    for part in filter(None, lora.split(",")):
        fits = LORA.fullmatch(part.strip())
        if fits is None:
            raise invalid(f'lora must be "NAME:SCALE,..."; got {part!r:.80}.', "lora")
        name, scale = fits.groups()
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise invalid(
                f"lora: {name!r} was not loaded; the server has {names}.{nearest(name, known)}",
                "lora",
            )
        if name in found:
            raise invalid(f"lora: {name!r} is named twice.", "lora")
        found[name] = float(scale or 1)
    return found


def check_text(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise invalid(f"{name} may have {most} characters (--most-prompt); got {len(text)}.", name)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise invalid(f"{name} must be Unicode text; it has half of a surrogate pair.", name)
    if "\0" in text:
        raise invalid(f"{name} must be text; it has a NUL character.", name)


def read_request(given: dict) -> VideoRequest:
    """Errors: WireError."""
    if "input_reference" in given:
        raise invalid(
            "input_reference is not taken: the model makes videos from text alone.",
            "input_reference",
        )
    try:
        return VideoRequest.model_validate(given)
    except ValidationError as error:
        raise of_validation(error, list(VideoRequest.model_fields)) from None


def settled(
    asked: VideoRequest, settings: Settings, config: PipelineConfig, model: str, lora: Iterable[str]
) -> dict:
    """What the runner is told, as JSON has it; fields that were left out stay so, but for the size.
    Errors: WireError."""
    if asked.model not in (None, model):
        raise WireError(
            404, "model_not_found", f"The model is {model!r}; got {asked.model!r:.80}.", "model"
        )
    if not asked.prompt.strip():
        raise invalid("prompt must not be empty. Say what the video shows.", "prompt")
    for name in ("prompt", "negative_prompt"):
        check_text(name, getattr(asked, name), settings.most_prompt)
    for name in ("num_inference_steps", "text_steps"):
        if (getattr(asked, name) or 0) > settings.most_steps:
            got = getattr(asked, name)
            raise invalid(f"{name} may be {settings.most_steps} (--most-steps); got {got}.", name)
    if asked.text_steps is not None and asked.mode != "t2vt":
        raise invalid("text_steps must be left out but in mode t2vt.", "text_steps")

    frames, width, height = config.num_frames, config.width, config.height
    if asked.seconds is not None:
        frames = frames_of(asked.seconds, config.fps, settings.most_frames)
    if asked.size is not None:
        width, height = size_of(asked.size, settings.most_pixels)

    names = "prompt mode num_inference_steps guidance_scale negative_prompt flow_shift solver"
    found = {name: getattr(asked, name) for name in [*names.split(), "text_steps", "seed"]}
    found |= {"num_frames": frames, "height": height, "width": width}
    return found | {"lora": adapters_of(asked.lora, lora)}


def describe(job: sql.Row, model: str, fps: int, expires_at: float | None) -> Video:
    """A job as a client reads it."""
    asked = json.loads(job.request)
    result = json.loads(job.result) if job.result else {}
    failed = job.status == FAILED

    return Video(
        id=job.id,
        model=model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_at),
        completed_at=None if job.completed_at is None else int(job.completed_at),
        expires_at=None if expires_at is None else int(expires_at),
        error={"code": job.error_code, "message": job.error_message} if failed else None,
        prompt=asked["prompt"],
        seconds=plain_seconds(asked["num_frames"], fps),
        size=f"{asked['width']}x{asked['height']}",
        mode=asked["mode"],
        caption=result.get("caption"),
        seed=asked["seed"],
        num_frames=asked["num_frames"],
        fps=fps,
        timings=result.get("timings"),
    )
