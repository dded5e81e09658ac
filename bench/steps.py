"""One sampling step, eager and replayed from a CUDA graph: guided t2v, v2t exact and v2t with the
video's K and V kept. Random weights.

    python bench/steps.py --output bench/results/h100-steps            1.3B, 480 x 832 x 81 frames
    python bench/steps.py --preset tiny --frames 9 --height 64 --width 64 --device cpu

Medians over the steps of whole runs; capture time and what the shared pool grew by.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from ops import Clock, environment

import engine
from engine import sample
from engine.graphs import Graphs
from engine.sample import Kind
from engine.schedule import schedule

STEPS, GUIDANCE, CONTEXT_ROWS, PROMPT_TOKENS = 12, 5.0, 512, 40


def step_times(model, mode: str, kind: Kind, size, text_rows: int, graphs) -> list[float]:
    """Seconds of the steps of `kind` in one run, without the first of them."""
    device = model.vocab_embed.weight.device
    context = torch.zeros(2, 1, CONTEXT_ROWS, model.cfg.text_dim, device=device)
    if mode == "t2v":
        context[0, :, :PROMPT_TOKENS].normal_()
        context[1, :, :1].normal_()
    run = sample.Run(
        model, schedule(mode, STEPS, 3.0, "unipc", "exact"), torch.randn(1, 16, *size).to(device),
        sample.text_source(model, text_rows, [0]), *context, GUIDANCE,
        refresh_every=STEPS if kind.cached else 1, graphs=graphs,
    )  # fmt: skip
    clock, times = Clock(device.type), []
    steps = run.steps()
    for this in run.kinds:
        seconds = clock(lambda: next(steps))
        times += [seconds] if this == kind else []
    return times[1:]


def measure(model, size, text_rows: int) -> list[dict]:
    cases = [
        ("t2v", Kind(True, False)),
        ("v2t", Kind(False, True)),
        ("v2t", Kind(False, True, True)),
    ]
    rows = []
    for mode, kind in cases:
        ways = {"eager": None}
        if model.vocab_embed.weight.device.type == "cuda":
            ways["graph"] = Graphs()
        for way, graphs in ways.items():
            times = step_times(model, mode, kind, size, text_rows, graphs)
            reports = [] if graphs is None else [r for r in graphs.reports if r.kind == kind]
            rows.append({
                "mode": mode, "video": "cached" if kind.cached else "computed", "way": way,
                "seconds": statistics.median(times),
                "capture_seconds": reports[0].seconds if reports else None,
                "pool_MiB": reports[0].bytes / 2**20 if reports else None,
            })  # fmt: skip
            if graphs is not None:
                graphs.release()
    return rows


def markdown(table: dict) -> str:
    env = table["environment"]
    lines = [
        "# Steps", "",
        f"{env['device']}, torch {env['torch']}, commit {env['commit']}; {table['preset']}, "
        f"{table['size']} latents, {table['text_rows']} text rows, {table['dtype']}.", "",
        "| mode | video rows | way | ms a step | capture s | pool MiB |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in table["rows"]:
        capture = [
            "" if row[k] is None else f"{row[k]:.1f}" for k in ("capture_seconds", "pool_MiB")
        ]
        cells = [row["mode"], row["video"], row["way"], f"{1e3 * row['seconds']:.2f}", *capture]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="results without suffix")
    parser.add_argument("--preset", default="wan2.1-1.3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    for name, value in (("frames", 81), ("height", 480), ("width", 832), ("text-rows", 256)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    size = (a.frames - 1) // 4 + 1, a.height // 8, a.width // 8
    cfg = engine.ModelConfig.preset(a.preset)
    model = engine.UniViGU(cfg, a.device, getattr(torch, a.dtype)).eval()
    table = {
        "schema": 1, "environment": environment(a.device), "preset": a.preset, "size": list(size),
        "text_rows": a.text_rows, "dtype": a.dtype, "rows": measure(model, size, a.text_rows),
    }  # fmt: skip
    text = markdown(table)
    print(text)
    if a.output:
        a.output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
        a.output.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
