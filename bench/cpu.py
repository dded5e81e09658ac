"""The engine on a CPU beside diffusers' Wan transformer: forward, training step, guided sampling
and captioning with the model of small_model.py, all implementations in one process, interleaved,
medians, share of the measured GEMM rate.

    python bench/cpu.py --output bench/results/cpu       writes cpu.json and cpu.md; 25 minutes
    python bench/cpu.py --passes training --output bench/results/cpu_training        10 minutes
"""

import argparse
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from ops import Clock, environment, interleaved, quartiles
from sampling import captioning, drifts, generating
from small_model import CONFIG, CONTEXT_ROWS, PLAIN, TEXT_ROWS, VIDEO_ROWS, diffusers_model, inputs
from training import training_steps

import engine
from engine import environment as engine_environment


def flops() -> float:
    """Of one forward of the engine, matrix products alone."""
    L, D, F, C = VIDEO_ROWS + TEXT_ROWS, CONFIG.dim, CONFIG.ffn_dim, CONTEXT_ROWS
    projections = 2 * L * D * (6 * D + 2 * F) + 2 * C * D * 2 * D
    return CONFIG.layers * (projections + 4 * L * (L + C) * D) + 4 * C * D * D


def forwards(dtype: torch.dtype) -> dict:
    """Name -> a call that runs one forward. The engine's encode the context too, as diffusers'."""
    x = inputs(dtype)

    def diffusers(compiled: bool):
        model = diffusers_model(dtype)
        model = torch.compile(model, dynamic=False) if compiled else model
        return lambda: model(x["video"].to(dtype), torch.tensor([500]), x["context"])

    def ours(kernels: str):
        torch.manual_seed(0)
        model = engine.UniViGU(CONFIG, dtype=dtype, kernels=kernels).eval()
        return lambda: model(**x)

    return {
        "diffusers": lambda: diffusers(False),
        "diffusers, torch.compile": lambda: diffusers(True),
        "engine, plain PyTorch": lambda: ours(PLAIN),
        "engine, cpu kernels": lambda: ours("cpu"),
    }


def gemm_rate(dtype: torch.dtype, clock: Clock) -> float:
    """FLOP per second of torch's best product of 2048 x 2048 matrices."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    times = interleaved({"nn": lambda: a @ b, "nt": lambda: a @ b.T}, clock, rounds=15)
    return 2 * 2048**3 / min(min(t) for t in times.values())


def peak_memory(kind: str, name: str, dtype: torch.dtype) -> float:
    """MiB that a fresh process takes at most, for three calls or one run. Left alone, glibc raises
    the size from which it returns what is freed, and a training step seems to need 350 more."""
    command = [sys.executable, __file__, "--measure", kind, name, str(dtype).split(".")[1]]
    frugal = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=frugal)
    return float(result.stdout.splitlines()[-1])


CAPTIONING = "v2t, 50 steps"
KINDS = {
    "forward": forwards,
    "training": training_steps,
    "t2v, guided, 10 steps": generating,
    CAPTIONING: captioning,
}
PASSES = {"forward": 1, "training": 6}  # forwards of a sample; runs skip too much to count
RUNS = 3  # rounds of a run


def run(kind: str, name: str, dtype: torch.dtype):
    call = KINDS[kind](dtype)[name]()
    if kind == "training":
        return call

    def inferred():
        with torch.inference_mode():
            call()

    return inferred


def rows(kind: str, dtype: torch.dtype, clock: Clock, rounds: int) -> list[dict]:
    names = KINDS[kind](dtype)
    calls = {name: run(kind, name, dtype) for name in names}
    times = interleaved(calls, clock, rounds if kind in PASSES else RUNS, budget=300)
    del calls
    work, rate = flops() * PASSES.get(kind, 0), gemm_rate(dtype, clock)
    base = next(iter(times))
    middle = {name: quartiles(t) for name, t in times.items()}
    drift = drifts(dtype) if kind == CAPTIONING else {}
    return [
        {
            "pass": kind, "dtype": str(dtype).split(".")[1], "implementation": name,
            "seconds": seconds, "against": base, "speedup": middle[base][1] / seconds[1],
            "share_of_gemm": work / seconds[1] / rate, "gemm_GFLOP/s": rate / 1e9,
            "peak_MiB": peak_memory(kind, name, dtype), "drift": drift.get(name),
        }
        for name, seconds in middle.items()
    ]  # fmt: skip


def markdown(table: dict) -> str:
    env = table["environment"]
    lines = [
        "# CPU",
        "",
        f"{env['device']}, {table['threads']} threads, torch {env['torch']}, commit "
        f"{env['commit']}; written by `make bench-cpu`. Medians and quartiles of interleaved "
        "rounds; share: matrix products' FLOP over the time, against the measured GEMM rate. "
        "Drift against the exact captions of the same weights, which are random.",
        "",
        "| pass | dtype | implementation | seconds (quartiles) | speed | of GEMM | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        low, middle, high = row["seconds"]
        cells = [row["pass"], row["dtype"], row["implementation"]]
        if row["drift"]:
            cells[-1] += " ({text_agreement:.0%} of tokens, K/V {kv_change:.1%} off)".format(
                **row["drift"]
            )
        cells += [f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{row['speedup']:.2f}x"]
        share = f"{row['share_of_gemm']:.0%}" if row["share_of_gemm"] else ""
        cells += [share, f"{row['peak_MiB']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="results without suffix")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--passes", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--measure", nargs=3, metavar=("PASS", "NAME", "DTYPE"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    if arguments.measure:
        kind, name, dtype = arguments.measure
        call = run(kind, name, getattr(torch, dtype))
        for _ in range(3 if kind in PASSES else 1):
            call()
        status = Path("/proc/self/status").read_text()  # rusage would give the parent's peak
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
        return
    clock, found = Clock("cpu"), []
    for dtype in (torch.bfloat16, torch.float32):
        for kind in arguments.passes:
            if dtype == torch.bfloat16 or kind in PASSES:
                found += rows(kind, dtype, clock, arguments.rounds)
    device = environment("cpu") | {"device": engine_environment.cpu()["name"]}
    table = {"schema": 1, "environment": device, "threads": 2, "rows": found}
    text = markdown(table)
    print(text)
    if arguments.output:
        arguments.output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
