"""A sheet of frames beside what is said of them, as a picture."""

from pathlib import Path

import numpy as np

from engine.errors import UsageError, require
from engine.files.writing import replacing
from engine.media.video import check_frames

_SHOWN_FRAMES, _SCALE = 5, 2
_MARGIN, _FRAME_GAP, _TEXT_WIDTH, _LEADING = 24, 4, 280, 5
_BACKGROUND, _RULE = (244, 244, 241), (220, 220, 214)
_TITLE, _SUBTITLE = (15, (22, 24, 29)), (13, (85, 91, 102))


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
        check_frames(f"contact sheet, {title!r}", frames)
    cells = [(_strip(frames), _text(title, subtitle)) for title, subtitle, frames in rows]
    sheet = _sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def _sheet(bands: list[list[tuple]]):
    """Lay out cells (strip, lines of text) band below band, with a hairline between bands."""
    image, drawing = require("PIL.Image", "video"), require("PIL.ImageDraw", "video")
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
        font = require("PIL.ImageFont", "video").load_default(size)
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
