"""docs/cost.md: its tables and pictures are what the code says now, and its figures what they claim
to be."""

import re
from pathlib import Path

import pytest

from bench.pages import cost as page_of_cost
from bench.pages import cost_numbers as numbers
from bench.pages.cost_numbers import AGAIN, CFG, JOINT, ONCE, PROMPT, TEXT, VIDEO, cost, rows
from bench.pages.tables import fill
from engine.errors import UsageError
from engine.planning import flops

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (
    "one\n<!-- generated: a -->\nold\n<!-- end -->\ntwo\n<!-- generated: b, c -->\n<!-- end -->\n"
)


def test_the_page_says_what_the_code_says():
    page = (DOCS / "cost.md").read_text()
    assert fill(page, page_of_cost.tables()) == page


def test_the_page_shows_its_pictures():
    pytest.importorskip("matplotlib")
    from bench.pages.cost_pictures import PICTURES

    shown = re.findall(r"\]\((cost-\w+\.png)\)", (DOCS / "cost.md").read_text())
    assert sorted(shown) == sorted(f"cost-{draw.__name__}.png" for draw in PICTURES)
    assert sorted(shown) == sorted(path.name for path in DOCS.glob("cost-*.png"))
    assert all((DOCS / name).stat().st_size < 120e3 for name in shown)


def test_tables_go_between_their_markers():
    filled = fill(PAGE, {"a": "new", "b, c": r"x \1"})
    assert filled == PAGE.replace("old", "new").replace("c -->\n", "c -->\nx \\1\n")
    assert fill(filled, {"a": "new", "b, c": r"x \1"}) == filled


@pytest.mark.parametrize(
    "page, names",
    [
        (PAGE, "a"),
        (PAGE, "abd"),
        (PAGE + PAGE, "ab"),
        (PAGE.replace("<!-- end -->\ntwo", "two"), "ab"),
        (PAGE.replace("<!-- generated: a -->\n", ""), "b"),
    ],
)
def test_markers_without_tables_and_tables_without_markers_are_refused(page, names):
    tables = {"b, c" if name == "b" else name: "" for name in names}
    with pytest.raises(UsageError, match="markers must be of"):
        fill(page, tables)


def test_writing_changes_what_is_generated_and_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    from pictures import assert_same

    page = (DOCS / "cost.md").read_text()
    bare = re.sub(r"(generated: [^>]+ -->\n).*?(<!-- end)", r"\1\2", page, flags=re.DOTALL)
    (tmp_path / "cost.md").write_text(bare)
    page_of_cost.write(tmp_path)
    assert len(bare) < len(page) and (tmp_path / "cost.md").read_text() == page
    made = sorted(path.name for path in tmp_path.glob("*.png"))
    assert made == sorted(path.name for path in DOCS.glob("cost-*.png"))
    for name in made:
        assert_same(DOCS / name, tmp_path / name)


def test_rows_of_the_sizes():
    assert [rows(size) for size in numbers.SIZES] == [32760, 75600, 171360, 680400]
    assert rows("480p", 17) == 7800


def test_parameters_of_the_networks():
    count = {name: sum(weights) for name, weights in numbers.networks(CFG).items()}
    assert count["joint"] == flops.parameters(CFG)
    assert count["Wan"] == 1_418_996_800
    assert count["joint"] - count["captioner"] == 64 * 1536 + 64 + 2 * 1536
    # What both halves share, attention and the prompt's embedder, is counted twice.
    shared = CFG.layers * (8 * 1536**2 + 8 * 1536 + (6 + 4 + 2) * 1536)
    shared += 4096 * 1536 + 1536 + 1536**2 + 1536
    assert count["Wan"] + count["text alone"] - count["joint"] == shared


def test_flops_of_the_ways():
    """By the whole passes of `engine.planning.flops`, of which the engine leaves out little."""
    V, N = rows("480p"), numbers.STEPS
    alone = flops.forward_flops(CFG, video_rows=V, text_rows=0).total
    joint = flops.forward_flops(CFG, video_rows=V, text_rows=TEXT).total
    cached = 2.42e12
    expected = {
        VIDEO: 2 * N * alone,
        JOINT: 2 * N * joint,
        AGAIN: 2 * N * alone + N * joint,
        ONCE: 2 * N * alone + alone + N * cached,
    }
    for way, total in expected.items():
        assert cost(way, V).flops == pytest.approx(total, rel=0.02)
    assert cost(PROMPT, V).flops - cost(VIDEO, V).flops < 0.5 * N * cached


def test_joint_crosses_where_the_page_says():
    V = rows("480p")
    T = numbers.crossing(V, "seconds")
    assert cost(JOINT, V, T).seconds > cost(ONCE, V, T).seconds
    assert cost(JOINT, V, T - 1).seconds <= cost(ONCE, V, T - 1).seconds
    far = rows("4K")
    by_rule = far / (3 * numbers.STEPS)
    assert numbers.crossing(far, "flops") == pytest.approx(by_rule, rel=0.02)


def test_groups_add_up_to_the_whole():
    for way in numbers.WAYS:
        found = numbers.by_group(way, 7800, TEXT)
        assert sum(found.values()) == pytest.approx(cost(way, 7800).seconds)


def test_what_is_held():
    """By hand, at 480p: K and V of 30 layers and 33016 rows of 1536 in bf16; two networks."""
    held = {way: numbers.held(way, "480p") for way in numbers.WAYS}
    assert held[ONCE]["kept video K and V"] == 30 * 2 * 33016 * 1536 * 2
    assert all(held[way]["kept video K and V"] == 0 for way in (VIDEO, JOINT, AGAIN, PROMPT))
    assert held[JOINT]["weights"] == pytest.approx(2 * 3.05e9, rel=0.02)
    assert held[AGAIN]["weights"] == pytest.approx(2 * (1.42e9 + 3.05e9), rel=0.02)
    assert held[JOINT]["activations of a block"] > held[VIDEO]["activations of a block"]
