"""What a benchmark records: JSON of schema 2 with its environment; and how numbers are written."""

import json
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.harness.timing import is_cuda
from engine.cli import environment
from engine.errors import UsageError

SCHEMA = 2
ROOT = Path(__file__).resolve().parents[2]
PEERS = {  # module: what installs it
    "diffusers": "pip install 'univigu-engine[bench]'",
    "flash_attn": "pip install 'univigu-engine[flash-attn]'",
    "xformers": "pip install 'univigu-engine[xformers]'",
    "torchao": "pip install 'univigu-engine[peers]'",
    "liger_kernel": "pip install 'univigu-engine[peers]'",
    "quack": "pip install 'univigu-engine[peers]'",
}


def absent() -> dict[str, str]:
    """Peers that are not installed, and the command that installs each."""
    return {name: how for name, how in PEERS.items() if find_spec(name) is None}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    found = subprocess.run(command, capture_output=True, text=True) if shutil.which("git") else None
    return found.stdout.strip() if found is not None and not found.returncode else ""


def machine(device: str) -> dict:
    """Hardware, software and commit; "changed": files of the checkout that differ from it."""
    cpu = environment.cpu()
    found = {
        "device": torch.cuda.get_device_name(device) if is_cuda(device) else cpu["name"],
        "cpu": {key: cpu[key] for key in ("name", "instruction sets", "cores usable")},
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": environment.packages(),
        "kernels": environment.backends()[f"{torch.device(device).type} bfloat16"].splitlines(),
        "UNIVIGU_KERNELS": os.environ.get("UNIVIGU_KERNELS"),
        "commit": git("rev-parse", "--short=12", "HEAD") or "unknown",
        "changed": git("diff", "--name-only", "HEAD").splitlines(),
    }
    return found | ({"CUDA": torch.version.cuda} if is_cuda(device) else {})


def state(device: str) -> dict:
    """Clocks, power and what else runs, as far as they can be read now. A nvidia-smi that cannot
    say is an entry of its own: the case goes on."""
    if is_cuda(device) and shutil.which("nvidia-smi"):
        asked = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", which, f"--query-gpu={asked}", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True)
        (line, *_) = (shown.stdout.strip() or shown.stderr.strip() or "nothing").splitlines()
        names, values = asked.split(","), line.split(", ")
        if shown.returncode or len(values) != len(names):
            return {"nvidia-smi": f"ended with {shown.returncode} and said: {line[:160]}"}
        return dict(zip(names, values, strict=True))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return {"MHz": clocks, "load of the last minute": os.getloadavg()[0]}


def read(path: Path) -> dict:
    """A result of this schema. Errors: UsageError."""
    try:
        table = json.loads(path.read_text())
        version = table["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"bench: {path} must be the JSON of a benchmark; got {type(error).__name__}: {error}. "
            "Pass a file that `univigu bench` wrote."
        ) from error
    if version != SCHEMA:
        raise UsageError(f"bench: {path} must be of schema {SCHEMA}; got {version}. Measure again.")
    return table


def duration(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size or unit == "us":
            break
    digits = f"{seconds / size:#.3g}" if seconds < 100 * size else f"{seconds / size:.0f}"
    return f"{digits.rstrip('.')} {unit}"


def speed(rate: float) -> str:
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:.0f} GFLOP/s"


def percent(row: dict, key: str) -> str:
    """Half of an interval, as a share of the figure in its middle."""
    low = row["low" if key == "seconds" else f"{key}_low"]
    if low is None or low == row[key]:  # one process, or the base's 1.00x
        return ""
    return f" ±{row[key] / low - 1:.1%}"
