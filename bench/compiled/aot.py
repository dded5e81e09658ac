"""What the Triton kernels become on a GPU, without one: every launch of the real models, compiled
for the cards in ARCHITECTURES and read back from the machine code.

    bench/compiled/aot.py --write            compile everything, replace results/aot.json and aot.md
    bench/compiled/aot.py --check            compile what changed and compare it with its row
    bench/compiled/aot.py --check adaln      the same for one op

A row fails on more shared memory than a block of its card may have, on a register spill (sm_90), on
a matrix kernel without its card's matrix instruction, on a row kernel whose widest global load or
store is narrower than 128 bits, and on a warp-specialised kernel whose exponentials do not run
beside a product. --write records how long each row took to compile in results/aot-seconds.json;
--check fails where one takes too long (sm_90).
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from schedule import schedule

from univigu_kernels import OPS, _triton, ahead
from univigu_kernels._card import CARDS
from univigu_kernels.ahead import name_of

RESULTS = Path(__file__).resolve().parents[1] / "results"
ARCHITECTURES = (80, 89, 90, 100, 120)
MATRIX = (
    "joint_attention",
    "cross_attention",
    "routed_ffn",
    "fp8_ffn",
    "fp8_linear",
    "linear",
    "vocab_sample",
    "vocab_loss",
)
ROW = (
    "adaln",
    "residual_adaln",
    "qknorm_rope",
    "rms_norm",
    "rms_norm_silu",
    "flow_step",
)
LIMIT = 5.0  # seconds of one core: what the first call may wait for a kernel
REGISTERS = 65536
RESIDENT = {  # of a multiprocessor: threads, blocks, bytes of shared memory
    80: (2048, 32, 164 << 10),
    89: (1536, 24, 100 << 10),
    90: (2048, 32, 228 << 10),
    100: (2048, 32, 228 << 10),
    120: (1536, 24, 100 << 10),
}
INSTRUCTION = {"mma": "hmma", "wgmma": "hgmma", "tcgen05": "tcgen05"}  # its column
OPCODES = {
    "hgmma": r"\b(?:HGMMA|QGMMA)\b",
    "hmma": r"\b(?:HMMA|QMMA)\b",
    "tcgen05": r"\bUTC\w*MMA\b",
    "tma": r"\bUTMA(?:LDG|STG|REDG)\b",
}


def code_of(text: str) -> str:
    """A module's text without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def sources(op_name: str) -> str:
    """Hash of the code of an op's file and of the files that it takes kernels from."""
    seen, todo = {}, [sys.modules[f"univigu_kernels.{op_name}"]]
    while todo:
        module = todo.pop()
        if module.__name__ in seen:
            continue
        code = code_of(Path(module.__file__).read_text())
        seen[module.__name__] = code
        pattern = r"^from \.(\w+) import|^from \. import ([\w, ]+)"
        for one, several in re.findall(pattern, code, re.M):
            for name in (one or several).replace(" ", "").split(","):
                found = sys.modules.get(f"univigu_kernels.{name}")
                aside = name in ("_spec", "_checks", "_triton") or name.startswith("_problems")
                if found is not None and not aside:
                    todo.append(found)
    return hashlib.sha256("".join(seen[name] for name in sorted(seen)).encode()).hexdigest()[:16]


def tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def widest(code: str, opcode: str) -> int:
    """Bits of the widest global access of a kind; 0 without one."""
    kinds = {"64": 64, "128": 128, "256": 256, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    bits = []
    for suffixes in re.findall(rf"\b{opcode}((?:\.\w+)*)", code):
        parts = suffixes.split(".")
        bits.append(max([kinds[p] for p in parts if p in kinds], default=32))
    return max(bits, default=0)


def measure(op: str, case: str, index: int, architecture: int) -> dict:
    """Compiles launch `index` of a rehearsal and reads its resources and instructions."""
    with _triton.rehearsal(CARDS[architecture]) as launches:
        OPS[op].rehearse(OPS[op].cases[case])
    launch = launches[index]
    launch.kernel.device_caches.clear()  # else what this process compiled before costs nothing
    with ahead.target(architecture):
        kernel = ahead.compiled(launch)

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        read = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool("cuobjdump"), "-res-usage", file.name], **read).stdout
        code = subprocess.run([tool("nvdisasm"), "-c", file.name], **read).stdout

    resources = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    registers = int(resources["REG"])

    threads, (most, blocks, memory) = 32 * warps, RESIDENT[architecture]
    blocks = min(REGISTERS // (max(registers, 1) * threads), most // threads, blocks)
    blocks = min(blocks, memory // (shared + 1024))

    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    row = {
        "registers": registers,
        "stack": int(resources["STACK"]),
        "spills": spills,
        "shared": shared,
        "warps": warps,
        "occupancy": round(blocks * threads / most, 3),
        "load": max(widest(code, "LDG"), widest(code, "LDGSTS")),
        "store": widest(code, "STG"),
    }
    row |= {name: len(re.findall(pattern, code)) for name, pattern in OPCODES.items()}
    return row | (schedule(code) if launch.kernel.is_gluon() else {})


def tasks(ops: list[str]) -> list[tuple[str, str, int, int, dict]]:
    """(op, case, index, architecture, label) of every distinct launch."""
    found = []
    for op in ops:
        for case, sizes in OPS[op].cases.items():
            for architecture in ARCHITECTURES:
                with _triton.rehearsal(CARDS[architecture]) as launches:
                    OPS[op].rehearse(sizes)
                seen = set()
                for index, launch in enumerate(launches):
                    key = ahead.key_of(launch)
                    fp8 = op.startswith("fp8") or any("float8" in part for part in key)
                    if key in seen or (fp8 and architecture < 89):
                        continue
                    seen.add(key)
                    label = {"op": op, "kernel": name_of(launch), "case": case, "sm": architecture}
                    label["options"] = " ".join(f"{k}={v}" for k, v in launch.options.items())
                    found.append((op, case, index, architecture, label))
    return found


def faults(row: dict) -> list[str]:
    """Why a row is not acceptable."""
    found, card = [], CARDS[row["sm"]]
    if row["shared"] > card.shared:
        found.append(f"{row['shared']} bytes of shared memory, a block may have {card.shared}")
    if row["sm"] == 90 and row["spills"]:
        found.append(f"{row['spills']} spilled accesses")
    matrix = row["op"] in MATRIX and not row["kernel"].endswith(("_rows", "_reduce"))
    if matrix and not row[INSTRUCTION[card.instruction]]:
        found.append(f"no {INSTRUCTION[card.instruction].upper()}")
    if "beside" in row and (row["after"] or not row["beside"] or not row["setmaxreg"]):
        found.append(f"{row['after']} exponentials after the product that they should run beside")
    if row["op"] in ROW and min(row["load"], row["store"]) < 128:
        found.append(f"load {row['load']}, store {row['store']} bits")
    return found


def work(task) -> dict:
    op, case, index, architecture, label = task
    return label | measure(op, case, index, architecture)


def timed(task) -> tuple[dict, float]:
    """The row of a task and the seconds of one core that it took, those of ptxas included."""
    before = os.times()
    row = work(task)
    return row, round(sum(os.times()[:4]) - sum(before[:4]), 1)


def compile_all(todo: list[tuple]) -> tuple[list[dict], list[float]]:
    """Rows and seconds of the tasks. All are compiled, even what Triton's cache holds."""
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"
    with ProcessPoolExecutor() as pool:
        rows, seconds = [], []
        for row, took in pool.map(timed, todo):
            print(f"{row['op']}/{row['kernel']} sm_{row['sm']} {row['case']}", file=sys.stderr)
            rows.append(row)
            seconds.append(took)
    return rows, seconds


def slow(todo: list[tuple], seconds: list[float]) -> list[tuple[dict, str]]:
    """(label, fault) of the tasks that take too long, alone too: beside others all are slower."""
    found = [task for task, took in zip(todo, seconds, strict=True) if took > LIMIT]
    again = [(task[-1], timed(task)[1]) for task in found if task[3] == 90]
    return [(label, f"{took} s to compile") for label, took in again if took > LIMIT]


def record_seconds(todo: list[tuple], seconds: list[float], ops: list[str]) -> None:
    path = RESULTS / "aot-seconds.json"
    old = json.loads(path.read_text()) if path.exists() else []
    new = [task[-1] | {"seconds": took} for task, took in zip(todo, seconds, strict=True)]
    rows = [row for row in old if row["op"] in OPS and row["op"] not in ops] + new
    rows.sort(key=lambda row: [row[column] for column in ORDER])
    path.write_text(json.dumps(rows, indent=1) + "\n")


ORDER = ("op", "kernel", "sm", "options", "case")
COLUMNS = (
    "kernel",
    "sm",
    "options",
    "registers",
    "spills",
    "shared",
    "occupancy",
    "load",
    "store",
    "hgmma",
    "hmma",
    "tcgen05",
    "tma",
    "case",
)


def scheduled(table: dict) -> dict[str, tuple[int, int, int]]:
    """Kernel and width of the warp-specialised ones -> the worst of each reading."""
    rows = [row for row in table["rows"] if "beside" in row]
    return {
        f"{row['kernel']} ({row['options'].split()[0]})": (
            row["beside"],
            row["after"],
            row["setmaxreg"],
        )
        for row in rows
    }


def markdown(table: dict) -> str:
    lines = [f"# Compiled kernels (Triton {table['triton']})", "", inspect.getdoc(markdown_notes)]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    cases: dict[tuple, list] = {}
    for row in table["rows"]:
        models = cases.setdefault(tuple(row[c] for c in COLUMNS[:-1]), [])
        models += [row["case"]] if row["case"] not in models else []
    for row, models in cases.items():
        lines.append("| " + " | ".join([*map(str, row), ", ".join(models)]) + " |")
    for kernel, (beside, after, registers) in sorted(scheduled(table).items()):
        lines += [
            "",
            f"{kernel} hands registers over in {registers} places; {beside} exponentials ",
        ]
        lines[-1] += f"of its loop run beside a product, {after} behind it."
    return "\n".join(lines) + "\n"


def markdown_notes():
    """Written by `make kernels-table`; compiled ahead of time, not run. registers: of a thread;
    spills: accesses to local memory; shared: bytes of a block; occupancy: resident threads, of 2048
    (sm_89, sm_120: 1536); load, store: widest global access in bits (copies to shared memory
    included); hgmma, hmma, tcgen05: matrix instructions of Hopper, of Ampere and GeForce, of
    Blackwell in data centres; tma: bulk tensor copies.
    Equal rows of several models stand once."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true")
    mode.add_argument("--check", action="store_true")
    parser.add_argument(
        "ops", nargs="*", help="only these; none: all (--check: those that changed)"
    )
    chosen = parser.parse_args()

    known = [name for name, op in OPS.items() if op.rehearse is not None]
    path = RESULTS / "aot.json"
    old = json.loads(path.read_text()) if path.exists() else {"sources": {}, "rows": []}
    ops = chosen.ops or known
    if chosen.check and not chosen.ops:
        ops = [name for name in known if old["sources"].get(name) != sources(name)]

    todo = tasks(ops)
    rows, seconds = compile_all(todo)
    bad = [(row, fault) for row in rows for fault in faults(row)]
    bad += slow(todo, seconds) if chosen.check else []

    for row, fault in bad:
        print(f"aot: {row['kernel']} {row['case']} sm_{row['sm']}: {fault}")

    if chosen.write:
        kept = [row for row in old["rows"] if row["op"] in known and row["op"] not in ops]
        rows = sorted(kept + rows, key=lambda row: [row[column] for column in ORDER])
        hashes = old["sources"] | {name: sources(name) for name in ops}
        table = {
            "triton": _triton.triton_version(),
            "sources": {name: hashes[name] for name in known if name in hashes},
            "rows": rows,
        }
        path.write_text(json.dumps(table, indent=1) + "\n")
        (RESULTS / "aot.md").write_text(markdown(table))
        record_seconds(todo, seconds, ops)
    elif ops:
        print(f"aot: {', '.join(ops)} changed; run `make kernels-table` to record it")

    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
