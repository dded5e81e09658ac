"""Attention of optional libraries: what is reported of them, and how they are called.

The libraries need a GPU, so stand-ins take their place here: packages of the same names and
signatures, in processes that import everything afresh.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import torch

from univigu_kernels import OPS
from univigu_kernels._attention import attend_sdpa
from univigu_kernels._libraries import attend_cudnn, dense
from univigu_kernels.cross_attention import cross_attention_by
from univigu_kernels.joint_attention import by_slices, joint_attention_by

ROOT = Path(__file__).resolve().parents[2]

ATTEND = """
from torch.nn.functional import scaled_dot_product_attention
__version__ = "{version}"
def {name}(query, key, value, {options}):
    assert query.stride(-1) == key.stride(-1) == 1 and query.numel() and key.numel()
    o = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value)))
    return {result}
"""
FLASH = {"name": "flash_attn_func", "result": "o.transpose(1, 2)"}
FLASH_4 = {"name": "flash_attn_func", "result": "(o.transpose(1, 2), None)"}
XFORMERS = {"name": "memory_efficient_attention", "result": "o.transpose(1, 2)", "version": ""}
EXTENDED = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)"
STAND_INS = {  # folder: its files
    "flash-attn": {
        "flash_attn/__init__.py": EXTENDED
        + ATTEND.format(version="2.9.1", options="dropout_p=0.0, *, deterministic", **FLASH),
        "flash_attn-2.9.1.dist-info/METADATA": "Name: flash-attn\nVersion: 2.9.1\n",
    },
    "flash-attn-3": {
        "flash_attn_interface.py": ATTEND.format(
            version="3.0.2", options="softmax_scale=None, *, deterministic", **FLASH
        ),
    },
    "flash-attn-4": {
        "flash_attn/cute/__init__.py": ATTEND.format(
            version="0.0.0", options="qv=None, *, deterministic", **FLASH_4
        ),
        "flash_attn_4-4.0.1.dist-info/METADATA": "Name: flash-attn-4\nVersion: 4.0.1\n",
    },
    "xformers": {
        "xformers/__init__.py": "__version__ = '0.0.99'",
        "xformers/ops/__init__.py": ATTEND.format(options="attn_bias=None, p=0.0", **XFORMERS),
    },
    "flash-attn-broken": {"flash_attn/__init__.py": "import flash_attn_2_cuda"},
    "xformers-broken": {"xformers/__init__.py": "", "xformers/ops.py": "raise OSError('no lib')"},
    "xformers-empty": {"xformers/__init__.py": "", "xformers/ops.py": ""},
}
HEAVY = ["diffusers", "transformers", "ftfy", "av", "PIL"]  # left out, for they cost seconds

# Runs each job in a fork of a process that has imported torch alone. The libraries come from the
# job's folders, and only from there.
FORKS = """
import contextlib, io, json, os, sys, traceback
from importlib.machinery import PathFinder
import torch, torch.testing
assert not {"triton", "univigu_kernels", "engine"} & sys.modules.keys()

class Only:
    def __init__(self, finder, absent, folders):
        self.finder, self.absent, self.folders = finder, absent, folders
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        if name in ("flash_attn", "flash_attn_interface", "xformers"):
            return PathFinder.find_spec(name, self.folders)
        if name not in self.absent:
            return self.finder.find_spec(name, *rest)

def run(absent, folders, code):
    sys.meta_path[:] = [Only(finder, absent, folders) for finder in sys.meta_path]
    sys.path[:0] = folders
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            exec(code, {"__name__": "job"})
        except BaseException:
            traceback.print_exc(file=output)
    return output.getvalue()

results = []
for job in json.load(sys.stdin):
    reader, writer = os.pipe()
    if os.fork() == 0:
        with os.fdopen(writer, "w") as stream:
            stream.write(run(*job))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        results.append(stream.read())
    os.wait()
