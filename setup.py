"""Builds univigu_kernels._C where it can be built, and says what is left out and why.

CPU kernels     when torch, ninja and a C++ compiler (CXX, else c++) are there
CUDA kernels    when nvcc is there too and torch was built for the same CUDA, or when UNIVIGU_CUDA=1
                asks; UNIVIGU_CUDA=0 leaves them out
A wheel without _C is valid: operations then run on their other backends.

    pip install --no-build-isolation -e .             builds with the torch that is installed
    python setup.py build_ext --inplace               builds again after a change
    UNIVIGU_SANITIZE=address,undefined python ...     CPU kernels under sanitizers
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
STABLE_ABI = "0x020b000000000000"  # of torch 2.11: what is built runs with that and with newer ones
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma"
X86 = {"avx2": "-mavx2 -mfma", "avx512": AVX512, "avx512bf16": AVX512 + " -mavx512bf16"}
ISAS = {"portable": ""} | (X86 if platform.machine() in ("x86_64", "AMD64") else {})
ARCHITECTURES = ("80", "90a", "100a")
COMMON = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra"
# GCC 12 takes the undefined operands in its own AVX-512 headers for uninitialised variables.
CPU = "-fno-math-errno -ffp-contract=fast -Wno-uninitialized -Wno-maybe-uninitialized"


def skipped(what: str, why: str) -> None:
    print(f"setup.py: {what} left out: {why}", file=sys.stderr)


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def missing_for_cpu() -> str | None:
    """What the extension cannot be built for, or None."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed in the build environment (use --no-build-isolation)"
    if compiler() is None:
        return "no C++ compiler (set CXX)"
    return None if ninja() else "no ninja (pip install ninja)"


def ninja() -> str | None:
    """That of this Python first: an environment that is not activated is not on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return shutil.which("ninja", path=path)


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which(str(Path(home) / "bin/nvcc"))


def toolkit() -> Path:
    """The folder that nvcc works in (include, lib64); nvcc itself may be a script elsewhere."""
    command = [nvcc(), "--dryrun", "-x", "cu", "-E", os.devnull]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return Path(re.search(r"^#\$ TOP=(.*)$", shown, re.M)[1]).resolve()


def missing_for_cuda() -> str | None:
    import torch

    asked = os.environ.get("UNIVIGU_CUDA", "")
    if asked == "0":
        return "UNIVIGU_CUDA=0"
    if nvcc() is None:
        return "no nvcc on the PATH or in CUDA_HOME"
    if asked == "1":
        return None
    if torch.version.cuda is None:
        return "the installed torch is a CPU build"
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    (release,) = re.findall(r"release (\d+)\.", version)
    if release != torch.version.cuda.split(".")[0]:
        return f"nvcc is of CUDA {release}, torch of {torch.version.cuda}"
    return None


class Ninja(build_ext):
    """Every CPU kernel is compiled once per instruction set, which setuptools cannot express."""

    def build_extension(self, extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        build = ROOT / "build/univigu_C"  # not build_temp, which is fresh for each pip install
        for folder in (build, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        cuda_reason = missing_for_cuda()
        if cuda_reason:
            skipped("CUDA kernels", cuda_reason)
        (build / "build.ninja").write_text(rules(cuda_reason is None, target))
        subprocess.run([ninja(), "-C", str(build)], check=True)


def shell(*arguments) -> str:
    """As ninja hands them to the shell: each stays one argument, whatever stands in it."""
    return shlex.join(map(str, arguments)).replace("$", "$$")


def place(path: Path | str) -> str:
    """A file in a line that starts with `build`."""
    return re.sub(r"[$ :]", r"$\g<0>", str(path))


def flags(cuda: bool) -> dict[str, str]:
    import torch
    from torch.utils import cpp_extension

    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    include.append(f"-isystem{sysconfig.get_paths()['include']}")
    sanitizers = os.environ.get("UNIVIGU_SANITIZE")
    sanitize = f"-fsanitize={sanitizers} -fno-omit-frame-pointer -g -O1" if sanitizers else ""
    names = " ".join(ARCHITECTURES) if cuda else ""
    info = [f'-DUNIVIGU_TORCH="{torch.__version__}"', f'-DUNIVIGU_CUDA="{names}"']
    stable = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-DUSE_CUDA"][: 2 if cuda else 1]
    link = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
    if cuda:
        home = toolkit()
        include.append(f"-isystem{home / 'include'}")
        link += ["-ltorch_cuda", f"-L{home / 'lib64'}", "-lcudart"]
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    return {
        "common": f"{COMMON} {shell('-I' + str(ROOT / 'csrc'))} {sanitize}",
        # Of the Python module, whose pybind11 is torch's: that of 2.11 refuses the stable ABI.
        "module": shell(*info, *include),
        "bindings": shell(*stable, *include),
        "cpu": CPU,
        "cuda": f"-O3 -std=c++17 -lineinfo -Xcompiler -fPIC {' '.join(codes)}",
        "link": f"-shared {shell(*link)} {sanitize}",
    }


def rules(cuda: bool, target: Path) -> str:
    """The text of build.ninja."""
    lines = [f"{name} = {value}" for name, value in flags(cuda).items()]
    lines.append("rule cxx")
    lines.append(f" command = {shell(compiler())} $common $flags -MMD -MF $out.d -c $in -o $out")
    lines += [" deps = gcc", " depfile = $out.d", "rule link"]
    lines.append(f" command = {shell(compiler())} $in $link -o $out")
    if cuda:
        lines += ["rule nvcc", f" command = {shell(nvcc())} $cuda -MMD -MF $out.d -c $in -o $out"]
        lines += [" deps = gcc", " depfile = $out.d"]
    objects = []

    def compile_to(name: str, rule: str, source: Path, flags: str = "") -> None:
        objects.append(name)
        lines.append(f"build {name}: {rule} {place(source)}\n flags = {flags}")

    for source in sorted((ROOT / "csrc").glob("bindings*.cpp")):
        if cuda or source.stem != "bindings_cuda":
            named = "$module" if source.stem == "bindings" else "$bindings"
            compile_to(f"{source.stem}.o", "cxx", source, named)
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        for isa, isa_flags in ISAS.items():
            compile_to(f"{source.stem}.{isa}.o", "cxx", source, f"$cpu {isa_flags}")
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")) if cuda else ():
        compile_to(f"{source.stem}.cuda.o", "nvcc", source)
    lines.append(f"build {place(target)}: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    reason = missing_for_cpu()
    if reason:
        skipped("univigu_kernels._C", reason)
    extensions = [] if reason else [Extension("univigu_kernels._C", [])]
    setup(ext_modules=extensions, cmdclass={"build_ext": Ninja})
