"""Scenes of the synthetic set as a latent shard."""

from pathlib import Path

import torch

from engine.config import PipelineConfig
from engine.data import write_shard
from engine.toy.scenes import FPS, FRAMES, SIZE, draw_scenes, render


def preprocess_scenes(
    parts, made_with: dict, path: str | Path, count: int, seed: int, text_rows: int, progress=iter
) -> None:
    """Renders `count` training scenes, encodes them with a pipeline's VAE and text encoder, writes
    one shard. made_with: the `data_fingerprint` of the pipeline's folder."""
    scenes = draw_scenes(count, seed, held_out=False)
    latents = [
        parts.encode_video(torch.from_numpy(render(scenes[i : i + 32]))).half()
        for i in progress(range(0, count, 32))
    ]
    texts = [(scene.prompt, scene.caption) for scene in scenes]
    config = PipelineConfig(
        text_rows=text_rows, num_frames=FRAMES, height=SIZE, width=SIZE, fps=FPS
    )
    write_shard(parts, made_with, path, latents, texts, config, {"scenes": count, "seed": seed})
