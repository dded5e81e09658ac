"""`python -m bench caption-time`, and the table that docs/captions.md has of it."""

import json

from bench import caption_time
from bench.harness import record
from bench.pages import captions as page
from bench.pages.tables import fill


def test_every_turn_has_every_stage(tmp_path, monkeypatch):
    monkeypatch.setattr(caption_time, "SIZES", ((5, 32),))
    monkeypatch.setattr(caption_time, "ROUNDS", 1)
    monkeypatch.setattr(caption_time, "STEPS", 2)
    caption_time.write(tmp_path / "found.json")

    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [(row["model"], row["cache"]) for row in rows] == [
        ("embedded", "exact"),
        ("embedded", "frozen"),
        ("wide", "exact"),
        ("wide", "frozen"),
    ]
    for seconds in (row["seconds"] for row in rows):
        assert {*seconds} == {*caption_time.STAGES} and min(seconds.values()) > 0
        parts = sum(seconds[stage] for stage in ("encode", "constants", "steps", "words"))
        assert parts <= seconds["call"] and seconds["first"] < seconds["call"]
    assert page.tables(tmp_path / "found.json")["caption-time"].count("\n") == 7


def test_the_page_has_what_was_measured():
    text = (record.ROOT / "docs" / "captions.md").read_text()
    assert fill(text, page.tables()) == text
