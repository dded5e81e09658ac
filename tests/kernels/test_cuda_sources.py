"""The CUDA sources without a GPU: their index arithmetic on the host, what nvcc makes of them, and
what their bindings include."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.compiled import cuda_check
from univigu_kernels import OPS, rotary_tables

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "bench/results/cuda.json").read_text())
COMPILER = shutil.which("g++") or shutil.which("c++")


@pytest.fixture(scope="module")
def rotary_host(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("rotary") / "rotary_host"
    flags = ["-O2", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"]
    command = [COMPILER, *flags, "-o", str(program), str(ROOT / "tests/kernels/rotary_host.cpp")]
    subprocess.run(command, check=True)

    def run(x_LHK, rotary, elements, units, sign):
        """The rotation as the threads of a launch share it out, and how often each channel is
        written."""
        L, H, K = x_LHK.shape
        pairs = rotary.t.shape[1], rotary.h.shape[1]
        numbers = (*rotary.grid, L - torch.Size(rotary.grid).numel(), H, K, *pairs)
        given = b"".join(t.contiguous().numpy().tobytes() for t in (*rotary[1:], x_LHK))
        arguments = [str(number) for number in (*numbers, elements, units, sign)]
        process = subprocess.run([str(program), *arguments], input=given, capture_output=True)
        assert process.returncode == 0, process.stderr.decode()
        out = torch.frombuffer(bytearray(process.stdout), dtype=torch.float32)
        out, writes = out.chunk(2)
        return out.view(L, H, K), writes.view(torch.int32)

    return run


CASES = [  # grid, text rows, heads, head_dim
    ((21, 30, 52), 256, 1, 128),
    ((2, 3, 5), 9, 12, 128),
    ((2, 3, 5), 9, 40, 128),
    ((1, 7, 1), 3, 5, 96),
    ((3, 1, 11), 2, 7, 64),
    ((2, 3, 4), 5, 2, 16),
    ((2, 2, 3), 0, 3, 256),
    ((0, 0, 0), 17, 12, 128),
]


@pytest.mark.parametrize("grid, text_rows, heads, head_dim", CASES)
@pytest.mark.parametrize("elements, units", [(8, 3), (8, 1), (4, 3), (4, 1)])
def test_index_arithmetic_of_every_row_and_pair(
    rotary_host, grid, text_rows, heads, head_dim, elements, units
):
    """A wrong row, axis, pair or partner is an error of the size of x; a thread that writes
    another's channel, or none, shows in the counts."""
    rotary = rotary_tables(grid, text_rows, head_dim, "cpu")
    rows = torch.Size(grid).numel() + text_rows
    x = torch.randn(rows, heads, head_dim, generator=torch.Generator().manual_seed(0))
    out, writes = rotary_host(x, rotary, elements, units, 1)
    assert writes.eq(1).all()
    expected = OPS["rope3d"].reference(x[None], rotary)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-6)
    back, _ = rotary_host(expected, rotary, elements, units, -1)
    torch.testing.assert_close(back, x, rtol=0, atol=4e-6)


def test_the_table_is_that_of_these_sources_and_without_faults():
    """`make cuda-check ARGS=--write` compiles again, and finds faults."""
    assert TABLE["sources"] == cuda_check.sources()
    assert [fault for row in TABLE["rows"] for fault in cuda_check.faults(row)] == []
    kernels = {row["kernel"] for row in TABLE["rows"]}
    for architecture in cuda_check.ARCHITECTURES:
        assert kernels == {row["kernel"] for row in TABLE["rows"] if row["sm"] == architecture}
    for name in ("rope3d_kernel", "qknorm_rope_kernel", "qknorm_rope_backward_kernel"):
        for dtype in ("fp32", "fp16", "bf16"):
            assert any(kernel.startswith(f"{name} {dtype}") for kernel in kernels)


def test_a_fault_is_found():
    row = TABLE["rows"][0]
    for fault in ({"spills": 1}, {"stack": 8}, {"load": 64}, {"store": 32}):
        assert cuda_check.faults(row | fault)


def test_compiling_here_gives_the_committed_resources():
    if cuda_check.nvcc() is None:
        pytest.skip("no nvcc")
    tool = cuda_check.disassembler()
    if tool is None:
        pytest.skip("no nvdisasm")
    rows = cuda_check.measure(cuda_check.SOURCES / "rope3d.cu", "90a", tool)
    assert [fault for row in rows for fault in cuda_check.faults(row)] == []
    if cuda_check.nvcc_version() == TABLE["nvcc"]:
        assert all(row in TABLE["rows"] for row in rows)


def test_without_nvcc_it_says_so_and_passes(tmp_path):
    variables = {"PATH": str(tmp_path), "CUDA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "bench/compiled/cuda_check.py")]
    process = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.count("\n") == 1
    assert "no nvcc" in process.stdout


def test_bindings_compile_where_the_cuda_headers_are():
    """The installed torch may be a CPU build: only linking needs the other."""
    from torch.utils import cpp_extension

    if COMPILER is None or cuda_check.nvcc() is None:
        pytest.skip("no C++ compiler, or no nvcc")
    folders = [*cpp_extension.include_paths(), str(cuda_check.toolkit() / "include")]
    include = [flag for folder in folders for flag in ("-isystem", folder)]
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}", *include]
    command = [COMPILER, *flags, str(ROOT / "csrc/bindings_cuda.cpp")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
