"""A user's own clips: the lines of a manifest and the videos that they name, as a latent shard.

A manifest is JSON lines {"video": path from the manifest's folder, "prompt": "...", "caption":
"...", "start": seconds, "end": seconds}; start and end may be left out, other fields are not read.
A bad line or file is skipped and said; too many of them end the run with nothing written.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from engine.config import PipelineConfig
from engine.data.shard import write_shard
from engine.errors import ModelFileError, UsageError
from engine.files.reading import read_bytes
from engine.media.clip import read_clips
from engine.media.text import clean_prompt

SHOWN = 20  # reasons that a run prints
LONGEST = 1e6  # seconds
SLOWEST = 0.99  # of the wanted rate: 29.97 passes for 30, and nearest frames do not repeat


@dataclass(frozen=True)
class Clip:
    """One good line. The clip starts `start` seconds into the video and lies before `end`."""

    number: int
    video: Path
    prompt: str
    caption: str
    start: float
    end: float


def parse_line(number: int, raw: bytes, folder: Path) -> Clip:
    """Errors: UsageError."""
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the line must be JSON in UTF-8; got {error}.") from None
    if not isinstance(record, dict):
        raise UsageError(f"the line must be a JSON object; got {type(record).__name__}.")
    texts = {}
    for name in ("video", "prompt", "caption"):
        value = record.get(name)
        if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
            got = repr(value) if name in record else "none"
            raise UsageError(f"{name} must be a text that is not empty; got {got[:80]}.")
        texts[name] = value

    start, end = record.get("start"), record.get("end")
    start, end = 0.0 if start is None else start, LONGEST if end is None else end
    if not (_is_number(start) and _is_number(end) and 0 <= start < end <= LONGEST):
        raise UsageError(
            f"start and end must be seconds, 0 <= start < end; got {start!r:.40} and {end!r:.40}."
        )
    video = folder / texts.pop("video")
    return Clip(number, video, **texts, start=float(start), end=float(end))


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_texts(parts, clip: Clip, config: PipelineConfig) -> None:
    """Prompt and caption fit their rows. Errors: UsageError."""
    cleaned = clean_prompt(clip.prompt)
    if not cleaned:
        raise UsageError(f"prompt must not be empty; got {clip.prompt!r}.")
    limits = (
        ("prompt", cleaned, config.context_rows),
        ("prompt", clip.prompt, config.text_rows),
        ("caption", clip.caption, config.text_rows),
    )
    for name, text, rows in limits:
        try:
            parts.text.encode_rows(text, rows)
        except UsageError as error:
            raise UsageError(f"{name}: {str(error).removeprefix('prompt: ')}") from None


def read_frames(clip: Clip, config: PipelineConfig) -> Tensor:
    """uint8 [num_frames, height, width, 3]: the frames nearest to start + i / fps.

    A variable frame rate counts as the clip's average. Errors: UsageError, ModelFileError."""
    excerpt = next(read_clips(clip.video, config, clip.start, clip.end, whole=True))
    rate = excerpt.source["frames_per_second"]
    if rate is not None and rate < SLOWEST * config.fps:
        raise UsageError(
            f"{clip.video.name} must have at least {config.fps} frames per second; "
            f"got {rate:g}. Lower --fps."
        )
    return excerpt.frames


def encode(parts, frames: Tensor) -> Tensor:
    """uint8 [N,H,W,3] -> latents fp16 [1,16,F,H/8,W/8]. Errors: UsageError."""
    latents = parts.encode_video(frames[None]).half().cpu()
    if not latents.isfinite().all():
        raise UsageError("latents must be finite in fp16; got NaN or Inf from the VAE.")
    return latents


def _one_line(text: str) -> str:
    """At most 300 characters; what a terminal could obey becomes a question mark."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))[:300]


def most_bad(count: int, share: float) -> int:
    """Bad lines that a manifest of `count` lines may have: `share` of them, and one in any case
    unless the share is 0."""
    return max(int(share > 0), math.floor(share * count + 1e-9))


def _read_lines(manifest: Path) -> tuple[list[tuple[int, bytes]], str]:
    """The lines that are not empty with their numbers from 1 on, and the file's SHA-256. Errors:
    ModelFileError."""
    content = read_bytes(manifest)
    lines = enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1)
    kept = [(number, line) for number, line in lines if line.strip()]
    return kept, hashlib.sha256(content).hexdigest()


def preprocess_manifest(
    parts,
    made_with: dict,
    manifest: str | Path,
    path: str | Path,
    config: PipelineConfig,
    max_bad: float = 0.01,
    progress: Callable = iter,
    report: Callable[[str], None] = print,
) -> None:
    """Encodes the clips of `manifest`, each num_frames at fps of height x width, into one shard.

    made_with: the `data_fingerprint` of the pipeline's folder. `report` gets one line for each of
    the first 20 bad lines. Once more than `most_bad` are bad, the rest is read for its mistakes
    alone. The latents of all clips are held in memory. Errors: ModelFileError, with nothing
    written.
    """
    manifest = Path(manifest)
    lines, digest = _read_lines(manifest)
    allowed = most_bad(len(lines), max_bad)

    clips, kept, latents, bad = [], [], [], {}
    for number, line in lines:
        try:
            clips.append(clip := parse_line(number, line, manifest.parent))
            check_texts(parts, clip, config)
        except UsageError as error:
            bad[number] = str(error)

    for clip in progress([clip for clip in clips if clip.number not in bad]):
        try:
            frames = read_frames(clip, config)
            if len(bad) <= allowed:
                latents.append(encode(parts, frames))
                kept.append(clip)
        except (UsageError, ModelFileError, OSError) as error:
            bad[clip.number] = str(error)

    for number in sorted(bad)[:SHOWN]:
        report(f"{manifest}:{number}: skipped: {_one_line(bad[number])}")
    if len(bad) > SHOWN:
        report(f"{manifest}: skipped: {len(bad) - SHOWN} more lines")
    if len(bad) > allowed or not kept:
        raise ModelFileError(
            f"preprocess: {manifest} must have good lines, and at most {allowed} bad ones; got "
            f"{len(bad)} bad of {len(lines)}. Correct them, or raise --max-bad."
        )

    source = {"manifest": manifest.name, "sha256": digest, "skipped": len(bad)}
    texts = [(clip.prompt, clip.caption) for clip in kept]
    write_shard(parts, made_with, path, latents, texts, config, source)
