"""Small video files with the metadata that cameras, phones and browsers write."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 64, 48
COLOURS = (200, 40, 40), (40, 180, 40), (40, 40, 200), (220, 220, 220)
WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 7: (0.212, 0.087), 9: (0.2627, 0.0593)}
LOSSLESS = {
    "libx264": {"crf": "0"},
    "libx265": {"x265-params": "lossless=1:log-level=none"},
    "libvpx-vp9": {"lossless": "1"},
    "libvpx": {"b": "4000000"},
    "libsvtav1": {"crf": "5", "preset": "10"},
    "mpeg4": {"qscale": "1", "b": "4000000"},
    "mjpeg": {"qscale": "1"},
}


def quarters(colours=COLOURS) -> np.ndarray:
    """uint8 [48,64,C]: a colour in each quarter, so that every turn and mirror shows."""
    picture = np.zeros((HEIGHT, WIDTH, len(colours[0])), np.uint8)
    for (rows, columns), colour in zip(
        [(0, 0), (0, 1), (1, 0), (1, 1)], np.array(colours, np.uint8), strict=True
    ):
        top, left = rows * HEIGHT // 2, columns * WIDTH // 2
        picture[top : top + HEIGHT // 2, left : left + WIDTH // 2] = colour
    return picture


def corners(picture: np.ndarray) -> np.ndarray:
    """int [4,3]: the colours in the middle of the quarters."""
    rows, columns = picture.shape[0] // 4, picture.shape[1] // 4
    at = [(rows, columns), (rows, 3 * columns), (3 * rows, columns), (3 * rows, 3 * columns)]
    return np.array([picture[y, x] for y, x in at], int)


def planes(signal: np.ndarray, matrix: int, full: bool, bits: int) -> list[np.ndarray]:
    """Y, U and V of R'G'B' in 0 to 1, as the standards of H.273 write them."""
    red, blue = WEIGHTS[matrix]
    luma = signal @ (red, 1 - red - blue, blue)
    u = (signal[..., 2] - luma) / (2 - 2 * blue)
    v = (signal[..., 0] - luma) / (2 - 2 * red)
    step, top = 2 ** (bits - 8), 2**bits - 1
    y = luma * top if full else (16 + 219 * luma) * step
    scale = top if full else 224 * step
    return [
        np.round(x).astype(np.uint16) for x in (y, u * scale + 128 * step, v * scale + 128 * step)
    ]


def coded(signal: np.ndarray, matrix=1, full=False, bits=8) -> av.VideoFrame:
    """A frame of yuv444p, of 8 or 10 bits."""
    frame = av.VideoFrame(WIDTH, HEIGHT, "yuv444p" if bits == 8 else f"yuv444p{bits}le")
    frame.colorspace, frame.color_range = matrix, 2 if full else 1
    kind = np.uint8 if bits == 8 else np.dtype("<u2")
    for plane, values in zip(frame.planes, planes(signal, matrix, full, bits), strict=True):
        rows = np.zeros((HEIGHT, plane.line_size // np.dtype(kind).itemsize), kind)
        rows[:, :WIDTH] = values
        plane.update(rows.tobytes())
    return frame


def write(
    path: Path,
    frames: list[av.VideoFrame],
    codec="libx264",
    times=None,
    matrix=None,
    aspect=None,
    options=None,
    movflags=None,
    form=None,
    **tags,
) -> Path:
    """Write a file.

    frames: in the pixel format that the codec gets.
    times: seconds; left out, 8 frames a second.
    matrix: the nine numbers of a display matrix.
    tags: attributes of the codec's context.
    """
    times = [i / 8 for i in range(len(frames))] if times is None else times
    given = {"movflags": movflags} if movflags else {}
    with av.open(str(path), "w", format=form, options=given) as out:
        stream = out.add_stream(codec, rate=8, options=LOSSLESS.get(codec, {}) | (options or {}))
        stream.height, stream.width = frames[0].height, frames[0].width
        stream.pix_fmt = frames[0].format.name
        base = Fraction(1, 100 if codec == "gif" else 8 if codec == "mpeg4" else 24000)
        stream.time_base = stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_matrix(matrix)
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)

        for frame, time in zip(frames, times, strict=True):
            frame.pts, frame.time_base = round(time / base), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def moving(count=17, height=24, width=32, colours=200, seed=0):
    """[N, H, W, 3]: a block pattern of few colours that moves; frames 1 and 2 equal frame 0."""
    rng = np.random.default_rng(seed)
    palette = rng.integers(0, 256, (colours, 3)).astype(np.uint8)
    base = palette[rng.integers(0, colours, (height // 4, width // 4))].repeat(4, 0).repeat(4, 1)
    shifts = [0, 0, 0, *range(1, count)][:count]
    return np.stack([np.roll(base, shift, axis=1) for shift in shifts])


def from_rgb(picture: np.ndarray, pixels: str) -> av.VideoFrame:
    form = "rgba" if picture.shape[-1] == 4 else "rgb24"
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format=form)
    return frame.reformat(format=pixels)


def inserted(data: bytes, parents: list[bytes], box: bytes) -> bytes:
    """An mp4 whose moov comes last, with a box more at the end of the innermost parent."""
    at, end = 0, len(data)
    out, sizes = bytearray(data), []
    for parent in parents:
        at = data.index(parent, at, end) - 4
        end = at + struct.unpack(">I", data[at : at + 4])[0]
        sizes.append(at)
        at += 8
    for place in sizes:
        size = struct.unpack(">I", data[place : place + 4])[0] + len(box)
        out[place : place + 4] = struct.pack(">I", size)
    out[end:end] = box
    return bytes(out)


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + name + body
