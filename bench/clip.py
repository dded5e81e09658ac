"""Where a clip's time goes, here and in diffusers: the embedded model's sizes on a CPU, one thread.

    PYTHONPATH=.:kernels python -m bench clip bench/results/cpu-clip.json      6 minutes
    PYTHONPATH=.:kernels python -m bench few bench/results/cpu-few.json        1 minute

diffusers' WanPipeline has the embedded VAE and text encoder, and a transformer of the same sizes
with random weights, which cost what trained ones do. Here the text rows are left out, so that both
evaluate the same. The calls take turns; a stage is the median of its rounds.

`few` has the embedded model in 24 guided steps, as it is graded, beside its model of few steps:
`generate` with its file, and what is in that file. The first size is the one that it was trained
with.
"""

import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.harness import record
from bench.harness.timing import lap
from engine.cli.clip import PROMPT, WAYS, in_turns, medians, seconds_of, stages_of

OURS, THEIRS = "engine", "diffusers"
SIZES, ROUNDS, FEW_ROUNDS = ((9, 64), (17, 128)), 5, 25
GUIDED, FEW, WHOLE = "24 guided steps", "few_steps=True", "generate()"


def ours(folder: Path) -> Callable[..., dict]:
    """Seconds by stage of a clip of the engine."""
    from engine import Pipeline
    from engine.config import EMBEDDED

    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")

    def call(how: dict, frames: int, side: int) -> dict:
        size = {"num_frames": frames, "height": side, "width": side, "text_rows": 0}
        return seconds_of(pipe, folder / "ours.mp4", **how, **size)

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

    pipe.encode_prompt = lap(laps, "encode", pipe.encode_prompt)
    pipe.vae.decode = lap(laps, "decode", pipe.vae.decode)

    def call(how: dict, frames: int, side: int) -> dict:
        begin = time.perf_counter()
        how = how | {"num_frames": frames, "height": side, "width": side, "max_sequence_length": 16}
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
            for name, how in WAYS.items():
                turns = {who: partial(call, how, frames, side) for who, call in calls.items()}
                found = in_turns(turns, ROUNDS)
                for who, rounds in found.items():
                    row = {"frames": frames, "side": side, "run": name, "who": who}
                    rows.append(row | {"seconds": medians(rounds), "rounds": rounds})
    return said("clip", rows)


def said(name: str, rows: list[dict]) -> dict:
    made = {"rows": rows, "state": record.state("cpu"), "environment": record.machine("cpu")}
    return {"schema": record.SCHEMA, "bench": name} | made


def generated(pipe, path: Path, how: dict) -> dict:
    """Seconds by stage of `generate` with its file, and of all of it. Errors: RuntimeError."""
    begin = time.perf_counter()
    clip = pipe.generate(PROMPT, progress=False, output_path=path, **how)
    whole = time.perf_counter() - begin

    check_file(path, clip)
    return stages_of(clip) | {"file": clip.timings["file"], WHOLE: whole}


def check_file(path: Path, clip) -> None:
    """Errors: RuntimeError where a file or its sidecar is not of this result of `generate`."""
    from engine.media import read_video

    shape = read_video(path).frames.shape
    told = json.loads(path.with_suffix(".json").read_text())
    if shape != tuple(told["shape"]) or told["settings"] != clip.settings:
        raise RuntimeError(f"{path}: frames are {shape} and its sidecar says {told}")


def few() -> dict:
    import torch

    from engine import Pipeline
    from engine.config import EMBEDDED
    from engine.toy.evaluation import GUIDANCE
    from engine.toy.evaluation import STEPS as GRADED

    torch.set_num_threads(1)
    guided = {"num_inference_steps": GRADED["t2v"], "guidance_scale": GUIDANCE}
    load = partial(Pipeline.from_pretrained, EMBEDDED, "cpu")
    pipes = {GUIDED: load(), FEW: load(few_steps=True)}
    ways, rows = {GUIDED: guided, FEW: {}}, []
    with tempfile.TemporaryDirectory() as made:
        path = Path(made, "clip.mp4")
        for frames, side in SIZES:
            size = {"num_frames": frames, "height": side, "width": side}
            calls = {n: partial(generated, pipes[n], path, how | size) for n, how in ways.items()}
            for name, rounds in in_turns(calls, FEW_ROUNDS).items():
                row = {"frames": frames, "side": side, "run": name}
                rows.append(row | {"seconds": medians(rounds), "rounds": rounds})
    return said("few", rows)


def write(path: Path, measure: Callable[[], dict] = measured) -> None:
    path.write_text(json.dumps(measure(), indent=1) + "\n")
