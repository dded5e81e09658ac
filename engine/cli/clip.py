"""Where a whole clip's time goes: `univigu profile --clip`, and the engine's part of
`python -m bench clip`."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from engine.media.text import Kept
from engine.result import FIRST, Result

STAGES = "encode", "steps", "decode", "file"
WAYS = {  # what a clip is made in: as trained, and as distilled
    "50 guided steps": {"num_inference_steps": 50, "guidance_scale": 5.0},
    "4 steps": {"num_inference_steps": 4, "guidance_scale": 1.0},
}
PROMPT, ROUNDS = "a red circle moves left", 3


def pipeline(loading):
    """The pipeline of an `engine.cli.sampling.Loading`. Errors: those of loading one."""
    from engine.pipeline import Pipeline

    return Pipeline.from_pretrained(
        loading.folder(),
        *loading.place(),
        loading.kernels,
        loading.precision,
        loading.transformer(),
        cuda_graphs=False if loading.eager else None,
    )


def seconds_of(pipe, path: Path, **settings) -> dict[str, float]:
    """Makes a clip and then its file; returns the seconds of STAGES and those until its first frame
    is decoded. The prompt is encoded, whether it was before or not.

    settings: of `Pipeline.generate`.
    """
    pipe.text.kept = Kept()
    clip = pipe.generate(PROMPT, progress=False, **settings)
    begin = time.perf_counter()
    clip.save(path)
    return stages_of(clip) | {"file": time.perf_counter() - begin}


def stages_of(clip: Result) -> dict[str, float]:
    """The seconds that `generate` says of its stages, by the names in STAGES."""
    laps = clip.timings
    found = {"encode": laps["encode"], "steps": laps["denoise"], "decode": laps["decode"]}
    return found | {FIRST: laps[FIRST]}


def in_turns(calls: Mapping[str, Callable[[], dict]], rounds: int) -> dict[str, list[dict]]:
    """What each call gives in each round; in one round before, which does not count, kernels are
    compiled and captured."""
    found: dict[str, list[dict]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            seconds = call()
            if number:
                found[name].append(seconds)
    return found


def medians(rounds: list[dict]) -> dict[str, float]:
    return {stage: statistics.median(one[stage] for one in rounds) for stage in rounds[0]}


def profile(pipe, folder: Path, **settings) -> str:
    """Times a clip made in each of WAYS, in turns; returns a table in Markdown, which goes into
    folder/stages.md, and the rounds into stages.json, beside the last clip.

    settings: of `Pipeline.generate`.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def call(how: dict) -> Callable[[], dict]:
        return lambda: seconds_of(pipe, folder / "clip.mp4", **settings, **how)

    found = in_turns({name: call(how) for name, how in WAYS.items()}, ROUNDS)
    (folder / "stages.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        f"| seconds | {' | '.join(STAGES)} | in all | {FIRST} |",
        f"|---|{'---:|' * (len(STAGES) + 2)}",
    ]
    for name, rounds in found.items():
        seconds = medians(rounds)
        own = [seconds[stage] for stage in STAGES]
        shown = " | ".join(f"{x:.3f}" for x in (*own, sum(own), seconds[FIRST]))
        lines.append(f"| {name} | {shown} |")

    text = "\n".join(lines)
    (folder / "stages.md").write_text(text + "\n")
    return text
