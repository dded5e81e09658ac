"""What the CUDA kernels of csrc/cuda become on a GPU, without one: every source compiled with nvcc
for sm_80, sm_90a and sm_100a and read back from the machine code.

    bench/compiled/cuda_check.py            compile, find faults, compare with results/cuda.json
    bench/compiled/cuda_check.py --write    compile, replace results/cuda.json and cuda.md

A kernel fails on a register spill and on a row that is not read or written 128 bits at a time.
Where there is no nvcc, that is said and nothing is checked.
"""

import argparse
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setup import ARCHITECTURES, nvcc, toolkit

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
RESULTS = ROOT / "bench" / "results"
FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-cubin", "-Xptxas", "-v")
TYPES = {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}
KERNEL = re.compile(
    r"\d(rope3d_kernel|qknorm_rope\w*?_kernel|dweight_reduce)(?:I(\w+?)(?:Li(\d)E)?E)?[EvP]"
)


def sources() -> str:
    """Hash of the code of csrc/cuda, comments apart."""
    text = "".join(p.name + p.read_text() for p in sorted(SOURCES.glob("*.*")))
    code = "".join(re.sub(r"//.*", "", text).split())
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def nvcc_version() -> str:
    shown = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"\bV(\d+\.\d+\.\d+)", shown)[1]


def disassembler() -> str | None:
    """The nvdisasm on the PATH, beside nvcc, or Triton's."""
    found = shutil.which("nvdisasm") or shutil.which(str(toolkit() / "bin/nvdisasm"))
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    return found


def name_of(symbol: str) -> str:
    """A mangled kernel as `rope3d_kernel bf16 x3`: its type and the units of a thread."""
    kernel, dtype, units = KERNEL.search(symbol).groups()
    return " ".join(filter(None, [kernel, TYPES.get(dtype), units and f"x{units}"]))


def bits(pattern: str, code: str) -> list[int]:
    """Widths of the global accesses whose opcode matches `pattern`."""
    found = re.findall(rf"\b({pattern}[\w.]*) ", code)
    return [int((re.search(r"\.(64|128|256)\b", opcode) or [0, 32])[1]) for opcode in found]


def accesses(cubin: str, tool: str) -> dict[str, dict[str, int]]:
    """Every kernel's narrowest load of rows and its widest store. Rows are loaded past L1 (.NA);
    the reduction, which has no such load, is read by its widest one."""
    shown = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    found = {}
    for section in shown.split("\t.section\t.text.")[1:]:
        symbol, code = section.split(",", 1)
        rows = bits(r"LDG\.E\.NA", code) or [max(bits("LDG", code))]
        spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
        found[symbol] = {"spills": spills, "load": min(rows), "store": max(bits("STG", code))}
    return found


def measure(source: Path, architecture: str, tool: str) -> list[dict]:
    """Compiles one source for one architecture -> a row for every kernel in it."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/out.cubin"
        command = [nvcc(), *FLAGS, target, "-o", cubin, str(source)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode != 0:
            raise RuntimeError(f"cuda_check: {source.name} must compile; got {process.stderr}")
        read = accesses(cubin, tool)

    rows = []
    for symbol, usage in re.findall(
        r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", process.stderr, re.S
    ):
        registers = int(re.search(r"Used (\d+) registers", usage)[1])
        shared = re.search(r"(\d+) bytes smem", usage)
        rows.append(
            {
                "kernel": name_of(symbol),
                "sm": architecture,
                "registers": registers,
                "stack": int(re.search(r"(\d+) bytes stack frame", usage)[1]),
                "shared": int(shared[1]) if shared else 0,
                "warps": min(64, 4 * (16384 // (32 * (-(-registers // 8) * 8)))),
                **read[symbol],
            }
        )

    return sorted(rows, key=lambda row: row["kernel"])


def faults(row: dict) -> list[str]:
    """Why a row is not acceptable."""
    found = []
    if row["spills"] or row["stack"]:
        found.append(f"{row['spills']} spilled accesses, {row['stack']} bytes of stack")
    if min(row["load"], row["store"]) < 128:
        found.append(f"load {row['load']}, store {row['store']} bits")
    return found


def notes():
    """Written by `make cuda-check ARGS=--write`; compiled, not run. Kernels of a type x units of 32
    bytes a thread; registers: of a thread; spills: accesses to local memory; stack, shared: bytes
    (the weights of a row, 4D, come on top); warps: that an SM's registers hold, a quarter of them
    each; load: the narrowest access that reads rows, in bits; store: the widest that writes."""


def markdown(table: dict) -> str:
    columns = list(table["rows"][0])
    lines = [f"# CUDA kernels (nvcc {table['nvcc']})", "", inspect.getdoc(notes), ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row[c]) for c in columns) + " |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


def compare(table: dict, path: Path) -> list[str]:
    """How the committed table differs from what was compiled here."""
    old = json.loads(path.read_text())
    if old["sources"] != table["sources"]:
        return ["csrc/cuda changed; run `make cuda-check ARGS=--write`"]
    if old["nvcc"] != table["nvcc"]:
        print(f"cuda_check: nvcc {table['nvcc']}, the table's is {old['nvcc']}: not compared")
        return []
    return [
        f"{new['kernel']} sm_{new['sm']}: got {new}, the table has {was}"
        for new, was in zip(table["rows"], old["rows"], strict=True)
        if new != was
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="replace results/cuda.json, cuda.md")
    write = parser.parse_args().write

    if nvcc() is None:
        print("cuda_check: no nvcc on the PATH or in CUDA_HOME; nothing was checked")
        return 0
    tool = disassembler()
    if tool is None:
        print("cuda_check: no nvdisasm on the PATH, beside nvcc or in Triton; nothing was checked")
        return 0

    rows = []
    for source in sorted(SOURCES.glob("*.cu")):
        for architecture in ARCHITECTURES:
            rows += measure(source, architecture, tool)

    table = {"nvcc": nvcc_version(), "sources": sources(), "rows": rows}
    bad = [f"{row['kernel']} sm_{row['sm']}: {fault}" for row in rows for fault in faults(row)]
    path = RESULTS / "cuda.json"
    if write:
        path.write_text(json.dumps(table, indent=1) + "\n")
        (RESULTS / "cuda.md").write_text(markdown(table))
    else:
        bad += compare(table, path)

    for line in bad:
        print(f"cuda_check: {line}")
    print(f"cuda_check: {len(rows)} kernels, {len(bad)} faults, nvcc {table['nvcc']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
