"""The generated tables and pictures of docs/, and README's: predictions and committed results."""

from pathlib import Path

from bench.pages import clip, cost, drawing, growth, measured, reliability, rooms, server, serving


def write(folder: Path) -> None:
    for page in (clip, drawing, cost, growth, measured, reliability, rooms, server, serving):
        page.write(folder)
