"""bench/gpu.sh without a GPU: a stand-in for Python notes what it is asked and succeeds, fails or
hangs, as the variable STUB says of each kind of call; and the parts themselves on a CPU."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/bin/bash
case "$*" in
    -) cat > /dev/null; kind=device ;;
    *xdist*) kind=xdist; echo 3 ;;
    *_compiled*) kind=module ;;
    *build_ext*) kind=build ;;
    "-m pytest "*) kind=tests; echo "tests/a.py::one PASSED" ;;
    "-m engine bench "*) kind=$4; echo "figure of $kind" ;;
esac
echo "$kind" >> "$CALLS"
case " $STUB " in
    *" $kind=hang "*) exec sleep 20 ;;
    *" $kind=deaf "*) trap "" INT; sleep 20 ;;
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
    out, tree = tmp_path / "out", tmp_path / "tree"
    for folder in ("bench", "csrc", "kernels/univigu_kernels"):
        (tree / folder).mkdir(parents=True)
    shutil.copy(ROOT / "bench/gpu.sh", tree / "bench")
    (tree / "setup.py").touch()

    def start(*parts: str, **variables: str) -> subprocess.Popen:
        command = [str(tree / "bench/gpu.sh"), str(out), *parts]
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
    order = ["infer", "caption", "train", "around", "xdist", "tests", "ops", "scale"]
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


@pytest.mark.parametrize(
    "age, module, build, asked",
    [
        (0, "", "", ["module"]),
        (60, "", "", ["module", "build"]),  # its sources are newer
        (60, "", "0", ["module"]),
        (0, "", "1", ["build"]),
        (0, "module=fail", "", ["module", "build"]),
        (0, "module=fail", "0", ["module"]),
    ],
)
def test_a_module_that_was_brought_along_is_used_where_it_fits(script, age, module, build, asked):
    start, calls, out = script
    path = out.parent / "tree/kernels/univigu_kernels/_C.so"
    path.touch()
    os.utime(path, (time.time() - age,) * 2)
    process = start("caption", STUB=module, BUILD=build)
    shown = process.communicate()[0]
    assert process.returncode == 0 and calls() == ["device", *asked, "caption"], shown
    assert ("is used" in shown) == (asked == ["module"] and not module)
    assert path.exists() == (not module) == (not (out / "_C.so").exists())
    assert ("BUILD=0 and no compiled module" in shown) == (build == "0" and bool(module))


@pytest.mark.parametrize("anyway", ["0", "1"])
def test_after_red_tests_nothing_is_timed(script, anyway):
    start, calls, _ = script
    process = start("infer", "tests", "ops", STUB="tests=red", TIME_ANYWAY=anyway)
    shown = process.communicate()[0]
    assert process.returncode == 1
    assert calls()[2:] == ["infer", "xdist", "tests", *(["ops"] if anyway == "1" else [])]
    assert ("nothing is timed" in shown) == (anyway == "0")


@pytest.mark.parametrize("how", ["hang", "deaf"])
def test_a_part_that_hangs_ends_at_its_limit(script, how):
    """Tests that did not end are not red, also where they do not hear that they should; a
    benchmark's limit is its own."""
    start, calls, out = script
    begun = time.monotonic()
    process = start("tests", "figures", STUB=f"tests={how} infer=hang", PART_SECONDS="8")
    shown = process.communicate()[0]
    assert time.monotonic() - begun < 30 and process.returncode == 1
    assert calls()[2:] == ["xdist", "tests", "infer", "caption", "train", "around"]
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


def test_killed_while_it_builds_nothing_goes_on(script):
    start, calls, out = script
    process = start("ops", STUB="build=hang")
    while not (out.parent / "calls").exists() or calls()[-1] != "build":
        time.sleep(0.05)
    process.kill()
    assert not marked_after(process.pid)


def marked(pid: int) -> list[str]:
    """Command lines of what a gpu.sh of this id started and what still runs."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\0UNIVIGU_LANE={pid}.".encode() in b"\0" + (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it ended, or is another user's
            continue
    return found


def marked_after(pid: int, seconds: float = 10) -> list[str]:
    until = time.monotonic() + seconds
    while (found := marked(pid)) and time.monotonic() < until:
        time.sleep(0.1)
    return found


def rows_of(path: Path) -> list[dict]:
    """The rows of a result that may be written at this moment."""
    return json.loads(path.read_text())["rows"] if path.exists() else []


def on_cpu(out: Path, *parts: str, **variables: str) -> subprocess.Popen:
    env = os.environ | {"PYTHON": sys.executable, "DEVICE": "cpu", "BUILD": "0"} | variables
    command = [str(ROOT / "bench/gpu.sh"), str(out), *parts]
    with (out.parent / "shown").open("w") as shown:
        return subprocess.Popen(
            command, env=env, stdout=shown, stderr=shown, start_new_session=True
        )


@pytest.mark.soak  # 190 s
def test_every_part_runs_on_a_cpu(tmp_path):
    """At tiny sizes and in little time: what it does not suffice for is said."""
    out = tmp_path / "out"
    process = on_cpu(out, "figures", "tests", "sanitize", "labs", "around", PART_SECONDS="45")
    process.wait()
    shown = (tmp_path / "shown").read_text()
    assert "DEVICE=cpu" in shown and "PASSED" in (out / "tests.log").read_text(), shown
    names = [f"figures-{name}" for name in ("infer", "caption", "train", "around")]
    left = out / "left-out.log"
    for name in (*names, "labs", "around"):
        path = out / f"{name}.json"
        if not path.exists():  # a slow machine has not even started it
            assert f"bench {name.removeprefix('figures-')} " in left.read_text(), shown
            continue
        table = json.loads(path.read_text())
        assert table["rows"] or table["refused"], name
    assert json.loads((out / "labs.json").read_text())["rows"], shown
    assert (out / "sanitizer.log").exists() and not marked(process.pid)


@pytest.mark.soak
@pytest.mark.parametrize("how", ["shell", "group", "SIGTERM"])
def test_killed_at_any_moment_it_leaves_results_and_no_process(how, tmp_path):
    dice, seen = random.Random(how), 0
    for number in range(4):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        process = on_cpu(out, "labs")
        while number % 2 and not rows_of(out / "labs.json"):  # so that there is something to keep
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(dice.uniform(0.2, 10))
        if how == "group":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
        assert not marked_after(process.pid)
        process.wait()
        seen += bool(rows_of(out / "labs.json"))
    assert seen >= 2
