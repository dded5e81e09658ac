"""The compiled module: what it says of itself, what is said where it cannot be built or loaded."""

import importlib.machinery
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from univigu_kernels import OPS, _compiled, bind

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")


@pytest.fixture
def setup_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("project_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("CXX", "CUDA_HOME", "UNIVIGU_CUDA"):
        monkeypatch.delenv(name, raising=False)
    return module


def test_it_is_built_where_a_compiler_is(setup_module):
    if setup_module.missing_for_cpu() is None:
        assert _compiled.built(), "run .ci/env.sh, or python setup.py build_ext --inplace"


@built
def test_it_says_what_it_was_built_for():
    info = _compiled.build_info()
    assert info["torch"] == torch.__version__ and info["torch_at_least"] == "2.11"
    sets = info["instruction_sets"]
    assert sets[0] == "portable" and info["instruction_set"] == sets[-1]
    if platform.machine() == "x86_64":
        flags = Path("/proc/cpuinfo").read_text().split()
        assert ("avx512bf16" in sets) == ("avx512_bf16" in flags and "avx512dq" in flags)
        assert ("avx2" in sets) == ("avx2" in flags)


@built
def test_every_instruction_set_of_the_machine_can_be_chosen():
    sets = _compiled.build_info()["instruction_sets"]
    for name in sets:
        with _compiled.instruction_set(name):
            assert _compiled.build_info()["instruction_set"] == name
    assert _compiled.build_info()["instruction_set"] == sets[-1]
    with pytest.raises(ValueError, match="must be one of this machine's; got sse9"):
        with _compiled.instruction_set("sse9"):
            pass


@built
def test_auto_takes_the_cpu_kernels(monkeypatch):
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    having = {op.name for op in OPS.values() if "cpu" in [b.name for b in op.backends]}
    assert {"adaln", "residual_adaln", "qknorm_rope", "joint_attention"} <= having
    for dtype in (torch.float32, torch.bfloat16):
        assert {c.op for c in bind(dtype=dtype).table if c.backend == "cpu"} == having
    rejected = {c.op: dict(c.rejected) for c in bind(dtype=torch.float64).table}
    assert rejected["adaln"]["cpu"] == "needs float32 or bfloat16"


def test_a_module_of_another_build_is_a_named_error(tmp_path):
    """Not a silent fallback: a file that this torch cannot load."""
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    package = tmp_path / "univigu_kernels"
    shutil.copytree(ROOT / "kernels/univigu_kernels", package, ignore=skipped)
    (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_text("of another machine")
    command = [sys.executable, "-c", "import univigu_kernels"]
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert "_C: the compiled module must be built for torch" in last and "Rebuild it" in last


def test_without_the_module_each_backend_says_why(tmp_path):
    skipped = shutil.ignore_patterns("__pycache__", "*.so")
    package = tmp_path / "univigu_kernels"
    shutil.copytree(ROOT / "kernels/univigu_kernels", package, ignore=skipped)
    editable = "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    code = f"import sys; {editable}; import univigu_kernels as u; print(u.explain())"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert re.search(
        r"^adaln +reference .*cpu: the compiled module is not built", result.stdout, re.M
    )


def test_what_is_left_out_of_a_build_and_why(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no C++ compiler" in setup_module.missing_for_cpu()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert "no nvcc" in setup_module.missing_for_cuda()
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    nvcc.chmod(0o755)
    wanted = "CPU build" if torch.version.cuda is None else "nvcc is of CUDA 1, torch of"
    assert wanted in setup_module.missing_for_cuda()
    monkeypatch.setenv("UNIVIGU_CUDA", "0")
    assert setup_module.missing_for_cuda() == "UNIVIGU_CUDA=0"
    monkeypatch.setenv("UNIVIGU_CUDA", "1")
    assert setup_module.missing_for_cuda() is None


@pytest.fixture
def cuda_commands(setup_module, monkeypatch, tmp_path) -> dict[str, list[str]]:
    """Output -> arguments as the shell splits them, of a build with CUDA in folders whose names
    have a space. Neither nvcc nor CUDA has to be there."""
    root, home = tmp_path / "a tree", tmp_path / "CUDA home"
    for folder in ("csrc", "csrc/cpu", "csrc/cuda"):
        (root / folder).mkdir(parents=True)
        for source in (ROOT / folder).glob("*.c*"):
            (root / folder / source.name).touch()
    monkeypatch.setattr(setup_module, "ROOT", root)
    monkeypatch.setattr(setup_module, "nvcc", lambda: str(home / "bin/nvcc"))
    monkeypatch.setattr(setup_module, "toolkit", lambda: home)
    (tmp_path / "build.ninja").write_text(setup_module.rules(True, root / "_C.so"))
    command = [setup_module.ninja(), "-C", str(tmp_path), "-t", "commands"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    split = [shlex.split(line) for line in shown.splitlines() if not line.startswith("ninja: ")]
    return {Path(line[line.index("-o") + 1]).name: line for line in split}


needs_ninja = pytest.mark.skipif(
    not importlib.util.find_spec("ninja") and not shutil.which("ninja"), reason="needs ninja"
)


@needs_ninja
def test_defines_reach_the_compiler_whole(cuda_commands, setup_module):
    """The shell splits what is not quoted, and takes quotes that the text needs."""
    module = cuda_commands["bindings.o"]
    for define in (f'-DUNIVIGU_TORCH="{torch.__version__}"', '-DUNIVIGU_CUDA="80 90a 100a"'):
        assert define in module
    assert not [x for x in module if "TORCH_TARGET_VERSION" in x]  # torch 2.11's pybind11 refuses
    others = [name for name in cuda_commands if re.fullmatch(r"bindings_\w+\.o", name)]
    assert "bindings_cuda.o" in others
    for name in others:
        assert f"-DTORCH_TARGET_VERSION={setup_module.STABLE_ABI}" in cuda_commands[name]
        assert "-DUSE_CUDA" in cuda_commands[name]


@needs_ninja
def test_folders_reach_the_compiler_whole(cuda_commands, setup_module):
    root, home = setup_module.ROOT, setup_module.toolkit()
    for name in ("bindings.o", "bindings_cuda.o", "linear.portable.o"):
        assert f"-I{root / 'csrc'}" in cuda_commands[name]
    assert str(root / "csrc/bindings.cpp") in cuda_commands["bindings.o"]
    assert f"-isystem{home / 'include'}" in cuda_commands["bindings_cuda.o"]
    kernels = [line for name, line in cuda_commands.items() if name.endswith(".cuda.o")]
    assert kernels and all(line[0] == str(home / "bin/nvcc") for line in kernels)
    link = cuda_commands["_C.so"]
    assert f"-L{home / 'lib64'}" in link and str(root / "_C.so") in link


def test_pybind_meets_no_torch_header():
    """torch's own pybind11 refuses TORCH_TARGET_VERSION, which torch's stable headers need."""
    text = (ROOT / "csrc/bindings.cpp").read_text()
    assert "pybind11" in text and not re.search(r'#include\s*["<](torch|ATen|c10|bindings)', text)
