"""No loop of a kernel loses a variable in Triton's frontend (tests/support/loop_variables.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The report of a process outside the interpreter, which has no frontend."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(ROOT / "kernels")
    variables["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    command = [sys.executable, ROOT / "tests/support/loop_variables.py"]
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_no_loop_loses_a_variable(found):
    assert found["lost"] == []


def test_every_loop_is_one_that_a_launch_of_the_table_reaches(found):
    """What is not built is not looked at."""
    assert found["unreached"] == []


def test_a_copied_variable_is_found_and_a_computed_one_is_none(found):
    assert {(place.split(".")[-1], name) for place, _, name in found["examples"]} == {
        ("copied", "previous"),
        ("copied_under_an_if", "previous"),
        ("copied_in_the_inner_loop", "previous"),
        ("copied_in_gluon", "previous"),
    }
