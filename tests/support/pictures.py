"""A committed picture against one that was just drawn."""

from pathlib import Path

import matplotlib
from matplotlib.image import imread

ROOT = Path(__file__).resolve().parents[2]


def assert_same(committed: Path, drawn: Path) -> None:
    """Pixels, where matplotlib is the version that drew the committed one."""
    if f"matplotlib=={matplotlib.__version__}\n" not in (ROOT / "constraints.txt").read_text():
        return
    old, new = imread(committed), imread(drawn)
    assert old.shape == new.shape, f"{committed.name} is stale: run make pages"
    changed = (abs(old - new) > 0.1).mean()
    assert changed < 1e-3, f"{committed.name} is stale in {changed:.1%} of it: run make pages"
