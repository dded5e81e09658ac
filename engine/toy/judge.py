"""Reads attributes back: from pixels (no model involved) and from captions. The judge of the
embedded model."""

import re
from functools import cache

import numpy as np

from engine.toy.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZE, STARTS, signed_distance

FOREGROUND = 60.0  # RGB distance from the background; purple on gray, the closest pair, is 112
MIN_AREA = 60  # pixels; the smallest shape of the set has 211
HALO = 0.35  # share of full contrast that a VAE's blur leaves around an outline
STILL = 3.5  # pixels; of the 8 that a moving shape travels, 7 are between the averaged ends
_WINDOW = np.arange(-16, 17)


def _nearest(value, table: dict[str, tuple]) -> str:
    return min(
        table, key=lambda name: float(np.linalg.norm(np.asarray(value, float) - table[name]))
    )


def _window(mask: np.ndarray, centre) -> np.ndarray:
    """The 33 x 33 pixels of `mask` around `centre` (x, y), zeros outside the frame."""
    ys = _WINDOW[:, None] + int(round(centre[1] - 0.5))
    xs = _WINDOW[None, :] + int(round(centre[0] - 0.5))
    inside = (ys >= 0) & (ys < SIZE) & (xs >= 0) & (xs < SIZE)
    return mask[ys.clip(0, SIZE - 1), xs.clip(0, SIZE - 1)] * inside


def _blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        image = np.apply_along_axis(np.convolve, axis, image, kernel, mode="same")
    return image


@cache
def _templates() -> dict[str, np.ndarray]:
    """Each shape at several sizes and blurs, zero mean and unit norm: [templates, 33 * 33]."""
    table = {}
    for shape in SHAPES:
        images = []
        for scale in (0.8, 0.9, 1.0, 1.1, 1.2):
            x, y = _WINDOW[None, :] / scale, _WINDOW[:, None] / scale
            image = np.clip(0.5 - signed_distance(shape, x, y) * scale, 0, 1)
            images += [image, _blurred(image, 1.0), _blurred(image, 2.0)]
        rows = np.stack(images).reshape(len(images), -1)
        rows -= rows.mean(1, keepdims=True)
        table[shape] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return table


def _shape_of(coverage: np.ndarray) -> str:
    """The shape that correlates best, at some size and blur, with the averaged coverage."""
    centred = (coverage - coverage.mean()).ravel()
    return max(SHAPES, key=lambda shape: (_templates()[shape] @ centred).max())


def read_pixels(frames: np.ndarray) -> dict[str, str | None]:
    """Attributes of a clip uint8 [N, 64, 64, 3]; every value is None unless each frame shows a
    shape."""
    frames = np.asarray(frames, float)
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)])
    backdrop = np.median(border, 0)

    distance = np.linalg.norm(frames - backdrop, axis=-1)
    masks = distance > FOREGROUND
    full = np.percentile(distance[masks], 90) if masks.any() else np.inf
    coverage = ((distance / full - HALO) / (1 - HALO)).clip(0, 1)

    grid = np.arange(SIZE) + 0.5
    area = coverage.sum((1, 2))
    if (masks.sum((1, 2)) < MIN_AREA).any() or (area < MIN_AREA / 4).any():
        return dict.fromkeys(("colour", "shape", "motion", "start", "background"))

    centres = np.stack([(coverage.sum(1) @ grid) / area, (coverage.sum(2) @ grid) / area], 1)
    (dx, dy) = centres[-2:].mean(0) - centres[:2].mean(0)
    if max(abs(dx), abs(dy)) < STILL:
        motion = "stays still"
    else:
        step = (np.sign(dx), 0) if abs(dx) > abs(dy) else (0, np.sign(dy))
        motion = next(name for name, v in MOTIONS.items() if v == step)

    windows = [_window(c, at) for c, at in zip(coverage, centres, strict=True)]
    return {
        "colour": _nearest(np.median(frames[distance > 0.7 * full], 0), COLOURS),
        "shape": _shape_of(np.mean(windows, 0)),
        "motion": motion,
        "start": _nearest(centres[0], STARTS),
        "background": _nearest(backdrop, BACKGROUNDS),
    }


def _find(pattern: str, names, text: str) -> str | None:
    found = re.search(pattern.format("|".join(names)), text)
    return found.group(1) if found else None


def read_caption(text: str) -> dict[str, str | None]:
    """Attributes that a prompt or caption of the set states; None where it doesn't."""
    return {
        "colour": _find(r"\ba ({}) \w+", COLOURS, text),
        "shape": _find(r"\b({})\b", SHAPES, text),
        "motion": _find(r"\b({})\b", MOTIONS, text),
        "start": _find(r"starts at the ({})\b", STARTS, text),
        "background": _find(r"on a ({}) background", BACKGROUNDS, text),
    }
