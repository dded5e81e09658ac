"""The committed table of compiled kernels is that of these sources, and clean."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from univigu_kernels import OPS
from univigu_kernels._card import CARDS

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "bench/results/aot.json").read_text())


@pytest.fixture(scope="module")
def aot():
    """bench/compiled/aot.py outside the interpreter: run(*arguments) -> the finished process."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = str(ROOT / "kernels")

    def run(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)

    return run


def test_the_table_is_that_of_these_sources_and_without_faults(aot):
    """A kernel that changed must be compiled again: `make kernels-table` does, and finds faults."""
    probe = (
        "import sys, json; sys.path.insert(0, 'bench/compiled'); import aot;"
        "rows = json.load(open('bench/results/aot.json'))['rows'];"
        "ours = {n: aot.sources(n) for n, op in aot.OPS.items() if op.rehearse};"
        "print(json.dumps([ours, [fault for row in rows for fault in aot.faults(row)]]))"
    )
    process = aot("-c", probe)
    assert process.returncode == 0, process.stderr
    sources, faults = json.loads(process.stdout)
    assert sources == TABLE["sources"], "run make kernels-table"
    assert faults == []


def test_every_triton_kernel_is_in_the_table_for_every_architecture():
    """The cards that a table can stand for: an RTX 40 and an RTX 50 hold less than half of a
    B200's block."""
    ops = {op.name for op in OPS.values() if op.rehearse is not None}
    assert ops == {row["op"] for row in TABLE["rows"]}
    for op in ops:
        found = {row["sm"] for row in TABLE["rows"] if row["op"] == op}
        assert found == {80, 89, 90, 100, 120} - ({80} if op.startswith("fp8") else set()), op
    assert [row for row in TABLE["rows"] if row["shared"] > CARDS[row["sm"]].shared] == []


@pytest.mark.parametrize("op, kernel", [("adaln", "adaln"), ("joint_attention", "flash_hopper")])
def test_compiling_here_gives_the_committed_resources(aot, op, kernel):
    """With another Triton than the table's a row has no faults, at least."""
    pytest.importorskip("triton")
    probe = (
        "import sys, json; sys.path.insert(0, 'bench/compiled'); import aot;"
        f"tasks = [t for t in aot.tasks(['{op}']) if t[3] == 90];"
        f"row = aot.work(next(t for t in tasks if t[4]['kernel'].startswith('{kernel}')));"
        "print(json.dumps([aot._triton.triton_version(), row, aot.faults(row)]))"
    )
    process = aot("-c", probe)
    assert process.returncode == 0, process.stderr
    version, row, faults = json.loads(process.stdout)
    assert faults == []
    if version == TABLE["triton"]:
        assert row in TABLE["rows"]


MOVED = """
        /*0000*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
.L_x_1:
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0020*/                   MUFU.EX2 R1, R1 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MUFU.EX2 R2, R2 ;
        /*0050*/                   MUFU.EX2 R3, R3 ;
        /*0060*/              @!P0 BRA `(.L_x_1) ;
        /*0070*/                   MUFU.EX2 R4, R4 ;
"""


def test_an_exponential_behind_its_product_is_seen(aot):
    probe = "import sys; sys.path.insert(0, 'bench/compiled'); import schedule;"
    process = aot("-c", probe + f"print(schedule.schedule({MOVED!r}))")
    assert process.stdout == "{'beside': 1, 'after': 2, 'setmaxreg': 0}\n", process.stderr
