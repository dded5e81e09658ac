"""The generated tables and pictures of docs/ and README: predictions and committed results."""

from pathlib import Path

from bench import cost_page, drawing, growth_page, readme_page


def write(folder: Path) -> None:
    for page in (drawing, cost_page, growth_page, readme_page):
        page.write(folder)
