"""The engine on a CPU beside diffusers' Wan transformer: forward and training step of a small
model, all implementations in one process, interleaved, medians, share of the measured GEMM rate.

    python bench/cpu.py --output bench/results/cpu       writes cpu.json and cpu.md; 5 minutes

The model: width 512 (4 heads of 128), 6 blocks, feed-forward 2048, latents 16 x 5 x 30 x 52 (1950
video rows) and 512 context rows. The engine's has 64 text rows more, which diffusers' has not.
"""

import argparse
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import torch
from ops import Clock, environment, interleaved, quartiles

import engine
from engine import environment as engine_environment

CONFIG = engine.ModelConfig(
    heads=4, head_dim=128, layers=6, ffn_dim=2048, text_dim=512, freq_dim=256, vocab=1024
)
PLAIN = "adaln=reference,residual_adaln=reference,qknorm_rope=reference,rope3d=reference,"
PLAIN += "joint_attention=sdpa,cross_attention=sdpa,routed_ffn=reference"
VIDEO_ROWS, TEXT_ROWS, CONTEXT_ROWS = 1950, 64, 512


def flops() -> float:
    """Of one forward of the engine, matrix products alone."""
    L, D, F, C = VIDEO_ROWS + TEXT_ROWS, CONFIG.dim, CONFIG.ffn_dim, CONTEXT_ROWS
    projections = 2 * L * D * (6 * D + 2 * F) + 2 * C * D * 2 * D
    return CONFIG.layers * (projections + 4 * L * (L + C) * D) + 4 * C * D * D


def inputs(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "video": torch.randn(1, 16, 5, 30, 52, generator=g),
        "tokens": torch.randint(CONFIG.vocab, (1, TEXT_ROWS), generator=g),
        "t_video": torch.tensor([500.0]),
        "t_text": torch.tensor([500.0]),
        "context": torch.randn(1, CONTEXT_ROWS, CONFIG.text_dim, generator=g).to(dtype),
    }


def diffusers_model(dtype: torch.dtype):
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=CONFIG.heads, attention_head_dim=CONFIG.head_dim,
        num_layers=CONFIG.layers, ffn_dim=CONFIG.ffn_dim, text_dim=CONFIG.text_dim,
        freq_dim=CONFIG.freq_dim, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).to(dtype).eval()  # fmt: skip


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


def training_steps(dtype: torch.dtype) -> dict:
    """Name -> a call that runs forward, backward and AdamW."""
    x = inputs(dtype)

    def make(kernels: str):
        torch.manual_seed(0)
        model = engine.UniViGU(CONFIG, dtype=dtype, kernels=kernels).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

        def step():
            out = model(**x)
            text = torch.nn.functional.cross_entropy(out.logits[0].float(), x["tokens"][0])
            (out.velocity.float().square().mean() + text).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    return {
        "engine, plain PyTorch": lambda: make(PLAIN),
        "engine, cpu kernels": lambda: make("cpu"),
    }


def gemm_rate(dtype: torch.dtype, clock: Clock) -> float:
    """FLOP per second of torch's best product of 2048 x 2048 matrices."""
    a, b = (torch.randn(2048, 2048, dtype=dtype) for _ in range(2))
    times = interleaved({"nn": lambda: a @ b, "nt": lambda: a @ b.T}, clock, rounds=15)
    return 2 * 2048**3 / min(min(t) for t in times.values())


def peak_memory(kind: str, name: str, dtype: torch.dtype) -> float:
    """MiB that a fresh process takes at most, for three calls."""
    command = [sys.executable, __file__, "--measure", kind, name, str(dtype).split(".")[1]]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(result.stdout.splitlines()[-1])


def run(kind: str, name: str, dtype: torch.dtype):
    call = {"forward": forwards, "training": training_steps}[kind](dtype)[name]()
    if kind == "training":
        return call

    def inferred():
        with torch.inference_mode():
            call()

    return inferred


def rows(kind: str, dtype: torch.dtype, clock: Clock, rounds: int) -> list[dict]:
    names = {"forward": forwards, "training": training_steps}[kind](dtype)
    calls = {name: run(kind, name, dtype) for name in names}
    times = interleaved(calls, clock, rounds, budget=300)
    work = flops() * (3 if kind == "training" else 1)
    rate = gemm_rate(dtype, clock)
    base = next(iter(times))
    middle = {name: quartiles(t) for name, t in times.items()}
    return [
        {
            "pass": kind, "dtype": str(dtype).split(".")[1], "implementation": name,
            "seconds": seconds, "against": base, "speedup": middle[base][1] / seconds[1],
            "share_of_gemm": work / seconds[1] / rate, "gemm_GFLOP/s": rate / 1e9,
            "peak_MiB": peak_memory(kind, name, dtype),
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
        "rounds; share: matrix products' FLOP over the time, against the measured GEMM rate.",
        "",
        "| pass | dtype | implementation | seconds (quartiles) | speed | of GEMM | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table["rows"]:
        low, middle, high = row["seconds"]
        cells = [row["pass"], row["dtype"], row["implementation"]]
        cells += [f"{middle:.3f} ({low:.3f} to {high:.3f})", f"{row['speedup']:.2f}x"]
        cells += [f"{row['share_of_gemm']:.0%}", f"{row['peak_MiB']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="results without suffix")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--measure", nargs=3, metavar=("PASS", "NAME", "DTYPE"))
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    if arguments.measure:
        kind, name, dtype = arguments.measure
        call = run(kind, name, getattr(torch, dtype))
        for _ in range(3):
            call()
        status = Path("/proc/self/status").read_text()  # rusage would give the parent's peak
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)
        return
    clock, found = Clock("cpu"), []
    for dtype in (torch.bfloat16, torch.float32):
        for kind in ("forward", "training"):
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
