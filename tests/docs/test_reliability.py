"""docs/reliability.md: its tables are those of the committed result of `make torture`."""

import json
from pathlib import Path

import pytest

from bench.pages import reliability
from bench.pages.tables import fill
from engine.errors import UsageError

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_says_what_was_found():
    page = (DOCS / "reliability.md").read_text()
    assert fill(page, reliability.tables(reliability.read())) == page


def test_the_result_is_of_the_counts_that_are_said_and_has_no_fault():
    found = reliability.read()
    trials = {name: part["trials"] for name, part in found["parts"].items()}
    whole = {"corruptions": 2000, "hostile files": 500, "kills": 60, "full disks": 20}
    whole |= {"threaded clips": 200}
    assert trials == {name: round(found["scale"] * count) for name, count in whole.items()}
    assert [fault for part in found["parts"].values() for fault in part["faults"]] == []


def test_a_fault_is_shown_and_every_verdict_counted():
    part = {"trials": 9, "faults": [{}], "by subject": {"a": {"equal": 3, "fault": 1}}}
    part["by subject"]["b"] = {"equal": 4, "refused": 1}
    assert reliability.last(part) == "**1 wrong**; 7 equal; 1 refused"
    assert reliability.last({"trials": 9, "faults": [], "by end": {}}) == "0 wrong; 9 right"


@pytest.mark.parametrize("parts", [{}, {"corruptions": {}}])
def test_a_part_of_the_torture_is_no_evidence(tmp_path, parts):
    found = json.loads(reliability.RESULT.read_text()) | {"parts": parts}
    (tmp_path / "found.json").write_text(json.dumps(found))
    with pytest.raises(UsageError, match="all parts of `make torture`; got (none|corruptions)"):
        reliability.read(tmp_path / "found.json")
