"""Grades a model on held-out scenes of the synthetic set: triples of colour, shape and motion that
no training clip, prompt or caption had."""

import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.config import EMBEDDED
from engine.pipeline import Pipeline
from engine.toy import judge
from engine.toy.scenes import ATTRIBUTES, IN_PROMPT, ONLY_IN_CAPTION, Scene, draw_scenes, render

BATCH = 25

STEPS = {"t2v": 24, "v2t": 24, "t2vt": 32}

GUIDANCE = 3.0


def share(pairs: list[tuple[dict, dict]], attributes: tuple[str, ...]) -> dict[str, float]:
    """Share of equal values by attribute over (read, truth) pairs, and "all" of them: attributes x
    cases. An attribute that could not be read (None) counts as wrong, also against another None."""
    right = {
        a: [read[a] is not None and read[a] == truth[a] for read, truth in pairs]
        for a in attributes
    }
    by_name = {a: float(np.mean(values)) for a, values in right.items()}
    return by_name | {"all": float(np.mean(list(by_name.values())))}


def truth_of(scene: Scene) -> dict[str, str]:
    return {a: getattr(scene, a) for a in ATTRIBUTES}


def shown(result) -> dict[str, str | None]:
    return judge.read_pixels(result.frames)


def said(result) -> dict[str, str | None]:
    return judge.read_caption(result.caption)


def make(
    pipe: Pipeline,
    scenes: list[Scene],
    mode: str,
    seed: int,
    steps: int | None,
    progress=True,
    **choices,
) -> list:
    """Results of pipe.generate for the scenes' prompts, or of pipe.caption for their rendered
    clips; `choices` go to the one that is called."""
    results = []
    for at in tqdm(range(0, len(scenes), BATCH), desc=mode, disable=not progress, leave=False):
        part = scenes[at : at + BATCH]
        seeds = [seed + at + i for i in range(len(part))]
        common = {"num_inference_steps": steps, "seed": seeds, "progress": False}

        if mode == "v2t":
            results += pipe.caption(render(part), **common, **choices)
        else:
            prompts = [scene.prompt for scene in part]
            results += pipe.generate(prompts, mode=mode, **common, **choices)
    return results


def grade(
    scenes: list[Scene], results: list, mode: str, attributes: tuple[str, ...]
) -> dict[str, float]:
    """t2v: pixels against the prompt. v2t: caption against the clip. t2vt: the caption against its
    own video."""
    if mode == "t2v":
        pairs = list(zip(map(shown, results), map(truth_of, scenes), strict=True))
    elif mode == "v2t":
        pairs = list(zip(map(said, results), map(truth_of, scenes), strict=True))
    else:
        pairs = list(zip(map(said, results), map(shown, results), strict=True))
    return share(pairs, attributes)


def further(
    scenes: list[Scene], results: list, mode: str, told: tuple[str, ...]
) -> dict[str, float]:
    """The grades that a mode has beside its own: of a caption's attributes that no prompt says, and
    of a video's pixels against its prompt."""
    if mode == "v2t" and told == ATTRIBUTES:
        return {"not in any prompt": grade(scenes, results, "v2t", ONLY_IN_CAPTION)["all"]}
    if mode == "t2vt":
        return {"video follows prompt": grade(scenes, results, "t2v", IN_PROMPT)["all"]}
    return {}


def steps_of(settings: dict) -> dict[str, int]:
    """The steps of a run: in t2vt those of the video, and of the text."""
    steps = settings["num_inference_steps"]
    if settings["mode"] != "t2vt":
        return {"steps": steps}
    return {"steps": steps, "text_steps": settings["text_steps"] or steps}


def evaluate(
    model_path: str | Path = EMBEDDED,
    transformer_path: str | Path | None = None,
    cases: int = 200,
    seed: int = 1000,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    solver: str | None = None,
    sampler: str = "exact",
    captions: str = "detailed",
    video_cache: str | int = "exact",
    precision: str | None = None,
    progress: bool = True,
    pipe: Pipeline | None = None,
    verify: bool = False,
    few_steps: bool = False,
) -> dict:
    """Grades a model on `cases` held-out scenes in all three modes.

    num_inference_steps, guidance_scale, solver: None is what the model says of itself; of one that
        says nothing, 24 steps (t2vt: 32), a guidance of 3, and unipc.
    captions: "prompt" grades text on what prompts tell, for a model of the recall stage alone.
    video_cache, precision, verify, few_steps: as in `Pipeline`.
    """
    loading = {"transformer_path": transformer_path, "precision": precision, "verify": verify}
    pipe = pipe or Pipeline.from_pretrained(model_path, "cpu", few_steps=few_steps, **loading)
    usual = {} if pipe.sampling else {"guidance_scale": GUIDANCE, "solver": "unipc"}
    asked = {"guidance_scale": guidance_scale, "solver": solver}
    generation = usual | {name: value for name, value in asked.items() if value is not None}
    generation |= {"sampler": sampler}

    scenes = draw_scenes(cases, seed, held_out=True)
    told = ATTRIBUTES if captions == "detailed" else IN_PROMPT
    table: dict = {
        "cases": cases,
        "seed": seed,
        **generation,
        "video_cache": video_cache,
        "precision": pipe.model.ops.precision,
    }

    choices = dict.fromkeys(("t2v", "t2vt"), generation)
    choices["v2t"] = {"sampler": sampler, "video_cache": video_cache}

    for mode, attributes in (("t2v", IN_PROMPT), ("v2t", told), ("t2vt", told)):
        begun = time.perf_counter()
        steps = num_inference_steps or (STEPS[mode] if usual else None)
        results = make(pipe, scenes, mode, seed, steps, progress, **choices[mode])

        cost = steps_of(results[0].settings)
        cost |= {"seconds": round(time.perf_counter() - begun, 1)}
        table[mode] = grade(scenes, results, mode, attributes) | cost
        table[mode] |= further(scenes, results, mode, told)

    return table


ROWS = {
    "t2v": "text to video: clip shows what the prompt says",
    "v2t": "video to caption: caption says what the clip shows",
    "t2vt": "text to video and caption: the two agree",
}


def format_table(table: dict) -> str:
    """Percent by mode and attribute, for a terminal."""
    lines = [
        f"{table['cases']} held-out cases{'':<34}"
        + "".join(f"{a:>11}" for a in ("all", *ATTRIBUTES))
    ]
    for mode, title in ROWS.items():
        cells = [
            f"{100 * table[mode][a]:.1f}%" if a in table[mode] else "-"
            for a in ("all", *ATTRIBUTES)
        ]
        lines.append(f"{title:<52}" + "".join(f"{c:>11}" for c in cells))
    return "\n".join(lines)
