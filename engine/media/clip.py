"""The clips that a model takes of a file: its frame rate, its number of frames, its size.

Training (`engine.data.manifest`) and captions sample a file here. It is decoded once, in order, and
frames that no clip takes are dropped without being converted, so a long video takes little memory.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import FRAME_STRIDE, PipelineConfig, check_size
from engine.errors import UsageError
from engine.media.decode import Source, check_interval, damaged, open_video

TINY = 1e-6  # seconds: what containers round away


@dataclass(frozen=True, eq=False)
class Excerpt:
    """A clip as the model takes it.

    frames: uint8 [N,H,W,3].
    start: seconds from the file's first frame to the moment that frame 0 stands for.
    fps: frames a second.
    source: the file, and what was done to it, as plain JSON.
    """

    frames: Tensor
    start: float
    fps: float
    source: dict

    @property
    def end(self) -> float:
        """Seconds from the file's first frame to the end of the last one here."""
        return self.start + len(self.frames) / self.fps

    def taken(self) -> "Excerpt":
        """Itself; see `StreamedClip.taken`."""
        return self


def fit(frames: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 [N,H,W,3] -> uint8 [N,height,width,3]: scaled to cover (bicubic, antialiased), then
    cropped around the centre."""
    rows, columns = frames.shape[1:3]
    scale = max(height / rows, width / columns)
    tall, wide = max(height, round(rows * scale)), max(width, round(columns * scale))
    top, left = (tall - height) // 2, (wide - width) // 2
    out = torch.empty(len(frames), height, width, 3, dtype=torch.uint8)

    for target, frame in zip(out, torch.from_numpy(frames), strict=True):
        if (tall, wide) != (rows, columns):
            pixels = frame.permute(2, 0, 1)[None].float()
            pixels = F.interpolate(pixels, (tall, wide), mode="bicubic", antialias=True)
            frame = pixels[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)
        target.copy_(frame[top : top + height, left : left + width])
    return out


def read_clips(
    path: str | Path,
    config: PipelineConfig,
    start: float = 0.0,
    end: float | None = None,
    every: float | None = None,
    whole: bool = False,
) -> Iterator[Excerpt]:
    """Yield the clip that begins `start` seconds after the first frame; with `every`, one that
    begins every so many seconds until the file's or the interval's end.

    Frame i is the one nearest to start + i / fps, the earlier of two as near; those of `end` and
    later are not taken. Where the file ends before, a clip has fewer frames, 4k+1 of them; after
    the first one a clip has at least 5, since fewer show no motion.

    config: num_frames, fps, height and width are those of the clips.
    whole: refuse a clip that would have fewer frames.

    Errors: UsageError for the interval, the size, and an interval without frames; the others of
    `engine.media.decode.open_video`.
    """
    with closing(_grow(path, config, start, end, every, whole)) as states:
        for _, excerpt in states:
            if excerpt is not None:
                yield excerpt


class StreamedClip:
    """The first clip that `read_clips` would yield, in chunks as they are decoded: a VAE can encode
    them while the file is read.

    path, config, start, end, whole: as of `read_clips`.

    Errors: UsageError for the size.
    """

    def __init__(
        self,
        path: str | Path,
        config: PipelineConfig,
        start: float = 0.0,
        end: float | None = None,
        whole: bool = False,
    ):
        check_size(config.num_frames, config.height, config.width)
        self.path, self.config = path, config
        self._asked = start, end, None, whole
        self._excerpt: Excerpt | None = None

    def chunks(self) -> Iterator[Tensor]:
        """Yield uint8 [n,H,W,3]: the first frame, then four at a time. The next chunk is decoded in
        a thread while one is in use. Closing the generator ends the thread and closes the file.

        Errors: those of `read_clips`, when the chunk's turn comes.
        """
        return _ahead(self._decode())

    def _decode(self) -> Iterator[Tensor]:
        given = 0
        with closing(_grow(self.path, self.config, *self._asked)) as states:
            for frames, excerpt in states:
                while len(frames) - given >= (count := FRAME_STRIDE if given else 1):
                    yield torch.stack(frames[given : given + count])
                    given += count
                if excerpt is not None:
                    self._excerpt = excerpt
                    return

    def taken(self) -> Excerpt:
        """The clip; decodes the file where its chunks were not all taken. Errors: those of
        `read_clips`."""
        if self._excerpt is None:
            for _ in self._decode():
                pass
        return self._excerpt


def _ahead(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same, of which the next one is made in a thread meanwhile."""
    with closing(chunks), ThreadPoolExecutor(1, "univigu-decode") as thread:
        coming = thread.submit(next, chunks, None)
        while (chunk := coming.result()) is not None:
            coming = thread.submit(next, chunks, None)
            yield chunk


def _grow(
    path: str | Path,
    config: PipelineConfig,
    start: float,
    end: float | None,
    every: float | None,
    whole: bool,
) -> Iterator[tuple[list[Tensor], Excerpt | None]]:
    """Yield the frames that the earliest open clip has so far, after each frame of the file; and
    with all of a clip's frames its excerpt. Arguments and errors: as of `read_clips`."""
    check_interval(start, end)
    check_size(config.num_frames, config.height, config.width)
    if every is not None and not every * config.fps >= 1:
        raise UsageError(
            f"video: every must be at least a frame's {1 / config.fps:.3g} seconds; got {every}."
        )

    with open_video(path) as source:
        begins, windows = _begins(start, every), deque()
        begin = next(begins)
        for moment in _moments(source, end):
            while begin is not None and begin <= moment.until:
                windows.append(_Window(begin, config))
                begin = next(begins, None)
            for window in windows:
                window.offer(moment)
            while windows and windows[0].full:
                yield windows[0].frames, windows[0].excerpt(source)
                windows.popleft()
            if windows:
                yield windows[0].frames, None
            if begin is None and not windows:
                return

        least = min(config.num_frames, FRAME_STRIDE + 1)
        got = len(windows[0].frames) if windows else 0
        if begin == start or (whole and got):
            raise _too_short(source, config, start, got)
        for window in windows:
            if window.begin == start or len(window.frames) >= least:
                yield window.frames, window.excerpt(source)


def _begins(start: float, every: float | None) -> Iterator[float]:
    yield start
    count = 0
    while every is not None:
        count += 1
        yield start + count * every


@dataclass
class _Moment:
    """A frame: its number, when it is shown, and until when it is the nearest."""

    source: Source
    frame: object
    index: int
    time: float
    until: float = 0.0
    size: tuple[int, int] | None = None  # as shown
    fitted: Tensor | None = None

    def take(self, config: PipelineConfig) -> Tensor:
        """uint8 [height,width,3], made once for all clips that take the frame."""
        if self.fitted is None:
            picture = np.ascontiguousarray(self.source.picture(self.frame))
            self.size = picture.shape[:2]
            self.fitted = fit(picture[None], config.height, config.width)[0]
        return self.fitted


def _moments(source: Source, end: float | None) -> Iterator[_Moment]:
    held = None
    for time, frame in source.frames():
        if held is not None:
            held.until = (held.time + time) / 2 + TINY
        if end is not None and time >= end:
            break
        if held is not None:
            yield held
        held = _Moment(source, frame, 0 if held is None else held.index + 1, time)
    if held is None:
        raise damaged(source.path, "no frames")

    if not held.until:  # the file's last: half of the mean interval
        interval = held.time / held.index if held.index else 1 / source.rate([])
        held.until = held.time + interval / 2 + TINY
    if end is not None:
        held.until = min(held.until, end - TINY)
    yield held


class _Window:
    """A clip in the making."""

    def __init__(self, begin: float, config: PipelineConfig):
        self.begin, self.config = begin, config
        self.frames: list[Tensor] = []
        self.shown: list[tuple[int, float]] = []  # number and time of each frame
        self.size = 0, 0

    @property
    def full(self) -> bool:
        return len(self.frames) == self.config.num_frames

    def offer(self, moment: _Moment) -> None:
        """Take the frame as often as it is the nearest."""
        while not self.full and self._wanted() <= moment.until:
            self.frames.append(moment.take(self.config))
            self.shown.append((moment.index, moment.time))
            self.size = moment.size

    def _wanted(self) -> float:
        return self.begin + len(self.frames) / self.config.fps

    def excerpt(self, source: Source) -> Excerpt:
        config = self.config
        count = len(self.frames) - (len(self.frames) - 1) % FRAME_STRIDE
        (first, since), (last, until) = self.shown[0], self.shown[count - 1]
        rate = (last - first) / (until - since) if until > since else None
        repeated = count - len(set(self.shown[:count]))
        facts = {
            **source.facts(),
            "frames_per_second": None if rate is None else round(rate, 4),
            "start": round(self.begin, 6),
            "num_frames": count,
            "fps": config.fps,
            "repeated": repeated,
            "done": source.done + self._done(rate, repeated),
        }
        return Excerpt(torch.stack(self.frames[:count]), self.begin, config.fps, facts)

    def _done(self, rate: float | None, repeated: int) -> list[str]:
        """What was done to the frames as they are seen, in words."""
        height, width = self.config.height, self.config.width
        done = []
        if self.size != (height, width):
            rows, columns = self.size
            done.append(f"{columns}x{rows} scaled to cover {width}x{height}, cropped")
        if rate is not None and abs(rate / self.config.fps - 1) > 0.01:
            done.append(f"{rate:.4g} frames a second sampled at {self.config.fps:g}")
        if repeated:
            done.append(f"{repeated} frames repeated")
        return done


def _too_short(source: Source, config: PipelineConfig, start: float, got: int) -> UsageError:
    name = source.path.name
    if not got:
        return UsageError(
            f"video: start must lie inside {name}; got no frame from {start} s on. Lower it."
        )
    return UsageError(
        f"video: {name} must show {config.num_frames} frames at {config.fps:g} a second between "
        f"start and end; got {got}. Lower --num-frames, or raise --fps."
    )
