"""docs/growth.md: its tables and pictures are what the code says now, and its limits are limits."""

import json
import re
from pathlib import Path

import pytest

from bench.harness import record
from bench.harness.models import ENGINE
from bench.pages import growth as page
from bench.pages import growth_numbers as numbers
from bench.pages.cost_numbers import SIZES, rows
from bench.pages.tables import fill
from bench.roofline import H100
from engine.errors import UsageError
from engine.planning import memory
from engine.planning.memory import DECODING, DENOISING, ENCODING

DOCS = Path(__file__).resolve().parents[2] / "docs"
LETTERS = {"D": DENOISING, "V": DECODING, "E": ENCODING}
LIMITS = re.findall(r"^\| (1\.3B|14B), (.*?) \| (.*) \|$", page.limits_table(), re.M)


def needs(model: str, size: str, frames: int, **fields) -> dict[str, int]:
    """GB by stage, of the engine's own estimate."""
    height, width = SIZES[size]
    fields = {"mode": "t2vt"} | fields
    job = memory.Job(num_frames=frames, height=height, width=width, **fields)
    sums = memory.peaks(memory.estimate(numbers.MODELS[model], job))
    return {stage: held / 1e9 for stage, held in sums.items()}


def test_the_page_says_what_the_code_says():
    text = (DOCS / "growth.md").read_text()
    assert fill(text, page.tables()) == text


def test_writing_is_the_same_every_time(tmp_path):
    pytest.importorskip("matplotlib")
    from pictures import assert_same

    text = (DOCS / "growth.md").read_text()
    bare = re.sub(r"(generated: [^>]+ -->\n).*?(<!-- end)", r"\1\2", text, flags=re.DOTALL)
    made = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        (folder / "growth.md").write_text(bare)
        paths = page.write(folder)
        assert sorted(paths) == sorted(folder.iterdir())
        made.append({path.name: path.read_bytes() for path in paths})
    assert made[0] == made[1] and made[0]["growth.md"].decode() == text
    shown = re.findall(r"\]\((growth-\w+\.png)\)", text)
    assert sorted([*shown, "growth.md"]) == sorted(made[0])
    assert sorted(shown) == sorted(path.name for path in DOCS.glob("growth-*.png"))
    assert all(len(data) < 120e3 for data in made[0].values())
    for name in shown:
        assert_same(DOCS / name, tmp_path / "a" / name)


def frames_of(said: str) -> int:
    """The only number 4k + 1 that is as long as a cell says."""
    if not said.endswith(" s"):
        return {"nothing": 0, "1 frame": 1}[said]
    return 4 * round((float(said[:-2]) * numbers.FPS - 1) / 4) + 1


@pytest.mark.parametrize("model, flags, cells", LIMITS)
def test_the_longest_video_fits_and_four_frames_more_do_not(model, flags, cells):
    places = [(gpu, size) for gpu in (80, 141) for size in numbers.SHOWN]
    fields = (numbers.FLAGS | numbers.CAPTION_FLAGS)[flags]
    for (gigabytes, size), cell in zip(places, cells.split(" | "), strict=True):
        frames, stage = frames_of(cell[:-2]), LETTERS[cell[-1]]
        if frames:
            assert max(needs(model, size, frames, **fields).values()) <= gigabytes
        longer = needs(model, size, frames + 4 if frames else 1, **fields)
        assert longer[stage] == max(longer.values()) > gigabytes


def test_all_limits_are_checked():
    assert len(LIMITS) == 2 * (6 + 4)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_need_more_from_where_the_page_says(size):
    frames = numbers.tiles_need_more(size)
    for n, more in ((frames, True), (frames - 4, False)):
        whole = needs("1.3B", size, n)[DECODING]
        assert (needs("1.3B", size, n, vae_tiling=True)[DECODING] > whole) == more


def test_time_grows_with_the_square_of_long_videos():
    V = rows("1080p", 1921)
    forward, step, attention = numbers.cost("1.3B", V)
    assert 4 * numbers.cost("1.3B", V // 2).step == pytest.approx(step, rel=0.01)
    # 4 L L D FLOP a layer at 700 TFLOP/s, of two samples
    assert 2 * 30 * 4 * V * V * 1536 / 700e12 == pytest.approx(step, rel=0.02)
    assert 2 * forward == pytest.approx(step, rel=0.02) and 0.98 < attention < 1
    assert numbers.cost("1.3B", V, H100, None).step < step


@pytest.mark.parametrize(
    "seconds, said",
    [(0.04321, "0.0432 s"), (1, "1.00 s"), (119.6, "120 s"), (180, "3.00 min"), (7200, "2.00 h")]
    + [(48 * 3600, "2.00 days"), (4e7, "463 days")],
)
def test_spans(seconds, said):
    assert numbers.span(seconds) == said


def scale_row(implementation: str, x: int, seconds: float, **more) -> dict:
    row = {"along": "rows", "implementation": implementation, "x": x, "seconds": seconds}
    return row | {"low": 0.9 * seconds, "high": 1.1 * seconds, "predicted": 0.8 * seconds} | more


def test_measured_times_become_a_table(tmp_path, monkeypatch):
    rows = [scale_row("plain PyTorch", 256, 0.4), scale_row("engine", 512, 0.3, predicted=None)]
    rows += [scale_row("engine", 256, 0.1), scale_row("engine", 3, 9, along="frames")]
    environment = {"device": "a CPU", "threads": 2, "commit": "abc", "changed": []}
    setting = {"device": "cpu", "preset": "small", "text_rows": 64, "context_rows": 512}
    table = {"schema": 2, "rows": rows, "environment": environment, "setting": setting}
    monkeypatch.setattr(page, "SCALE", tmp_path / "cpu-scale.json")
    assert page.measured() == "Not measured yet."
    page.SCALE.write_text(json.dumps(table))
    said = page.measured()
    assert "| 256 | 100 ms | 90.0 ms to 110 ms | 80.0 ms | 0.80 |  | 400 ms |\n| 512 |" in said
    assert "| 512 | 300 ms | 270 ms to 330 ms |  |  | 1.58 | not run |" in said
    assert "a CPU, 2 threads, commit abc. " in said and "6 layers of width 512" in said
    page.SCALE.write_text(json.dumps(table | {"setting": setting | {"device": "cuda"}}))
    with pytest.raises(UsageError, match="cpu-scale.json must be of a CPU; got device 'cuda'"):
        page.measured()


def gap(row: dict) -> float:
    return abs(row["predicted"] / row["seconds"] - 1)


def test_predictions_are_within_a_quarter_of_measured_times():
    """From 1024 rows on. Below, products are too short for the rate of large ones: 24% and 35% too
    low at 512 and 256 rows, which the page says."""
    found = [row for row in record.read(page.SCALE)["rows"] if row["along"] == "rows"]
    ours = [row for row in found if row["implementation"] == ENGINE and row["x"] >= 1024]
    assert sorted(row["x"] for row in ours) == [1024, 2048, 4096, 8192, 16384]
    worst = max(ours, key=gap)
    assert gap(worst) <= 0.25, f"{gap(worst):.0%} off at {worst['x']} rows"
