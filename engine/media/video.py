"""Video files in and out. Frames are uint8 RGB arrays [N, H, W, 3], times are in seconds."""

import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import chain
from numbers import Integral, Real
from pathlib import Path

import numpy as np

from engine.errors import UsageError, require
from engine.files.writing import check_folder, replacing
from engine.media.colour import accurate
from engine.media.decode import check_interval, damaged, open_video
from engine.media.files import check_side

MAX_DECODED_BYTES = 4 << 30
AHEAD = 2  # chunks that wait to be encoded
_BT709, _LIMITED_RANGE = 1, 1


@dataclass(frozen=True)
class Video:
    """Frames uint8 [N, H, W, 3] RGB, and how many of them are shown per second."""

    frames: np.ndarray
    fps: float


def read_video(
    path: str | Path, start: float = 0.0, end: float | None = None, max_frames: int | None = None
) -> Video:
    """Decode the frames shown in [start, end) seconds after the first one, as they are to be seen
    (`engine.media.decode`).

    Frames before `start` are decoded and dropped, so the cost grows with the end of the interval.
    At most `max_frames` frames are accepted (None: what fits in 4 GiB); more are refused, not cut.
    The rate is (n - 1) / (t_last - t_first). An mkv or gif that was cut short looks whole.

    Errors: UsageError for the interval, the number of frames and sides over 8192 pixels;
    ModelFileError for a file that is absent, damaged, no video or without frames, and for what is
    refused by name; MissingPackage.
    """
    check_interval(start, end)
    with open_video(path) as source:
        frames, times, limit = [], [], max_frames
        for time, frame in source.frames():
            if end is not None and time >= end:
                break
            if time < start:
                continue
            if len(frames) == limit:
                raise UsageError(
                    f"video: {source.path.name} must have at most {limit} frames between start and "
                    f"end; got more than {limit}. Choose a shorter interval or raise max_frames."
                )
            frames.append(source.picture(frame))
            times.append(time)
            limit = limit or MAX_DECODED_BYTES // frames[0].nbytes
            if frames[-1].shape != frames[0].shape:
                raise damaged(source.path, "frames of different sizes")

        if not frames and start > 0:
            raise UsageError(
                f"video: start must lie inside {source.path.name}; got no frame from {start} s on. "
                "Lower it."
            )
        if not frames:
            raise damaged(source.path, "no frames")
        return Video(np.stack(frames), source.rate(times))


def write_video(
    path: str | Path, frames: np.ndarray | Iterable[np.ndarray], fps: float = 16.0
) -> None:
    """Write frames uint8 [N, H, W, 3] as .mp4 (h264, yuv420p, BT.709, crf 16) or looping .gif.

    Every frame is written at its own size; the file appears complete or not at all. A GIF has one
    palette, and delays of whole centiseconds that do not drift from `fps`.

    frames: all of them; or, in turn, chunks [n, H, W, 3], which give the same bytes. A chunk of an
        .mp4 is encoded in a thread while the next is made; a .gif takes all chunks first, for its
        palette. What making a chunk raises is raised here.

    Errors: UsageError for suffix, folder, frames, size and rate; MissingPackage.
    """
    path = Path(path)
    check_output(path)
    _check_rate(path, fps)
    chunks = iter([frames] if isinstance(frames, np.ndarray) else frames)
    first = next(chunks, np.empty(0, np.uint8))
    check_frames("video", first)
    check_side(*first.shape[1:3])
    writer = _WRITERS[path.suffix.lower()]
    writer(path, _of_one_size(first, chunks), Fraction(fps).limit_denominator(1001))


def check_output(path: Path) -> None:
    """Errors: UsageError for a suffix or a folder that `write_video` refuses."""
    if path.suffix.lower() not in _WRITERS:
        raise UsageError(
            f"video: the output must end in {' or '.join(_WRITERS)}; got {path.name!r}. Rename it."
        )
    check_folder(path)


def _check_rate(path: Path, fps: float) -> None:
    if not 0.1 <= fps <= 240:
        raise UsageError(
            f"video: fps must be between 0.1 and 240; got {fps}. Give frames per second."
        )
    if path.suffix.lower() == ".gif" and fps > 50:
        raise UsageError(
            f"video: fps must be at most 50 for gif; got {float(fps):g}. "
            "Players replace shorter delays by longer ones: lower it or write an .mp4."
        )


