"""Where a caption's time goes on a CPU, one thread: from a video file to words.

    PYTHONPATH=.:kernels python -m bench caption-time bench/results/cpu-caption-time.json

The file has 640 x 480 pixels and 30 frames a second. `wide` has the widths of Wan 2.1's 1.3B in two
layers of random weights, which cost what trained ones do, and the embedded VAE and vocabulary. The
models and their caches take turns; a number is the median of its rounds.
"""

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from bench.harness import record
from bench.harness.timing import lap

EMBEDDED_MODEL, WIDE = "embedded", "wide"
CACHES, STEPS = ("exact", "frozen"), 20
SIZES, ROUNDS = ((9, 64), (17, 128)), 3
# Seconds: file and VAE each alone, then both at once; what is constant over the steps; the steps;
# tokens to words; the whole call; and from its start to the tokens of the first step.
STAGES = "file", "vae", "encode", "constants", "steps", "words", "call", "first"


def source(path: Path) -> Path:
    """A file of smooth motion, 3 seconds."""
    import numpy as np

    from engine.media import write_video

    y, x = np.mgrid[:480, :640]
    frames = (np.stack([x + 4 * n, y + 2 * n, x + y], -1) % 256 for n in range(90))
    write_video(path, (frame.astype(np.uint8)[None] for frame in frames), 30)
    return path


def wide(pipe):
    """The embedded pipeline around a network of the widths of Wan 2.1's 1.3B."""
    import torch

    from engine import ModelConfig, Pipeline, UniViGU

    own = pipe.model.cfg
    cfg = replace(ModelConfig.preset("wan2.1-1.3b"), layers=2, text_dim=own.text_dim)
    torch.manual_seed(0)
    model = UniViGU(replace(cfg, vocab=own.vocab)).eval()
    return Pipeline(model, pipe.vae, pipe.text, pipe.config)


def stages(pipe, path: Path, frames: int, side: int, cache: str) -> dict[str, float]:
    """Seconds of one caption by stage."""
    from engine import pipeline
    from engine.media import read_clips

    laps: dict[str, float] = {}
    pipe.config = replace(pipe.config, num_frames=frames, height=side, width=side)
    clip = lap(laps, "file", lambda: next(read_clips(path, pipe.config)))()
    lap(laps, "vae", pipe.encode_video)(clip.frames[None])

    made, encoded, captioned = pipeline.Run, pipe.encode_chunks, pipe._captions
    pipeline.Run = lap(laps, "constants", made)
    pipe.encode_chunks = lap(laps, "encode", encoded)
    pipe._captions = lap(laps, "words", captioned)
    begin = time.perf_counter()

    def after(_, step, *rest) -> None:
        laps.setdefault("first", time.perf_counter() - begin)

    try:
        how = {"num_inference_steps": STEPS, "video_cache": cache, "progress": False}
        found = pipe.caption(path, callback_on_step_end=after, **how)
    finally:
        pipeline.Run, pipe.encode_chunks, pipe._captions = made, encoded, captioned
    laps["call"] = time.perf_counter() - begin
    laps["steps"] = found.timings["denoise"] - laps["constants"]
    return {stage: laps[stage] for stage in STAGES}


def measured() -> dict:
    import torch

    from engine import Pipeline
    from engine.config import EMBEDDED

    torch.set_num_threads(1)
    small = Pipeline.from_pretrained(EMBEDDED, "cpu")
    pipes, rows = {EMBEDDED_MODEL: small, WIDE: wide(small)}, []
    with tempfile.TemporaryDirectory() as made:
        path = source(Path(made) / "source.mp4")
        for frames, side in SIZES:
            turns = [(model, cache) for model in pipes for cache in CACHES]
            rounds: dict[tuple, list[dict]] = {turn: [] for turn in turns}
            for _ in range(ROUNDS + 1):
                for model, cache in turns:
                    found = stages(pipes[model], path, frames, side, cache)
                    rounds[model, cache].append(found)

            for (model, cache), found in rounds.items():
                seconds = {s: statistics.median(one[s] for one in found[1:]) for s in STAGES}
                row = {"frames": frames, "side": side, "model": model, "cache": cache}
                rows.append(row | {"seconds": seconds, "rounds": found[1:]})
    said = {"state": record.state("cpu"), "environment": record.machine("cpu")}
    return {"schema": record.SCHEMA, "bench": "caption-time", "rows": rows} | said


def write(path: Path) -> None:
    path.write_text(json.dumps(measured(), indent=1) + "\n")
