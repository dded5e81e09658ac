"""The generated tables and pictures of docs/ and README: predictions and committed results."""

from pathlib import Path

from bench.pages import cost, drawing, growth, readme, rooms


def write(folder: Path) -> None:
    for page in (drawing, cost, growth, readme, rooms):
        page.write(folder)
