"""bench/gpu.sh without a GPU: a stand-in for Python notes what it is asked and succeeds, fails or
hangs, as the variable STUB says of each kind of call."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/bash
case "$*" in
    -) cat > /dev/null; kind=device ;;
    *xdist*) kind=xdist; echo 3 ;;
    *build_ext*) kind=build ;;
    "-m pytest "*) kind=tests; echo "tests/a.py::one PASSED" ;;
    "-m engine bench "*) kind=$4; echo "figure of $kind" ;;
esac
echo "$kind" >> "$CALLS"
case " $STUB " in
    *" $kind=hang "*) exec sleep 20 ;;
    *" $kind=red "*) echo "tests/a.py::two FAILED"; exit 1 ;;
    *" $kind=fail "*) echo "no such thing"; exit 1 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    python = tmp_path / "a python"
    python.write_text(STUB)
    python.chmod(0o755)
    env = os.environ | {"PYTHON": str(python), "CALLS": str(tmp_path / "calls")}
    out = tmp_path / "out"

    def start(*parts: str, **variables: str) -> subprocess.Popen:
        command = [str(ROOT / "bench/gpu.sh"), str(out), *parts]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=env | variables, start_new_session=True, **options)

    def calls() -> list[str]:
        return (tmp_path / "calls").read_text().split()

    return start, calls, out


def test_parts_run_in_the_order_given(script):
    start, calls, out = script
    process = start("figures", "tests", "ops", "scale")
    shown = process.communicate()[0]
    assert process.returncode == 0, shown
    order = ["infer", "caption", "train", "xdist", "tests", "ops", "scale"]
    assert calls() == ["device", "build", *order]
    assert (out / "figures-infer.log").read_text() == "figure of infer\n"
    assert (out / "ops.log").read_text() == "figure of ops\n"
    assert not (out / "left-out.log").exists() and "tests is not asked" not in shown


def test_a_name_that_is_no_part_runs_nothing(script):
    start, _, out = script
    process = start("ops", "all")
    assert "PART must be figures, tests" in process.communicate()[0]
    assert process.returncode == 2 and not out.exists()


def test_without_a_device_nothing_runs(script):
    start, calls, _ = script
    process = start("ops", STUB="device=fail")
    process.communicate()
    assert process.returncode == 1 and calls() == ["device"]


def test_a_failed_build_is_said_and_the_others_are_measured(script):
    start, calls, out = script
    process = start("caption", STUB="build=fail")
    shown = process.communicate()[0]
    assert process.returncode == 0 and calls()[-1] == "caption"
    assert "no such thing" in shown and "was not built" in (out / "left-out.log").read_text()


@pytest.mark.parametrize("anyway", ["0", "1"])
def test_after_red_tests_nothing_is_timed(script, anyway):
    start, calls, _ = script
    process = start("infer", "tests", "ops", STUB="tests=red", TIME_ANYWAY=anyway)
    shown = process.communicate()[0]
    assert process.returncode == 1
    assert calls()[2:] == ["infer", "xdist", "tests", *(["ops"] if anyway == "1" else [])]
    assert ("nothing is timed" in shown) == (anyway == "0")


def test_a_part_that_hangs_ends_at_its_limit(script):
    """Tests that did not end are not red; a benchmark's limit is its own."""
    start, calls, out = script
    begun = time.monotonic()
    process = start("tests", "figures", STUB="tests=hang infer=hang", PART_SECONDS="8")
    shown = process.communicate()[0]
    assert time.monotonic() - begun < 30 and process.returncode == 1
    assert calls()[2:] == ["xdist", "tests", "infer", "caption", "train"]
    assert "none of those that ran is red" in shown
    left = (out / "left-out.log").read_text()
    assert "pytest" in left and "bench infer" in left and "bench train" not in left
    assert "one PASSED" in (out / "tests.log").read_text()


def test_killed_in_the_middle_it_leaves_what_it_had(script):
    start, calls, out = script
    process = start("ops", "scale", STUB="scale=hang")
    until = time.monotonic() + 60
    log = out / "scale.log"
    while not (log.exists() and log.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert (out / "ops.log").read_text() == "figure of ops\n"
    assert log.read_text() == "figure of scale\n" and calls()[-1] == "scale"
