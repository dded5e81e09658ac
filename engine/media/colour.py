"""Frames as RGB for an SDR display, by what they say of their colours.

Three things become BT.709 as a display of gamma 2.2 shows it. The matrix and the range: FFmpeg's
conversion, and for the two others our own, since swscale's to 16 bits is 0.5% off. Primaries: in
linear light, what lies outside BT.709 is clipped. PQ and HLG: linear light, in which the reference
white of BT.2408, 203 nits, becomes 255; what is brighter is clipped:

    PQ   nits = 10000 EOTF(signal)                          (SMPTE ST 2084)
    HLG  nits = 1000 Y^0.2 E, E = inverse OETF(signal)      (BT.2100, for a display of 1000 nits)
    RGB  = 255 clip(BT.709 from BT.2020 (nits / 203), 0, 1)^(1 / 2.2)

Transparent pixels lie over black. What is not in the tables below is refused by its name.
"""

from functools import lru_cache

import numpy as np

from engine.errors import ModelFileError, require

# Numbers of ITU-T H.273, which all containers use. Luma weights of red and blue; None: RGB.
MATRICES = {
    0: None,
    1: (0.2126, 0.0722),
    2: (0.299, 0.114),  # says nothing: FFmpeg reads it as BT.601
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
# Chromaticities of red, green and blue, all around the white D65.
PRIMARIES = {
    1: ("BT.709", (0.640, 0.330, 0.300, 0.600, 0.150, 0.060)),
    5: ("BT.470 BG", (0.640, 0.330, 0.290, 0.600, 0.150, 0.060)),
    6: ("SMPTE 170M", (0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    7: ("SMPTE 240M", (0.630, 0.340, 0.310, 0.595, 0.155, 0.070)),
    9: ("BT.2020", (0.708, 0.292, 0.170, 0.797, 0.131, 0.046)),
    12: ("Display P3", (0.680, 0.320, 0.265, 0.690, 0.150, 0.060)),
    22: ("EBU 3213", (0.630, 0.340, 0.295, 0.605, 0.155, 0.077)),
}
WHITE = 0.3127, 0.3290
UNSAID, BT709, BT2020 = 2, 1, 9
PQ, HLG = 16, 18
SDR = (1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15)  # curves that the same display shows
NAMES = {
    "matrix": {8: "YCgCo", 10: "BT.2020 constant luminance", 11: "SMPTE 2085", 14: "ICtCp"},
    "primaries": {4: "BT.470 M", 8: "film", 10: "SMPTE 428", 11: "SMPTE 431"},
    "transfer": {8: "linear", 9: "log", 10: "log sqrt", 17: "SMPTE 428"},
}
FULL_RANGE = 2
SDR_WHITE, HLG_PEAK, GAMMA = 203.0, 1000.0, 2.2
BAND = 64  # rows that are converted at a time


def accurate() -> int:
    """The flags of swscale for RGB and YUV; without them a round trip darkens by 1 level of 255."""
    flags = require("av.video.reformatter", "video").Interpolation
    return flags.BICUBIC | flags.ACCURATE_RND | flags.FULL_CHR_H_INT


def to_rgb(frame, width: int, path) -> tuple[np.ndarray, list[str]]:
    """A decoded frame as uint8 [H, width, 3], and in words what was done beside matrix and range.

    Errors: ModelFileError, which names a matrix, primaries or a transfer curve outside the tables.
    """
    _check(frame, path)
    done = []
    if frame.color_trc in (PQ, HLG) or _primaries(frame) != BT709:
        rgb = _converted(frame, width)
        if _primaries(frame) != BT709:
            done.append(f"{PRIMARIES[_primaries(frame)][0]} primaries to BT.709")
        if frame.color_trc in (PQ, HLG):
            curve = "PQ" if frame.color_trc == PQ else "HLG"
            done.append(f"{curve} to SDR, {SDR_WHITE:g} nits white, clipped above")
    else:
        rgb = frame.to_ndarray(format="rgb24", width=width, interpolation=accurate())

    if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", width=width, interpolation=accurate())
        alpha = rgba[..., 3:].astype(np.uint16)
        if alpha.min() < 255:
            rgb = ((rgb * alpha + 127) // 255).astype(np.uint8)
            done.append("transparent pixels over black")
    return rgb, done


def _primaries(frame) -> int:
    """The number of the primaries; where nothing is said those of BT.709, or of HDR BT.2020."""
    if frame.color_primaries == UNSAID:
        return BT2020 if frame.color_trc in (PQ, HLG) else BT709
    return frame.color_primaries


def _check(frame, path) -> None:
    said = {
        "matrix": (frame.colorspace, MATRICES),
        "primaries": (_primaries(frame), PRIMARIES),
        "transfer": (frame.color_trc, (*SDR, PQ, HLG)),
    }
    for what, (number, known) in said.items():
        if number not in known:
            name = NAMES[what].get(number, f"number {number} of H.273")
            raise ModelFileError(
                f"video: the colour {what} of {path} is {name}, which is not read. "
                "Convert the file to BT.709."
            )


def _converted(frame, width: int) -> np.ndarray:
    """uint8 [H, width, 3] by way of linear light."""
    signal, weights, offset = _planes(frame, width)
    curve = _light(frame.color_trc)
    to_709 = _to_bt709(_primaries(frame))
    luminance = np.float32([0.2627, 0.6780, 0.0593])

    out = np.empty((*signal.shape[:2], 3), np.uint8)
    for top in range(0, len(signal), BAND):  # a band stays in the cache: 2.5 times as fast
        rgb = signal[top : top + BAND].astype(np.float32) @ weights + offset
        light = curve[(rgb.clip(0, 1) * (len(curve) - 1) + 0.5).astype(np.uint16)]
        if frame.color_trc == HLG:
            light *= (light @ luminance)[..., None] ** np.float32(0.2) * (HLG_PEAK / SDR_WHITE)
        shown = (light @ to_709).clip(0, 1) ** np.float32(1 / GAMMA)
        out[top : top + BAND] = shown * 255 + 0.5
    return out


def _planes(frame, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers [H, width, 3], and the matrix [3, 3] and offset [3] that make RGB in 0 to 1 of
    them."""
    deep = max(part.bits for part in frame.format.components) > 8
    top = 65535 if deep else 255
    if frame.format.is_rgb or frame.format.has_palette:
        name = "gbrp16le" if deep else "rgb24"
        rgb = frame.to_ndarray(format=name, width=width, interpolation=accurate())
        return rgb, np.eye(3, dtype=np.float32) / np.float32(top), np.zeros(3, np.float32)

    name = "yuv444p16le" if deep else "yuv444p"
    yuv = frame.reformat(format=name, width=width, interpolation=accurate()).to_ndarray()
    yuv = yuv if yuv.shape[-1] == 3 else yuv.transpose(1, 2, 0)
    step = 256.0 if deep else 1.0  # of one level of 8 bits
    full = frame.color_range == FULL_RANGE or frame.format.name.startswith("yuvj")
    low, luma, chroma = (0.0, top, top) if full else (16 * step, 219 * step, 224 * step)

    said = frame.colorspace
    unsaid = said == UNSAID and _primaries(frame) == BT2020
    red, blue = MATRICES[BT2020 if unsaid else said]
    green = 1 - red - blue
    u, v = 2 * (1 - blue) / chroma, 2 * (1 - red) / chroma
    y = 1 / luma
    weights = np.array([[y, y, y], [0, -u * blue / green, u], [v, -v * red / green, 0]])
    offset = -np.array([low, 128 * step, 128 * step]) @ weights
    return yuv, weights.astype(np.float32), offset.astype(np.float32)


@lru_cache
def _light(transfer: int) -> np.ndarray:
    """Linear light by signal, float32 [65536]: 1 is the white of SDR, for HLG of the scene."""
    signal = np.linspace(0, 1, 65536)
    if transfer == PQ:
        root = signal ** (32 / 2523)
        share = np.maximum(root - 3424 / 4096, 0) / (2413 / 128 - 2392 / 128 * root)
        light = share ** (16384 / 2610) * 10000 / SDR_WHITE
    elif transfer == HLG:
        above = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(signal <= 0.5, signal**2 / 3, above)
    else:
        light = signal**GAMMA
    return light.astype(np.float32)


@lru_cache
def _to_bt709(primaries: int) -> np.ndarray:
    """float32 [3, 3], to be multiplied from the right."""
    matrix = np.linalg.inv(_to_xyz(BT709)) @ _to_xyz(primaries)
    return matrix.T.astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    corners = np.array(PRIMARIES[primaries][1]).reshape(3, 2)
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in (*corners, WHITE)]).T
    return columns[:, :3] * np.linalg.solve(columns[:, :3], columns[:, 3])