json.dump(results, sys.stdout)
"""


def run_jobs(jobs):
    """The output of each (absent modules, folders of stand-ins, code)."""
    env = {k: v for k, v in os.environ.items() if k not in ("UNIVIGU_KERNELS", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command, text = [sys.executable, "-c", FORKS], json.dumps(jobs)
    result = subprocess.run(command, input=text, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    outputs = json.loads(result.stdout)
    assert not any("Traceback" in output for output in outputs), outputs
    return outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("stand_ins")
    for name, files in STAND_INS.items():
        for file, text in files.items():
            (root / name / file).parent.mkdir(parents=True, exist_ok=True)
            (root / name / file).write_text(text)
    return lambda name: str(root / name)


REPORT = """
import torch
from engine.cli import main
from univigu_kernels import explain
assert main(["env"]) == 0
print("---")
print(explain(dtype=torch.float16))
"""


def test_every_combination_of_optional_packages_imports_and_reports(folder):
    some = (True, False) if find_spec("triton") else (False,)
    combinations = list(product(some, (True, False), (True, False)))
    jobs = []
    for triton, flash_attn, xformers in combinations:
        folders = [folder("flash-attn")] * flash_attn + [folder("xformers")] * xformers
        jobs.append((HEAVY + ["triton"] * (not triton), folders, REPORT))

    for (triton, flash_attn, xformers), output in zip(combinations, run_jobs(jobs), strict=True):
        env, table = output.split("\n---\n")
        rows = {line.split()[0]: line for line in table.splitlines()}
        assert ("needs the package triton" in rows["joint_attention"]) is (not triton)
        assert ("triton not installed" == rows["triton"]) is (not triton)
        assert bool(re.search(r"^triton +not installed", env, re.M)) is (not triton)

        for name, present, version, extra in (
            ("flash_attn", flash_attn, "flash-attn 2.9.1", "flash-attn"),
            ("xformers", xformers, "0.0.99", "xformers"),
        ):
            absent = f"not installed (pip install 'univigu-engine[{extra}]')"
            described = version if present else absent
            assert f"\n{name:<18}{described}\n" in env
            assert rows[name] == f"{name} {described}"
            reason = "needs a CUDA device" if present else f"needs the package {extra}, which is"
            for op in ("joint_attention", "cross_attention"):
                assert rows[op].split()[1] == "sdpa" and f"{name}: {reason}" in rows[op]


ASK = """
import torch
from univigu_kernels._libraries import describe, supports_{0}
torch.cuda.get_device_capability = lambda device=None: {1}
print(describe("{0}"))
for dtype in (torch.bfloat16, torch.float32):
    print(supports_{0}(torch.device("cuda"), dtype))
