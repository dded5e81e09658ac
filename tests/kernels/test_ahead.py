"""Kernels compiled ahead: children fill Triton's cache, and the launches find them there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
START = """
import os, sys
from pathlib import Path
from univigu_kernels import OPS, _triton, ahead
from univigu_kernels._card import CARDS
from univigu_kernels._triton import rehearsal

CASE = {"B": 1, "V": 24, "T": 8, "C": 8, "D": 32, "H": 2, "K": 16, "F": 64, "N": 40}
WIDE = {**CASE, "H": 1, "K": 64}  # a head_dim that the Gluon kernel takes

def launches(op, case=CASE):
    with rehearsal(CARDS[90]) as found:
        OPS[op].rehearse(case)
    return found

def files():
    found = [path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in found}

"""


@pytest.fixture
def run(tmp_path):
    """Runs a script outside the interpreter, in an empty cache. -> the finished process."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}

    def script(text):
        command = [sys.executable, "-c", START + text]
        return subprocess.run(command, env=variables, capture_output=True, text=True)

    return script


def test_a_launch_finds_what_was_compiled_ahead(run):
    process = run("""
some = launches("rms_norm")
some += [x for x in launches("joint_attention", WIDE) if ahead.name_of(x) == "flash_hopper"][:1]
assert any(map(_triton.is_descriptor, some[-1].args))
with ahead.target(90):
    todo = ahead.missing(some)
    assert todo and len(todo) == len({ahead.key_of(launch) for launch in some}) and not files()
    assert len(ahead.missing(some[:1] * 3)) == 1

ahead.compile_ahead(todo, 90, jobs=2)
before = files()
with ahead.target(90):
    assert ahead.missing(some) == []
    cubins = [ahead.compiled(launch).asm["cubin"] for launch in some]
assert all(cubins) and files() == before, "compiled again"

with ahead.target(80):
    assert len(ahead.missing(some)) == len(todo)
""")

    assert process.returncode == 0, process.stderr
    assert "compiling kernels" in process.stderr and "100%" in process.stderr


def test_an_argument_is_told_to_a_child_as_it_is(run):
    """Alignment, width, None, and what is a number of the launch itself."""
    process = run("""
import json, torch
from univigu_kernels import flow_step, _triton
x = torch.empty(16, dtype=torch.bfloat16, device="meta")
args = (x, x[1:], x[8:], None, 1, 17, 32, 2**40, -(2**40), 0.5, True)
launch = _triton.Launch(flow_step._flow_step, (3,), args, {"BLOCK": 1024, "num_warps": 4})
line = ahead._written(launch, 90)
assert ahead.key_of(ahead._read(json.loads(line))) == ahead.key_of(launch)
assert ahead.specialised(x[1:]) != ahead.specialised(x) == ahead.specialised(x[8:])
""")
    assert process.returncode == 0, process.stderr


def test_a_kernel_that_does_not_compile_is_named(run):
    process = run("""
first = launches("rms_norm")[0]
wrong = first._replace(options={**first.options, "BLOCK": 3})
ahead.compile_ahead([wrong], 90, progress=False)
""")
    last = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1
    assert "RuntimeError: compile_ahead: rms_norm_forward must compile for sm_90" in process.stderr
    assert "power of 2" in process.stderr and "Request another backend" in last


def test_a_child_that_dies_is_an_error_that_names_its_kernel(run):
    process = run("""
import subprocess
class Dying(subprocess.Popen):
    def __init__(self, command, **others):
        super().__init__([sys.executable, "-c", "import os; input(); os._exit(9)"], **others)
subprocess.Popen = Dying
ahead.compile_ahead(launches("rms_norm"), 90, jobs=1, progress=False)
""")
    assert process.returncode == 1
    assert "rms_norm_forward must compile" in process.stderr
    assert "the compiling process ended with code 9" in process.stderr
