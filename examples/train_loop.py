"""Train the embedded model for a few steps, in one process or in all that torchrun starts.

    univigu preprocess --model-path engine/assets/tiny --synthetic 16 --output-path toy.safetensors
    python examples/train_loop.py toy.safetensors
    torchrun --nproc-per-node 2 examples/train_loop.py toy.safetensors

`univigu train` is this loop with checkpoints, metrics and restarts.
"""

import sys

import torch
import torch.distributed as dist

import engine
from engine.config import MeshConfig
from engine.data import LatentSet, stream
from engine.parallel import World

CONFIG = engine.TrainConfig(stage="refine", steps=4, batch_size=8, warmup=2)


def main(shard: str, target: str = "runs/trained") -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    world = World.start(MeshConfig(), device) if dist.is_torchelastic_launched() else None
    rank, ranks = (0, 1) if world is None else (world.data_rank, world.data_size)

    # Several ranks make the model in host memory; each takes its share of it to its device.
    model = engine.load_model("engine/assets/tiny", device if world is None else "cpu")
    state = engine.TrainState.create(model, CONFIG, world)

    # Every rank reads its own share of each batch.
    data = LatentSet(shard)
    steps = range(CONFIG.steps)
    for _, batch in stream(data, steps, CONFIG.batch_size, CONFIG.seed, rank, ranks):
        batch = {name: x.to(state.skipped.device) for name, x in batch.items()}
        metrics = engine.train_step(state, batch)

        if rank == 0:
            print(f"step {state.step}: loss {metrics['loss'].item():.4f}")

    averaged = state.ema_model()  # all ranks call it; rank 0 gets the model
    if rank == 0:
        engine.save_pretrained(averaged, target)
        print(target)

    if world is not None:
        world.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