"""
FITS = "None$"
CASES = [  # folders, library, capability, its description, what it lacks in bf16
    ("flash-attn", "flash_attn", (8, 0), "^flash-attn 2.9.1$", FITS),
    ("flash-attn", "flash_attn", (7, 5), "^flash-attn 2.9.1$", "capability 8.0 or newer"),
    ("flash-attn-3", "flash_attn", (9, 0), "^flash-attn-3 3.0.2$", FITS),
    ("flash-attn-3", "flash_attn", (10, 0), "^flash-attn-3 3.0.2$", "is for compute capability 9$"),
    ("flash-attn-4", "flash_attn", (9, 0), "^flash-attn-4 4.0.1$", FITS),
    ("flash-attn-4", "flash_attn", (8, 6), "^flash-attn-4 4.0.1$", "capability 9, 10, 11, 12$"),
    ("flash-attn flash-attn-3", "flash_attn", (8, 0), "-3 3.0.2, flash-attn 2.9.1$", FITS),
    ("xformers", "xformers", (8, 0), "^0.0.99$", FITS),
    ("flash-attn-broken", "flash_attn", (9, 0), "broken: .*'flash_attn_2_cuda'", "broken: "),
    ("flash-attn-broken flash-attn-3", "flash_attn", (9, 0), "3.0.2, flash-attn broken: ", FITS),
    ("xformers-broken", "xformers", (9, 0), "^broken: OSError: no lib$", "broken: OSError"),
    ("xformers-empty", "xformers", (9, 0), "^broken: xformers.ops has no memory_eff", "broken: "),
]


def test_what_is_broken_or_does_not_fit_is_reported(folder):
    jobs = [
        (["triton"], [folder(name) for name in names.split()], ASK.format(library, capability))
        for names, library, capability, *_ in CASES
    ]
    for (*_, described, lacks), output in zip(CASES, run_jobs(jobs), strict=True):
        text, half, single = output.splitlines()
        assert re.search(described, text) and re.search(lacks, half), output
        assert single == "needs float16 or bfloat16" or lacks != FITS


ATTEND_ALL = """
import torch
from univigu_kernels import OPS, _libraries
torch.cuda.get_device_capability = lambda device=None: {capability}
call = {{b.name: b.call for b in OPS["joint_attention"].backends}}["{library}"]
reference = OPS["joint_attention"].reference
print(_libraries._chosen(_libraries.EXTRAS["{library}"][1], torch.device("cpu")).__module__)
q, k, v = torch.randn(3, 3, 12, 2, 8).mT.contiguous().mT
leaves = [x.requires_grad_() for x in (q, k, v)]
for sees in (True, False):
    for lengths in (None, torch.tensor([5, 2, 0])):
        for queries, video in ((12, None), (7, 7), (0, 0)):
            rest = (7, lengths, sees, video)
            both = [f(q[:, :queries], k, v, *rest) for f in (call, reference)]
            torch.testing.assert_close(*both)
            gradients = [torch.autograd.grad(o.square().sum(), leaves) for o in both]
            torch.testing.assert_close(*gradients)
"""


def test_the_newest_that_fits_attends(folder):
    flash = ["flash-attn", "flash-attn-3", "flash-attn-4"]
    cases = [
        (flash, "flash_attn", (9, 0), "flash_attn.cute"),
        (flash[:2], "flash_attn", (9, 0), "flash_attn_interface"),
        (flash, "flash_attn", (8, 0), "flash_attn"),
        (["xformers"], "xformers", (8, 0), "xformers.ops"),
    ]
    jobs = [
        (
            ["triton"],
            [folder(name) for name in names],
            ATTEND_ALL.format(library=lib, capability=sm),
        )
        for names, lib, sm, _ in cases
    ]
    assert [output.strip() for output in run_jobs(jobs)] == [module for *_, module in cases]


def test_each_sample_is_attended_on_its_own_rows():
    shapes = []

    def attend(q, k, v):
        shapes.append((len(q), q.shape[1], k.shape[1], v.shape[1]))
        return attend_sdpa(q, k, v)

    q, k, v = torch.randn(3, 3, 12, 1, 8)
    lengths = torch.tensor([5, 2, 0])
    attend_slices = partial(joint_attention_by, partial(by_slices, attend))
    attend_slices(q, k, v, 7, lengths)
    assert shapes == [(1, 12, 12, 12), (1, 9, 9, 9), (1, 7, 7, 7)]
    shapes.clear()
    attend_slices(q, k, v, 7, lengths, False)
    assert shapes[:4] == [(1, 7, 7, 7), (1, 5, 12, 12), (1, 7, 7, 7), (1, 2, 9, 9)]
    assert shapes[4:] == [(1, 7, 7, 7)]
    shapes.clear()
    attend_slices(q[:, :7], k, v, 7, None, True, 7)
    assert shapes == [(3, 7, 12, 12)]
    o = cross_attention_by(dense(attend), q, k[:, :4], v[:, :4], 3)
    assert shapes[1:] == [(3, 12, 6, 6)]
    torch.testing.assert_close(o, OPS["cross_attention"].reference(q, k[:, :4], v[:, :4], 3))


def test_cudnn_is_not_replaced_by_another():
    q = torch.randn(1, 5, 1, 8)
    with pytest.raises(RuntimeError, match="No viable backend|No available kernel"):
        attend_cudnn(q, q, q)
    assert attend_sdpa(q, q, q).isfinite().all()
