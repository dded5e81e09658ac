"""Video files in and out. Frames are uint8 RGB arrays [N, H, W, 3], times are in seconds."""

import importlib
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from engine.errors import MissingPackage, ModelFileError, UsageError

MAX_SIDE = 8192
MAX_DECODED_BYTES = 4 << 30
# Closed lists: left to itself FFmpeg also opens playlists, addresses and, as "ansi" video, text.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv",
    "protocol_whitelist": "file",
}
_BT709, _LIMITED_RANGE = 1, 1

_SHOWN_FRAMES, _SCALE = 5, 2
_MARGIN, _FRAME_GAP, _TEXT_WIDTH, _LEADING = 24, 4, 280, 5
_BACKGROUND, _RULE = (244, 244, 241), (220, 220, 214)
_TITLE, _SUBTITLE = (15, (22, 24, 29)), (13, (85, 91, 102))


@dataclass(frozen=True)
class Video:
    """Frames uint8 [N, H, W, 3] RGB, and how many of them are shown per second."""

    frames: np.ndarray
    fps: float


def read_video(
    path: str | Path, start: float = 0.0, end: float | None = None, max_frames: int | None = None
) -> Video:
    """Decode the frames shown in [start, end) seconds after the first one, upright, at native size.

    Frames before `start` are decoded and dropped, so the cost grows with the end of the interval.
    At most `max_frames` frames are accepted (None: what fits in 4 GiB); more are refused, not cut.
    A variable frame rate is reported as its average. An mkv or gif that was cut short looks whole.

    Errors: UsageError for the interval, the number of frames and sides over 8192 pixels;
    ModelFileError for a file that is absent, damaged, no video or without frames; MissingPackage.
    """
    av = _require("av")
    path = Path(path)
    if not 0 <= start < math.inf or (end is not None and not start < end):
        raise UsageError(
            f"video: start and end must satisfy 0 <= start < end; got start={start}, end={end}. "
            "Give both in seconds."
        )
    if not path.is_file():
        raise ModelFileError(f"video: path must be a file; got {path}. Check its spelling.")
    try:
        # Absolute, for FFmpeg reads "concat:x" as a protocol.
        source = str(path.resolve())
        with av.open(source, options=_OPEN_OPTIONS, metadata_errors="ignore") as container:
            return _decode(path, container, start, end, max_frames)
    except (av.FFmpegError, OSError) as exc:
        raise _damaged(path, getattr(exc, "strerror", None) or "unreadable data") from exc


def _decode(path: Path, container, start, end, max_frames) -> Video:
    if not container.streams.video:
        raise _damaged(path, "no video stream")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None or not codec.height or not codec.width:
        raise _damaged(path, "an unknown codec or frame size")
    _check_side(codec.height, codec.width)
    limit = max_frames or MAX_DECODED_BYTES // (codec.height * codec.width * 3)
    stream.thread_type = "AUTO"
    frames, times = [], []
    for time, frame in _timed_frames(path, container, stream):
        if end is not None and time >= end:
            break
        if time < start:
            continue
        if len(frames) == limit:
            raise UsageError(
                f"video: {path.name} must have at most {limit} frames between start and end; "
                f"got more than {limit}. Choose a shorter interval or raise max_frames."
            )
        frames.append(_upright_rgb(frame))
        times.append(time)
        if frames[-1].shape != frames[0].shape:
            raise _damaged(path, "frames of different sizes")
    if not frames and start > 0:
        raise UsageError(
            f"video: start must lie inside {path.name}; got no frame from {start} s on. Lower it."
        )
    if not frames:
        raise _damaged(path, "no frames")
    return Video(np.stack(frames), _rate(path, container, stream, times))


def _timed_frames(path: Path, container, stream) -> Iterator[tuple[float, object]]:
    """Yield (seconds since the first frame, frame); refuse the damage that FFmpeg would conceal."""
    first = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise _damaged(path, "a damaged or cut packet")
        for frame in packet.decode():
            if frame.is_corrupt or frame.time is None:
                raise _damaged(path, "a damaged frame")
            _check_side(frame.height, frame.width)
            first = frame.time if first is None else first
            yield frame.time - first, frame


def _upright_rgb(frame) -> np.ndarray:
    """[H, W, 3]. Phones store portrait video on its side, with the angle that turns it upright."""
    rgb = frame.to_ndarray(format="rgb24", interpolation=_accurate())
    return np.rot90(rgb, round(frame.rotation / 90) % 4)


