"""What a benchmark leaves: one JSON of schema 2 with its environment, and the same as Markdown."""

import json
import os
import platform
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.timing import is_cuda
from engine import environment
from engine.errors import UsageError

SCHEMA = 2
ROOT = Path(__file__).resolve().parent.parent
PEERS = {  # module: what installs it
    "diffusers": "pip install 'univigu-engine[models]'",
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
    """Clocks, power and what else runs, as far as they can be read now."""
    if is_cuda(device) and shutil.which("nvidia-smi"):
        asked = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        which = f"--id=GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", which, f"--query-gpu={asked}", "--format=csv,noheader"]
        shown = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return dict(zip(asked.split(","), shown[0].split(", "), strict=True)) if shown else {}
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


def write(table: dict, stem: Path) -> list[Path]:
    """stem.json, stem.md and the pictures stem-*.png; -> their paths."""
    from bench import plots

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}{suffix}") for suffix in (".json", ".md")]
    paths[0].write_text(json.dumps(table, indent=1) + "\n")
    pictures = plots.write(table, stem)
    links = [f"![{path.stem}]({path.name})" for path in pictures]
    paths[1].write_text("\n".join([markdown(table), *links]).rstrip() + "\n")
    return paths + pictures


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


def cells(row: dict, ceilings: dict) -> list[str]:
    name = row["case"] + (f" {row['pass']}" if "pass" in row else "")
    name += f", {row['along']} {row['x']}" if "along" in row else ""
    named = f"{row['implementation']}" + (f" ({row['note']})" if row.get("note") else "")
    found = [name, row["dtype"].replace("bfloat16", "bf16").replace("float32", "fp32"), named]
    found.append(duration(row["seconds"]) + percent(row, "seconds"))
    found.append(f"{row['speedup']:.2f}x" + percent(row, "speedup"))
    predicted = row.get("predicted")
    share = predicted and predicted / row["seconds"]
    found.append(f"{duration(predicted)} ({share:.0%})" if predicted else "")
    roof, flops = ceilings.get(row["dtype"]), row.get("flops")
    rate = flops / row["seconds"] if flops else None
    found.append("" if not rate else speed(rate))
    found.append("" if not rate or not roof else f"{rate / roof['flops']:.0%}")
    size = row.get("bytes")
    found.append("" if not size else f"{size / row['seconds'] / 1e9:.0f} GB/s")
    memory = row.get("peak_bytes")
    found.append("" if not memory else f"{memory / 2**20:.0f} MiB")
    found.append("" if row.get("error") is None else f"{row['error']:.0e}")
    return found


HEAD = (
    "case",
    "dtype",
    "implementation",
    "time",
    "speed",
    "predicted (of the time)",
    "rate",
    "of GEMM",
    "bandwidth",
    "peak memory",
    "error",
)


def rows_of(table: dict) -> list[list[str]]:
    """Heading and rows as text, without the columns that are empty."""
    rows = [cells(row, table["ceilings"]) for row in table["rows"]]
    used = [i for i in range(len(HEAD)) if any(row[i] for row in rows)]
    return [[row[i] for i in used] for row in [list(HEAD), *rows]]


def screen(table: dict) -> str:
    rows = rows_of(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines + remarks(table))


def remarks(table: dict) -> list[str]:
    lines = [f"not timed: {name}: {why}" for name, why in table["refused"].items()]
    return lines + [f"absent: {name}: {how}" for name, how in table["absent"].items()]


def markdown(table: dict) -> str:
    env, setting = table["environment"], table["setting"]
    changed = f" with changes to {', '.join(env['changed'])}" if env["changed"] else ""
    roofs = "; ".join(
        f"{dtype.replace('bfloat16', 'bf16').replace('float32', 'fp32')}: GEMM "
        f"{speed(roof['flops'])}, copy {roof['bytes'] / 1e9:.0f} GB/s"
        for dtype, roof in table["ceilings"].items()
    )
    sizes = ", ".join(f"{key} {value}" for key, value in setting.items())
    head, *rows = rows_of(table)
    lines = [
        f"# univigu bench {table['bench']}: {env['device']}",
        "",
        f"torch {env['torch']}, Python {env['python']}, {env['threads']} threads, commit "
        f"{env['commit']}{changed}. {sizes}.",
        "",
        f"Ceilings measured in the same run: {roofs}.",
        "",
        "Means over processes of medians over interleaved rounds. ±: where another run's figure "
        "is expected, 95% of the time (`bench/timing.py`). Speed: against the first row of the "
        "case and dtype. Predicted: by the ceilings (`engine/roofline.py`). Error: relative, "
        f"against plain PyTorch in {'its own dtype' if table['bench'] == 'scale' else 'fp32'}; "
        "none: not taken.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in remarks(table)),
    ]
    return "\n".join(lines) + "\n"
