"""The soak of a server at a small scale, and what it would find at any."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import environment

from bench.pages import server as page
from bench.pages import soak
from bench.pages.tables import fill

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests" / "soak"


@pytest.fixture(scope="module")
def traffic():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("soak_traffic", FOLDER / "traffic.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where its dataclasses look for their names
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_a_small_soak_finds_nothing(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, FOLDER / "run.py", "--only", "requests", "--database", "SQLite"]
    command += ["--scale", "0.005", "--output-path", path]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads(path.read_text())["parts"].values()
    assert (part["trials"], part["clients"], part["faults"]) == (5, 5, [])
    assert part["scrapes"] > 0 and part["memory, MB"][-1]["jobs"] == 5


def test_a_gauge_that_cannot_be_right_is_found(traffic):
    """Three jobs at second 10: one is done, one runs, one waits."""
    moments = (0, 1, 2, 3, 9), (0, 1, float("inf"), 4, 20), (0, 1, float("inf"), 21, 30)
    names = "sent", "accepted", "seen", "began", "ended"
    jobs = [traffic.Job({}, **dict(zip(names, one, strict=True))) for one in moments]
    right = {"queued": 1, "in_progress": 1, "completed": 1, "failed": 0}
    for queued in (0, 1, 2, 3):
        found = right | {"queued": queued, "in_progress": 2 - queued}
        faults = traffic.wrong(jobs, traffic.Scrape(10, 11, found))
        assert bool(faults) == (queued not in (1, 2)), faults
    for change in ({"completed": 0}, {"completed": 2}, {"failed": 1}, {"in_progress": 0}):
        assert traffic.wrong(jobs, traffic.Scrape(10, 11, right | change))
    assert not traffic.wrong(jobs, traffic.Scrape(10, 11, right))


def test_the_page_says_what_was_found():
    text = (ROOT / "docs" / "server.md").read_text()
    assert fill(text, page.tables()) == text
    parts = soak.read()["parts"].values()
    assert [fault for part in parts for fault in part["faults"]] == []


def test_a_part_that_was_not_run_is_named():
    found = soak.read()
    shown = soak.rows(found)
    del found["parts"]["requests, SQLite"]
    assert "Not run: requests, SQLite" in " ".join(soak.rows(found).split())
    assert "Not run: requests, SQLite" not in " ".join(shown.split())


def test_a_fault_is_shown():
    found = soak.read()
    found["parts"]["requests, SQLite"]["faults"] = ["one", "two"]
    line = next(line for line in soak.rows(found).splitlines() if "ask for small videos" in line)
    assert "| **2** |" in line
