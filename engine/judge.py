"""Reads attributes back: from pixels (no model involved) and from captions. The judge of the
embedded model."""

import re

import numpy as np

from engine.scenes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, SIZE, STARTS, signed_distance

FOREGROUND = 60.0  # RGB distance from the background; purple on gray, the closest pair, is 112
MIN_AREA = 25  # pixels; the smallest shape of the set has 78
STILL = 4.0  # pixels; a moving shape travels 12
_WINDOW = np.arange(-14, 15)


def _nearest(value, table: dict[str, tuple]) -> str:
    return min(
        table, key=lambda name: float(np.linalg.norm(np.asarray(value, float) - table[name]))
    )


def _window(mask: np.ndarray, centre) -> np.ndarray:
    """The 29 x 29 pixels of `mask` around `centre` (x, y), zeros outside the frame."""
    ys = _WINDOW[:, None] + int(round(centre[1] - 0.5))
    xs = _WINDOW[None, :] + int(round(centre[0] - 0.5))
    inside = (ys >= 0) & (ys < SIZE) & (xs >= 0) & (xs < SIZE)
    return mask[ys.clip(0, SIZE - 1), xs.clip(0, SIZE - 1)] * inside


def _shape_of(mean_mask: np.ndarray) -> str:
    """The shape whose outline overlaps the averaged mask best (intersection over union, over
    sizes)."""
    best = {}
    for shape in SHAPES:
        for scale in (0.8, 0.9, 1.0, 1.1, 1.2):
            x, y = _WINDOW[None, :] / scale, _WINDOW[:, None] / scale
            template = np.clip(0.5 - signed_distance(shape, x, y) * scale, 0, 1)
            overlap = np.minimum(mean_mask, template).sum() / np.maximum(mean_mask, template).sum()
            best[shape] = max(best.get(shape, 0.0), overlap)
    return max(best, key=best.get)


def read_pixels(frames: np.ndarray) -> dict[str, str | None]:
    """Attributes of a clip uint8 [N, 64, 64, 3]; every value is None where no shape stands out in
    every frame."""
    frames = np.asarray(frames, float)
    border = np.concatenate([frames[:, :2].reshape(-1, 3), frames[:, -2:].reshape(-1, 3)])
    backdrop = np.median(border, 0)
    distance = np.linalg.norm(frames - backdrop, axis=-1)
    masks = distance > FOREGROUND
    if (masks.sum((1, 2)) < MIN_AREA).any():
        return dict.fromkeys(("colour", "shape", "motion", "start", "background"))
    grid = np.arange(SIZE) + 0.5
    area = masks.sum((1, 2))
    centres = np.stack([(masks.sum(1) @ grid) / area, (masks.sum(2) @ grid) / area], 1)
    (dx, dy) = centres[-2:].mean(0) - centres[:2].mean(0)
    if max(abs(dx), abs(dy)) < STILL:
        motion = "stays still"
    else:
        step = (np.sign(dx), 0) if abs(dx) > abs(dy) else (0, np.sign(dy))
        motion = next(name for name, v in MOTIONS.items() if v == step)
    solid = distance > 0.7 * np.percentile(distance[masks], 90)
    return {
        "colour": _nearest(np.median(frames[solid], 0), COLOURS),
        "shape": _shape_of(
            np.mean([_window(m, c) for m, c in zip(masks, centres, strict=True)], 0)
        ),
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