def _rate(path: Path, container, stream, times: list[float]) -> float:
    # FFmpeg's average rate of a GIF follows its shortest delay: 20 for 17 frames at 16 per second.
    if container.format.name == "gif" and len(times) > 1:
        return (len(times) - 1) / (times[-1] - times[0])
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise _damaged(path, "no frame rate")
    return float(rate)


def _damaged(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        f"video: {path} must be a video file that decodes without damage; got {found}. "
        "Check the file, or convert it to mp4 (h264)."
    )


def write_video(path: str | Path, frames: np.ndarray, fps: float = 16.0) -> None:
    """Write frames uint8 [N, H, W, 3] as .mp4 (h264, yuv420p, BT.709, crf 16) or looping .gif.

    Every frame is written at its own size; the file appears complete or not at all. A GIF has one
    palette, and delays of whole centiseconds that do not drift from `fps`.
    Errors: UsageError for suffix, folder, frames, size and rate; MissingPackage.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix.lower())
    if writer is None:
        raise UsageError(
            f"video: the output must end in {' or '.join(_WRITERS)}; got {path.name!r}. Rename it."
        )
    _check_frames("video", frames)
    _check_side(*frames.shape[1:3])
    if not 0.1 <= fps <= 240:
        raise UsageError(
            f"video: fps must be between 0.1 and 240; got {fps}. Give frames per second."
        )
    writer(path, frames, Fraction(fps).limit_denominator(1001))


def _write_mp4(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        smaller = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        larger = f"{width + width % 2}x{height + height % 2}"
        raise UsageError(
            f"video: width and height must be even for mp4; got {width}x{height}. "
            f"Crop to {smaller}, pad to {larger}, or write a .gif."
        )
    av = _require("av")
    with (
        _replacing(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=fps, options={"crf": "16"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation=_accurate(),
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: np.ndarray, fps: Fraction) -> None:
    if fps > 50:
        raise UsageError(
            f"video: fps must be at most 50 for gif; got {float(fps):g}. "
            "Players replace shorter delays by longer ones: lower it or write an .mp4."
        )
    av, image = _require("av"), _require("PIL.Image")
    palette, argb = _shared_palette(image, frames)
    # Not Pillow's own writer, which merges equal neighbours: 5 frames, 3 alike, came back as 3.
    with (
        _replacing(path) as partial,
        av.open(str(partial), "w", format="gif", options={"loop": "0"}) as container,
    ):
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "pal8"
        for index, rgb in enumerate(frames):
            indices = np.asarray(image.fromarray(rgb).quantize(palette=palette))
            frame = av.VideoFrame.from_ndarray((indices, argb), format="pal8")
            frame.pts, frame.time_base = round(100 * index / fps), Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _shared_palette(image, frames: np.ndarray):
    """One palette for the clip, so that no colour flickers: a Pillow image and ARGB [256, 4]."""
    pixels = frames.reshape(-1, 3)
    # Median cut takes up to 1.7 s per million pixels.
    sample = np.ascontiguousarray(pixels[:: math.ceil(len(pixels) / 2**20)])
    palette = image.fromarray(sample[None]).quantize(256)
    rgb = np.asarray(palette.getpalette(), np.uint8).reshape(-1, 3)
    argb = np.full((256, 4), 255, np.uint8)
    argb[: len(rgb), 1:] = rgb
    return palette, argb


_WRITERS = {".mp4": _write_mp4, ".gif": _write_gif}


def write_sidecar(path: str | Path, record: dict) -> Path:
    """Write `record` as JSON beside the video `path` (clip.mp4: clip.json) and return that path.

    The file appears complete or not at all. Errors: UsageError that names the key whose value is
    not plain (str, int, finite float, bool, None, lists and dicts of them).
    """
    target = Path(path).with_suffix(".json")
    for key, value in record.items():
        try:
            json.dumps({key: value}, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError) as exc:
            raise UsageError(
                f"sidecar: {key!r} must be plain JSON; got {type(value).__name__} ({exc}). "
                "Convert it to str, int, float, bool, list or dict."
            ) from exc
    with _replacing(target) as partial:
        partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return target


def contact_sheet(
    path: str | Path, rows: list[tuple[str, str, np.ndarray]], columns: int = 1
) -> None:
    """Draw a PNG: up to 5 evenly spaced frames per row at twice their size, text beside them.

    rows: (title, subtitle, frames uint8 [N, H, W, 3]), set from left to right in `columns` columns.
    The font is Pillow's own, which has the letters of English and boxes for others.
    Errors: UsageError for path, rows, columns and frames; MissingPackage.
    """
    path = Path(path)
    if path.suffix.lower() != ".png" or not rows or columns < 1:
        raise UsageError(
            "contact sheet: path must end in .png, rows and columns must be at least 1; "
            f"got {path.name!r}, {len(rows)} rows, {columns} columns. Change what differs."
        )
    for title, _, frames in rows:
        _check_frames(f"contact sheet, {title!r}", frames)
    cells = [(_strip(frames), _text(title, subtitle)) for title, subtitle, frames in rows]
    sheet = _sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])
    with _replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _sheet(bands: list[list[tuple]]):
    """Lay out cells (strip, lines of text) band below band, with a hairline between bands."""
    image, drawing = _require("PIL.Image"), _require("PIL.ImageDraw")
    strip_width = max(strip.shape[1] for band in bands for strip, _ in band)
    pitch = strip_width + _TEXT_WIDTH + 3 * _MARGIN
    heights = [max(max(len(strip), lines[-1][0]) for strip, lines in band) for band in bands]
    size = len(bands[0]) * pitch, sum(heights) + 2 * _MARGIN * len(bands)
    sheet = image.new("RGB", size, _BACKGROUND)
    draw = drawing.Draw(sheet)
    top = _MARGIN
    for band, height in zip(bands, heights, strict=True):
        if top > _MARGIN:
            draw.line([(_MARGIN, top - _MARGIN), (size[0] - _MARGIN, top - _MARGIN)], fill=_RULE)
        for column, (strip, lines) in enumerate(band):
            left = _MARGIN + column * pitch
            sheet.paste(image.fromarray(strip), (left, top))
            for y, line, font, colour in lines:
                at = (left + strip_width + _MARGIN, top + y)
                draw.text(at, line, font=font, fill=colour)
        top += height + 2 * _MARGIN
    return sheet


def _strip(frames: np.ndarray) -> np.ndarray:
    """[H * 2, W', 3]: the chosen frames side by side on the background."""
    count = min(_SHOWN_FRAMES, len(frames))
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    large = frames[chosen].repeat(_SCALE, axis=1).repeat(_SCALE, axis=2)
    gap = np.broadcast_to(np.uint8(_BACKGROUND), (large.shape[1], _FRAME_GAP, 3))
    return np.concatenate([part for frame in large for part in (gap, frame)][1:], axis=1)


def _text(title: str, subtitle: str) -> list[tuple]:
    """Lines (y, text, font, colour); the last one is empty and lies at the bottom."""
    lines, y = [], 0
    for text, (size, colour) in ((title, _TITLE), (subtitle, _SUBTITLE)):
        font = _require("PIL.ImageFont").load_default(size)
        for line in _wrap(text, font):
            lines.append((y, line, font, colour))
            y += size + _LEADING
        y += _LEADING
    return [*lines, (y, "", font, colour)]


def _wrap(text: str, font) -> list[str]:
    """Lines of at most 280 pixels, broken at spaces; a word that is longer is broken anywhere."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= _TEXT_WIDTH:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if font.getlength(lines[-1] + letter) > _TEXT_WIDTH:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`: on success it takes the place of `path`, on error it goes."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"output: the folder of {path} must exist; got {folder}. Create it.")
    partial = folder / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _check_frames(what: str, frames: np.ndarray) -> None:
    is_clip = isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4
    if not is_clip or frames.shape[3] != 3 or frames.size == 0:
        got = f"{getattr(frames, 'dtype', type(frames).__name__)} {getattr(frames, 'shape', '')}"
        raise UsageError(
            f"{what}: frames must be a non-empty uint8 numpy array [N, H, W, 3]; got {got}. "
            "Convert the frames to RGB bytes."
        )


def _check_side(height: int, width: int) -> None:
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"video: width and height must be at most {MAX_SIDE} pixels; got {width}x{height}. "
            "Scale the video down first."
        )


def _accurate() -> int:
    """swscale flags for RGB and YUV; without them a round trip darkens by 1.0 of 255 on average."""
    flags = _require("av.video.reformatter").Interpolation
    return flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT


def _require(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise MissingPackage(
            f"video: package {module.split('.')[0]} must be installed; got {exc}. "
            "Install the extra `video`: pip install 'univigu-engine[video]'."
        ) from exc
