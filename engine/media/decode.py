"""Video files, frame by frame: when each frame is shown, and how it is to be seen.

Honoured are the frames' own times, edit lists (by FFmpeg), the whole display matrix, the pixels'
aspect ratio, and colours and transparency (`engine.media.colour`). Oblique angles, two views in one
picture and spherical views are refused by name.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from engine.errors import ModelFileError, UsageError, require
from engine.media.colour import to_rgb
from engine.media.files import check_side

# Closed lists: left to itself FFmpeg also opens playlists, addresses and, as "ansi" video, text.
OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,webm,avi,gif,mpegts,mpeg,ogg,flv",
    "protocol_whitelist": "file",
}
WITH_ALPHA = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own decoders drop the alpha channel
TWO_VIEWS = {
    1: "side by side",
    2: "above each other",
    4: "in a checkerboard",
    5: "in a quincunx",
    6: "in alternate lines",
    7: "in alternate columns",
}


class Source:
    """An open video. `frames` decodes it once, `picture` makes pixels of the frames to be kept.

    done: in words, what was done to the pictures so far.
    """

    def __init__(self, path: Path, container):
        if not container.streams.video:
            raise damaged(path, "no video stream")
        self.path, self.container = path, container
        self.stream = container.streams.video[0]
        codec = self.stream.codec_context
        if codec is None or not codec.height or not codec.width:
            raise damaged(path, "an unknown codec or frame size")
        check_side(codec.height, codec.width)

        self.done: list[str] = []
        self.stream.thread_type = "AUTO"
        self._decoder = _decoder_with_alpha(path, self.stream)

    def frames(self) -> Iterator[tuple[float, object]]:
        """Yield (seconds since the first frame, frame); refuse the damage that FFmpeg would
        conceal."""
        first = last = None
        for packet in self.container.demux(self.stream):
            if packet.is_corrupt:
                raise damaged(self.path, "a damaged or cut packet")
            for frame in self._decode(packet):
                time = self._time(frame, last)
                if frame.is_corrupt or time is None:
                    raise damaged(self.path, "a damaged frame")
                check_side(frame.height, frame.width)
                first = time if first is None else first
                if last is not None and time < last:
                    raise damaged(self.path, "frames whose times run backwards")
                last = time
                yield time - first, frame

    def _time(self, frame, last: float | None) -> float | None:
        """Seconds. An AVI has no times of presentation, and FFmpeg's guess shuffles B-frames: the
        times of decoding are right up to a shift."""
        if self.container.format.name != "avi":
            return frame.time
        if frame.dts is not None:
            return float(frame.dts * frame.time_base)
        return frame.time if last is None else last + 1 / self.rate([])

    def _decode(self, packet):
        if self._decoder is None:
            return packet.decode()
        return self._decoder.decode(packet if packet.size else None)

    def picture(self, frame) -> np.ndarray:
        """uint8 [H, W, 3], upright, of square pixels, BT.709."""
        data = {item.type.name: bytes(item) for item in frame.side_data}
        self._refuse_views(data)
        aspect = self.stream.sample_aspect_ratio
        width = frame.width
        if aspect and aspect != 1:
            width = max(1, round(width * aspect))
            check_side(frame.height, width)
            self._say(f"pixels of {aspect.numerator}:{aspect.denominator} made square")

        rgb, done = to_rgb(frame, width, self.path)
        for words in done:
            self._say(words)
        if frame.interlaced_frame:
            self._say("interlaced fields left as they are")
        if "DISPLAYMATRIX" in data:
            rgb = self._upright(rgb, np.frombuffer(data["DISPLAYMATRIX"], np.int32)[:9])
        return rgb

    def _upright(self, rgb: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """Apply the matrix of a track's header, by which (x, y) is shown at (a x + c y, b x + d y)
        up to a shift and a scale (ISO/IEC 14496-12)."""
        a, b, _, c, d = (matrix / 65536).tolist()[:5]
        turned = abs(b) > abs(a)
        right, down = (c, b) if turned else (a, d)
        crossed = max(abs(a), abs(d)) if turned else max(abs(b), abs(c))
        if crossed > 0.02 * min(abs(right), abs(down)):
            angle = math.degrees(math.atan2(b, a))
            raise ModelFileError(
                f"video: {self.path} is to be turned by {angle:.1f} degrees, which is not done. "
                "Turn it by a multiple of 90 degrees."
            )

        mirrored = a * d - b * c < 0
        if mirrored:
            self._say("mirrored")
        flips = turned, right < 0, down < 0
        degrees = {  # clockwise, after the mirror, which swaps left and right
            (False, mirrored, False): 0,
            (True, True, mirrored): 90,
            (False, not mirrored, True): 180,
            (True, False, not mirrored): 270,
        }[flips]
        if degrees:
            self._say(f"turned by {degrees} degrees clockwise")
        rgb = rgb.swapaxes(0, 1) if turned else rgb
        return rgb[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]

    def _refuse_views(self, data: dict[str, bytes]) -> None:
        layout = int.from_bytes(data.get("STEREO3D", b"\0")[:4], "little")
        found = f"two views {TWO_VIEWS[layout]}" if layout in TWO_VIEWS else None
        found = "a spherical view" if "SPHERICAL" in data else found
        if found:
            raise ModelFileError(
                f"video: {self.path} holds {found}, which is not read. Render one flat view of it."
            )

    def _say(self, words: str) -> None:
        if words not in self.done:
            self.done.append(words)

    def facts(self) -> dict:
        """Container, codec, width and height as coded, and seconds (None where it does not say)."""
        codec, duration = self.stream.codec_context, self.container.duration
        return {
            "container": self.container.format.name,
            "codec": codec.name,
            "size": [codec.width, codec.height],
            "duration": None if duration is None else round(duration / 1e6, 3),
        }

    def rate(self, times: list[float]) -> float:
        """Frames a second of frames shown at `times`; what the file states where there is but
        one."""
        if len(times) > 1 and times[-1] > times[0]:
            return (len(times) - 1) / (times[-1] - times[0])
        rate = self.stream.average_rate or self.stream.guessed_rate
        if not rate or len(times) > 1:  # several frames at one time
            raise damaged(self.path, "no frame rate")
        return float(rate)


def _decoder_with_alpha(path: Path, stream):
    """A decoder that keeps the alpha channel of a WebM file that has one; else None."""
    if stream.metadata.get("alpha_mode") != "1":
        return None
    av, name = require("av", "video"), WITH_ALPHA.get(stream.codec_context.name)
    try:
        return av.CodecContext.create(name or "none", "r")
    except (av.FFmpegError, ValueError):
        raise ModelFileError(
            f"video: {path} has an alpha channel that this PyAV cannot decode; got codec "
            f"{stream.codec_context.name}. Lay it over a background first."
        ) from None


@contextmanager
def open_video(path: str | Path) -> Iterator[Source]:
    """The file's first video stream. Errors, while it is read too: ModelFileError for a file that
    is absent, damaged or no video; UsageError for sides over 8192 pixels; MissingPackage."""
    av = require("av", "video")
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(f"video: path must be a file; got {path}. Check its spelling.")
    if not path.stat().st_size:  # some of /proc's seem empty and wait for ever
        raise damaged(path, "an empty file")
    try:
        # Absolute, for FFmpeg reads "concat:x" as a protocol.
        source = str(path.resolve())
        with av.open(source, options=OPEN_OPTIONS, metadata_errors="ignore") as container:
            yield Source(path, container)
    except (av.FFmpegError, OSError) as exc:
        raise damaged(path, getattr(exc, "strerror", None) or "unreadable data") from exc


def damaged(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        f"video: {path} must be a video file that decodes without damage; got {found}. "
        "Check the file, or convert it to mp4 (h264)."
    )


def check_interval(start: float, end: float | None) -> None:
    """Errors: UsageError for what is no interval in seconds."""
    if not 0 <= start < math.inf or (end is not None and not start < end):
        raise UsageError(
            f"video: start and end must satisfy 0 <= start < end; got start={start}, end={end}. "
            "Give both in seconds."
        )
