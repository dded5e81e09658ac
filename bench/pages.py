"""The generated tables and pictures of docs/, from predictions and committed results."""

from pathlib import Path

from bench import cost_page, drawing, growth_page


def write(folder: Path) -> None:
    for page in (drawing, cost_page, growth_page):
        page.write(folder)
