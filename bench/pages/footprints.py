"""The table of docs/training.md, in Markdown: what training needs of each rank, as `univigu train
--dry-run` counts it in a step on tensors without numbers.

    PYTHONPATH=.:kernels python -m bench footprints
"""

from contextlib import nullcontext

import torch

from engine.config import MeshConfig, ModelConfig, TrainConfig
from engine.recompute import POLICIES
from engine.train.dry_run import footprint, pretended

LATENTS, TEXT_ROWS, CONTEXT_ROWS = (21, 60, 104), 256, 512
LAYOUTS = [  # model, processes, mesh, batch
    ("1.3B", 1, MeshConfig(), 1),
    ("1.3B", 8, MeshConfig(), 8),
    ("1.3B", 8, MeshConfig(sp=8), 1),
    ("14B", 64, MeshConfig(sp=4), 16),
]


def row(model: str, processes: int, mesh: MeshConfig, batch: int) -> str:
    cfg, found = ModelConfig.preset(f"wan2.1-{model.lower()}"), []
    _, shard, sp, _ = mesh.shape(processes)
    with pretended(mesh, processes) if processes > 1 else nullcontext() as world:
        for policy in POLICIES:
            asked = TrainConfig(batch_size=batch, recompute=policy)
            sizes = cfg, asked, torch.bfloat16, LATENTS, TEXT_ROWS, CONTEXT_ROWS, world
            found.append(footprint(*sizes))
    layout = ", ".join(f"`{k}` {n}" for k, n in (("dp_shard", shard), ("sp", sp)) if n > 1)
    cells = [model, f"{processes}, {layout}" if layout else "1", f"{found[0].state / 1e9:.1f} GB"]
    return "| " + " | ".join([*cells, *(f"{f.peak / 1e9:.1f} GB" for f in found)]) + " |"


def markdown() -> str:
    first, *others = (f"`--recompute {policy}`" for policy in POLICIES)
    lines = [
        f"| model | processes | state | peak, {first} | {' | '.join(others)} |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [row(*layout) for layout in LAYOUTS])