def _of_one_size(first: np.ndarray, later: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    yield first
    for chunk in later:
        check_frames("video", chunk)
        if chunk.shape[1:] != first.shape[1:]:
            raise UsageError(
                f"video: every chunk must have frames of {list(first.shape[1:])}, as the first; "
                f"got {list(chunk.shape[1:])}."
            )
        yield chunk


def _beside(work: Callable[[np.ndarray], None], chunks: Iterable[np.ndarray]) -> None:
    """Runs `work` on the chunks in turn, in a thread, while this thread makes the next ones."""
    waiting = deque()
    with ThreadPoolExecutor(1) as thread:
        for chunk in chunks:
            if len(waiting) == AHEAD:
                waiting.popleft().result()
            waiting.append(thread.submit(work, chunk))
        for job in waiting:
            job.result()


def _write_mp4(path: Path, chunks: Iterator[np.ndarray], fps: Fraction) -> None:
    first = next(chunks)
    height, width = first.shape[1:3]
    if height % 2 or width % 2:
        smaller = f"{max(2, width - width % 2)}x{max(2, height - height % 2)}"
        larger = f"{width + width % 2}x{height + height % 2}"
        raise UsageError(
            f"video: width and height must be even for mp4; got {width}x{height}. "
            f"Crop to {smaller}, pad to {larger}, or write a .gif."
        )
    av = require("av", "video")

    def encode(frames: np.ndarray) -> None:
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame = frame.reformat(
                format="yuv420p",
                dst_colorspace=_BT709,
                dst_color_range=_LIMITED_RANGE,
                interpolation=accurate(),
            )
            container.mux(stream.encode(frame))

    with (
        replacing(path) as partial,
        av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        # With mbtree equal frames gave different files (PyAV 18.1). Without: about 13% more bytes.
        options = {"crf": "16", "mbtree": "0"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE

        container.start_encoding()  # so that a file that cannot be written is no late surprise
        _beside(encode, chain([first], chunks))
        container.mux(stream.encode())


def _write_gif(path: Path, chunks: Iterator[np.ndarray], fps: Fraction) -> None:
    av, image = require("av", "video"), require("PIL.Image", "video")
    clip = [*chunks]
    palette, argb = _shared_palette(image, np.concatenate(clip))
    # Not Pillow's own writer, which merges equal neighbours: 5 frames, 3 alike, came back as 3.
    with (
        replacing(path) as partial,
        av.open(str(partial), "w", format="gif", options={"loop": "0"}) as container,
    ):
        stream = container.add_stream("gif", rate=100)
        stream.height, stream.width, stream.pix_fmt = *clip[0].shape[1:3], "pal8"

        for index, rgb in enumerate(chain.from_iterable(clip)):
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


def _plain(value: object) -> int | float:
    """NumPy's numbers as Python's, for json."""
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


def write_sidecar(path: str | Path, record: dict) -> Path:
    """Write `record` as JSON beside the video `path` (clip.mp4: clip.json) and return that path.

    The file appears complete or not at all. Errors: UsageError that names the key whose value is
    not plain (str, whole or finite number, bool, None, lists and dicts of them).
    """
    target = Path(path).with_suffix(".json")
    encode = partial(json.dumps, allow_nan=False, ensure_ascii=False, default=_plain)
    for key, value in record.items():
        try:
            encode({key: value}).encode()
        except (TypeError, ValueError) as exc:
            raise UsageError(
                f"sidecar: {key!r} must be plain JSON; got {type(value).__name__} ({exc}). "
                "Convert it to str, int, float, bool, list or dict."
            ) from exc
    with replacing(target) as unfinished:
        unfinished.write_text(encode(record, indent=2) + "\n", "utf-8")
    return target


def check_frames(what: str, frames: np.ndarray) -> None:
    is_clip = isinstance(frames, np.ndarray) and frames.dtype == np.uint8 and frames.ndim == 4
    if not is_clip or frames.shape[3] != 3 or frames.size == 0:
        got = f"{getattr(frames, 'dtype', type(frames).__name__)} {getattr(frames, 'shape', '')}"
        raise UsageError(
            f"{what}: frames must be a non-empty uint8 numpy array [N, H, W, 3]; got {got}. "
            "Convert the frames to RGB bytes."
        )
