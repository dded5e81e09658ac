"""The CUDA kernels, whole, on the host: csrc/cuda compiled as C++ against cuda_on_host.h, forward
and backward, held to the two-times rule. It shows their arithmetic and their sharing of the work,
not that a GPU runs them."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from contracts import assert_within

from bench.compiled import cuda_check
from univigu_kernels import OPS, rotary_tables

TESTS = Path(__file__).parent
SOURCES = TESTS.parents[1] / "csrc/cuda"
COMPILER = shutil.which("g++")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REWRITES = (  # what C++ has no word for: launches, dynamic shared memory, assembly
    (r"(\w+(?:<[^<>;]*>)?)<<<([^>]*)>>>\(", r"launch_on_host(\2, \1, "),
    (r"extern __shared__ __align__\(16\) float (\w+)\[\];", r"float* \1 = shared_memory;"),
    (r'asm volatile\("ld[^;]*\[%4\];"[^;]*;', "v = load_16_bytes(p);"),
    (r'asm volatile\(""[^;]*;', ""),
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None or cuda_check.nvcc() is None:
        pytest.skip("no g++, or no nvcc and so no CUDA headers")
    folder = tmp_path_factory.mktemp("cuda_on_host")
    used = [0] * len(REWRITES)
    for path in SOURCES.glob("*.*"):
        text = path.read_text()
        for i, (pattern, by) in enumerate(REWRITES):
            text, count = re.subn(pattern, by, text)
            used[i] += count
        (folder / path.name).write_text(text)
    assert all(used) and used[0] == 4, "the rewrites no longer fit csrc/cuda"
    sources = [str(path) for path in sorted(folder.glob("*.cu"))]
    command = [COMPILER, "-O1", "-w", "-std=c++17", "-include", str(TESTS / "cuda_on_host.h")]
    command += [f"-I{folder}", f"-isystem{cuda_check.toolkit()}/include", "-x", "c++", *sources]
    command += [str(TESTS / "cuda_on_host.cpp"), "-o", str(folder / "program")]
    subprocess.run(command, check=True)
    return folder / "program"


def bits(x):
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def split(data: bytes, *shapes_and_dtypes):
    data, at, found = bytearray(data), 0, []
    for shape, dtype in shapes_and_dtypes:
        x = torch.frombuffer(data, dtype=dtype, offset=at, count=math.prod(shape)).view(shape)
        at += x.numel() * x.element_size()
        found.append(x)
    assert at == len(data)
    return found


def expected(inputs, heads, grid, text_rows, dtype):
    """q, k, dq, dk, q's rope gradient, dweight_q, dweight_k of the reference in `dtype`."""
    qkv, weights, dq_out, dk_out = inputs
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rotary = rotary_tables(grid, text_rows, dq_out.shape[-1], "cpu", wide)
    q, k, _ = (x.to(dtype).requires_grad_() for x in qkv.chunk(3, -1))
    weight_q, weight_k = (w.to(wide).requires_grad_() for w in weights)
    out = OPS["qknorm_rope"].reference(q, k, weight_q, weight_k, heads, rotary)
    dq, dk, *dweights = torch.autograd.grad(
        out, (q, k, weight_q, weight_k), (dq_out.to(dtype), dk_out.to(dtype))
    )
    x = q.detach().unflatten(-1, (heads, -1)).requires_grad_()
    (turned,) = torch.autograd.grad(OPS["rope3d"].reference(x, rotary), x, x.detach())
    return [x.detach() for x in (*out, dq, dk, turned, *dweights)]


CASES = [  # grid, text rows, heads, head_dim, samples, multiprocessors
    ((2, 3, 4), 5, 2, 16, 2, 2),
    ((2, 3, 4), 5, 12, 128, 1, 1),
    ((1, 3, 4), 7, 40, 128, 1, 1),
    ((2, 1, 3), 3, 5, 96, 2, 132),
    ((2, 2, 3), 0, 7, 64, 3, 1),
    ((0, 0, 0), 9, 3, 256, 1, 1),
    ((3, 5, 7), 33, 4, 128, 2, 2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid, text_rows, heads, head_dim, samples, sms", CASES)
def test_kernels_keep_the_two_times_rule(
    program, grid, text_rows, heads, head_dim, samples, sms, dtype
):
    rows, width = math.prod(grid) + text_rows, heads * head_dim
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(samples, rows, 3 * width, generator=generator).to(dtype)
    weights = 1 + 0.3 * torch.randn(2, width, generator=generator)
    douts = torch.randn(2, samples, rows, heads, head_dim, generator=generator).to(dtype)
    rotary = rotary_tables(grid, text_rows, head_dim, "cpu")
    numbers = (*grid, text_rows, heads, head_dim, rotary.t.shape[1], rotary.h.shape[1], samples)
    arguments = [str(n) for n in (*numbers, DTYPES.index(dtype), sms)]
    given = b"".join(map(bits, (*rotary[1:], qkv, weights, douts)))

    process = subprocess.run([str(program), *arguments], input=given, capture_output=True)
    assert process.returncode == 0
    split_rows, packed_rows = (samples, rows, heads, head_dim), (samples, rows, width)
    *results, rstd = split(
        process.stdout,
        *[(split_rows, dtype)] * 2,
        *[(packed_rows, dtype)] * 2,
        (split_rows, dtype),
        *[((width,), torch.float32)] * 2,
        ((samples, rows, 2), torch.float32),
    )

    inputs = qkv, weights, *douts
    plain = expected(inputs, heads, grid, text_rows, dtype)
    truth = expected(inputs, heads, grid, text_rows, torch.float64)
    assert_within(results[:5], plain[:5], truth[:5], 2, dtype)
    assert_within(results[5:], plain[5:], truth[5:], 3, torch.float32)

    squares = [x.double().square().mean(-1) for x in qkv.chunk(3, -1)[:2]]
    torch.testing.assert_close(
        rstd.double(), (torch.stack(squares, -1) + 1e-6).rsqrt(), rtol=4e-7, atol=0
    )
