"""The generated tables and pictures of docs/, and README's: predictions and committed results."""

from pathlib import Path

from bench.pages import (
    captions,
    clip,
    cost,
    drawing,
    growth,
    measured,
    reliability,
    rooms,
    server,
    serving,
)

PAGES = captions, clip, drawing, cost, growth, measured, reliability, rooms, server, serving


def write(folder: Path) -> None:
    for page in PAGES:
        page.write(folder)
