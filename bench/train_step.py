"""`engine.train_step` of a whole model on a GPU beside diffusers' Wan transformer under
torch.compile: samples per second, MFU and peak memory. Random weights and data.

    python bench/train_step.py --output bench/results/h100-train       1.3B, 480 x 832 x 81 frames
    python bench/train_step.py --preset tiny --frames 9 --height 64 --width 64 --device cpu

Batch 1, no average. diffusers' step is video alone (no text rows, no text loss), with bf16 weights
and moments, which is less work and less memory than fp32 masters.
"""

import argparse
import gc
import json
import statistics
from functools import partial
from pathlib import Path

import torch
from ops import Clock, environment
from torch.nn import functional as F

import engine
from engine.cost import peak_flops, train_flops

CONTEXT_ROWS, WARM_UP, STEPS = 512, 2, 5
DIFFUSERS = "diffusers, torch.compile, gradient checkpointing"


def batch(cfg, size, text_rows: int, device: str) -> dict[str, torch.Tensor]:
    ids = torch.randint(cfg.vocab, (1, text_rows))
    rows = {
        "latents": torch.randn(1, 16, *size),
        "prompt_tokens": ids,
        "prompt_lengths": torch.tensor([text_rows]),
        "caption_tokens": ids.flip(1),
        "context": torch.randn(1, CONTEXT_ROWS, cfg.text_dim),
        "null_context": torch.zeros(CONTEXT_ROWS, cfg.text_dim),
    }
    return {name: x.to(device) for name, x in rows.items()}


def ours(cfg, rows, device: str, dtype: torch.dtype, recompute: str):
    model = engine.UniViGU(cfg, device, dtype)
    settings = engine.TrainConfig(
        stage="refine", batch_size=1, ema=0.0, recompute=recompute, t2v_share=0.0, v2t_share=0.0
    )
    state = engine.TrainState.create(model, settings)
    return lambda: engine.train_step(state, rows)


def diffusers(cfg, rows, device: str, dtype: torch.dtype):
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=cfg.heads, attention_head_dim=cfg.head_dim, num_layers=cfg.layers,
            ffn_dim=cfg.ffn_dim, text_dim=cfg.text_dim, freq_dim=cfg.freq_dim,
            cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        ).to(dtype).train()  # fmt: skip
    model.enable_gradient_checkpointing()
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    x, context = rows["latents"].to(dtype), rows["context"].to(dtype)
    time = torch.tensor([500], device=device)

    def step():
        F.mse_loss(compiled(x, time, context).sample.float(), rows["latents"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, make, device: str, flops: int | None, peak: float | None) -> dict:
    """One implementation at a time: two do not fit."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Clock(device)
    try:
        step = make()
        times = [clock(step) for _ in range(WARM_UP + STEPS)][WARM_UP:]
    except Exception as error:  # a peer's compiler may raise anything; the others still count
        first = str(error).partition("\n")[0]
        return {"implementation": name, "failed": f"{type(error).__name__}: {first}"}
    seconds = statistics.median(times)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    mfu = flops / seconds / peak if flops and peak else None
    return {"implementation": name, "seconds": seconds, "mfu": mfu, "peak_GB": memory}


def markdown(table: dict) -> str:
    env = table["environment"]
    lines = [
        "# Training steps", "",
        f"{env['device']}, torch {env['torch']}, commit {env['commit']}; {table['preset']}, "
        f"{table['size']} latents, {table['text_rows']} text rows, {table['dtype']}, batch 1.", "",
        "| implementation | s a step | samples/s | MFU | peak GB |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in table["rows"]:
        if "failed" in row:
            lines.append(f"| {row['implementation']} | {row['failed']} | | | |")
            continue
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "" if row["peak_GB"] is None else f"{row['peak_GB']:.1f}"
        rate = f"{row['seconds']:.3f} | {1 / row['seconds']:.3f}"
        lines.append(f"| {row['implementation']} | {rate} | {mfu} | {memory} |")
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
    cfg, dtype = engine.ModelConfig.preset(a.preset), getattr(torch, a.dtype)
    video_rows = size[0] * size[1] * size[2] // 4
    flops = train_flops(
        cfg, video_rows=video_rows, text_rows=a.text_rows, context_rows=CONTEXT_ROWS
    )
    env = environment(a.device)
    peak = peak_flops(env["device"], a.dtype)
    rows, found = batch(cfg, size, a.text_rows, a.device), []
    makers = {
        f"engine, recompute={policy}": partial(ours, cfg, rows, a.device, dtype, policy)
        for policy in ("attention", "block")
    }
    makers[DIFFUSERS] = partial(diffusers, cfg, rows, a.device, dtype)
    for name, make in makers.items():
        counted = None if name == DIFFUSERS else flops
        found.append(measure(name, make, a.device, counted, peak))
        table = {
            "schema": 1, "environment": env, "preset": a.preset, "size": list(size),
            "text_rows": a.text_rows, "dtype": a.dtype, "rows": found,
        }  # fmt: skip
        if a.output:  # after each, for the time on a GPU may end
            a.output.with_suffix(".json").write_text(json.dumps(table, indent=1) + "\n")
            a.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))


if __name__ == "__main__":
    main()
