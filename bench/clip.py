"""Where a clip's time goes, here and in diffusers: the embedded model's sizes on a CPU, one thread.

    PYTHONPATH=.:kernels python -m bench clip bench/results/cpu-clip.json      6 minutes

diffusers' WanPipeline has the embedded VAE and text encoder, and a transformer of the same sizes
with random weights, which cost what trained ones do. Here the text rows are left out, so that both
evaluate the same. The calls take turns; a stage is the median of its rounds.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.harness import record

OURS, THEIRS = "engine", "diffusers"
STEPS = {"50 guided steps": (50, 5.0), "4 steps": (4, 1.0)}
SIZES, ROUNDS, PROMPT = ((9, 64), (17, 128)), 5, "a red circle moves left"
STAGES = "encode", "steps", "decode", "file"


def ours(folder: Path) -> Callable[..., dict]:
    """Seconds by stage of a clip of the engine."""
    from engine import Pipeline
    from engine.config import EMBEDDED
    from engine.media.text import Kept

    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")

    def call(steps: int, guidance: float, frames: int, side: int) -> dict:
        pipe.text.kept = Kept()  # as diffusers, which encodes every prompt
        how = {"num_inference_steps": steps, "guidance_scale": guidance, "text_rows": 0}
        clip = pipe.generate(PROMPT, frames, side, side, progress=False, **how)
        begin = time.perf_counter()
        clip.save(folder / "ours.mp4")
        found = {"encode": clip.timings["encode"], "steps": clip.timings["denoise"]}
        return found | {"decode": clip.timings["decode"], "file": time.perf_counter() - begin}

    return call


def wan_pipeline():
    """diffusers' pipeline of the embedded model's parts and sizes."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    from bench.harness.models import Setting, diffusers_model
    from engine.config import EMBEDDED

    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    file = str(EMBEDDED / "tokenizer" / "tokenizer.json")
    return WanPipeline(
        tokenizer=PreTrainedTokenizerFast(tokenizer_file=file, **names),
        text_encoder=UMT5EncoderModel.from_pretrained(EMBEDDED / "text_encoder"),
        vae=AutoencoderKLWan.from_pretrained(EMBEDDED / "vae"),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=diffusers_model(Setting(preset="tiny"), torch.float32),
    )


def theirs(folder: Path) -> Callable[..., dict]:
    """Seconds by stage of a clip of diffusers; its file is written as ours."""
    from engine.media import write_video

    pipe, laps = wan_pipeline(), {}
    pipe.set_progress_bar_config(disable=True)

    def timed(name: str, call: Callable) -> Callable:
        def run(*args, **kwargs):
            begin = time.perf_counter()
            found = call(*args, **kwargs)
            laps[name] = time.perf_counter() - begin
            return found

        return run

    pipe.encode_prompt = timed("encode", pipe.encode_prompt)
    pipe.vae.decode = timed("decode", pipe.vae.decode)

    def call(steps: int, guidance: float, frames: int, side: int) -> dict:
        begin = time.perf_counter()
        how = {"num_inference_steps": steps, "guidance_scale": guidance}
        how |= {"num_frames": frames, "height": side, "width": side, "max_sequence_length": 16}
        clip = pipe(PROMPT, output_type="np", **how).frames[0]
        whole = time.perf_counter() - begin

        begin = time.perf_counter()
        write_video(folder / "theirs.mp4", (clip * 255).round().astype("uint8"), 8)
        file = time.perf_counter() - begin
        return laps | {"steps": whole - laps["encode"] - laps["decode"], "file": file}

    return call


def measured() -> dict:
    import torch

    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as made:
        calls = {OURS: ours(Path(made)), THEIRS: theirs(Path(made))}
        for frames, side in SIZES:
            for name, how in STEPS.items():
                rounds: dict[str, list[dict]] = {who: [] for who in calls}
                for _ in range(ROUNDS + 1):
                    for who, call in calls.items():
                        rounds[who].append(call(*how, frames, side))
                for who, found in rounds.items():
                    seconds = {s: statistics.median(one[s] for one in found[1:]) for s in STAGES}
                    row = {"frames": frames, "side": side, "run": name, "who": who}
                    rows.append(row | {"seconds": seconds, "rounds": found[1:]})
    made = {"rows": rows, "state": record.state("cpu"), "environment": record.machine("cpu")}
    return {"schema": record.SCHEMA, "bench": "clip"} | made


def write(path: Path) -> None:
    path.write_text(json.dumps(measured(), indent=1) + "\n")
