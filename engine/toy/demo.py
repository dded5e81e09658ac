"""The whole idea on the embedded model: clips with captions for unseen prompts, captions for unseen
clips, and a judge."""

import time
from pathlib import Path

from engine.config import EMBEDDED, FEW_STEPS
from engine.media import contact_sheet
from engine.pipeline import Pipeline
from engine.toy.evaluation import GUIDANCE, STEPS, evaluate, format_table, make
from engine.toy.scenes import FPS, draw_scenes


def quicker(table: dict, few: dict) -> str:
    """Steps and seconds of both grades, by mode."""

    def change(mode: str, name: str) -> str:
        return f"{table[mode][name]} to {few[mode][name]}"

    steps = {mode: f"{mode} {change(mode, 'steps')} steps" for mode in STEPS}
    steps["t2vt"] += f", of the text {change('t2vt', 'text_steps')}"
    return "; ".join(f"{steps[mode]}, {change(mode, 'seconds')} s" for mode in STEPS)


def run(
    output_path: str | Path = "demo-out",
    model_path: str | Path = EMBEDDED,
    cases: int = 50,
    seed: int = 0,
    verify: bool = False,
) -> dict:
    """Writes clips (mp4 and gif with JSON sidecars), captions and one contact sheet; prints the
    table it returns, under "few steps" with that of the folder's model of few steps."""
    out = Path(output_path)
    begun = time.perf_counter()
    pipe = Pipeline.from_pretrained(model_path, "cpu", verify=verify)
    out.mkdir(parents=True, exist_ok=True)

    scenes = draw_scenes(6, seed, held_out=True)
    rows = []
    for i, result in enumerate(
        make(pipe, scenes, "t2vt", seed, STEPS["t2vt"], guidance_scale=GUIDANCE)
    ):
        result.save(out / f"t2vt-{i}.mp4")
        result.save(out / f"t2vt-{i}.gif")
        rows.append((f"prompt: {result.prompt}", f"caption: {result.caption}", result.frames))
    for i, result in enumerate(make(pipe, scenes, "v2t", seed, STEPS["v2t"])):
        result.save(out / f"v2t-{i}.mp4")
        rows.append(("held-out clip", f"caption: {result.caption}", result.frames))

    contact_sheet(out / "contact-sheet.png", rows)
    print("\n".join(f"{title}\n    {caption}" for title, caption, _ in rows))

    table = evaluate(cases=cases, seed=seed, pipe=pipe)
    print(f"\n{format_table(table)}")
    if (Path(model_path) / FEW_STEPS).is_dir():
        pipe = Pipeline.from_pretrained(model_path, "cpu", verify=verify, few_steps=True)
        table["few steps"] = few = evaluate(cases=cases, seed=seed, pipe=pipe)
        print(f"\nin few steps, without guidance: {quicker(table, few)}\n{format_table(few)}")
    print(
        f"\nclips at {FPS} fps and contact-sheet.png in {out}; {time.perf_counter() - begun:.0f} s"
    )
    return table
