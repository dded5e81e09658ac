"""The model that comes with the package: small, whole, and as good as docs/tiny-model.md says."""

import json

import numpy as np
import pytest

from engine.cli import main
from engine.config import EMBEDDED, FEW_STEPS
from engine.errors import ModelFileError, UsageError
from engine.files.hashes import faults, parts_of
from engine.pipeline import Pipeline
from engine.toy import demo, draw_scenes, evaluation, judge, render
from engine.toy.scenes import ATTRIBUTES

CASES, SEED = 24, 555


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_pretrained(EMBEDDED, "cpu")


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(CASES, SEED, held_out=True)


def test_all_weights_together_take_at_most_14_mb():
    sizes = [f.stat().st_size for f in EMBEDDED.parent.rglob("*") if f.is_file()]
    assert 10**6 < sum(sizes) <= 14 * 10**6
    few = [f.stat().st_size for f in (EMBEDDED / FEW_STEPS).iterdir()]
    assert sum(few) <= 4 * 10**6


def test_every_file_is_as_its_hashes_say():
    """`univigu verify engine/assets/tiny --write` makes them."""
    assert [fault for part in parts_of(EMBEDDED) for fault in faults(part, pytest.fail)] == []
    assert len(parts_of(EMBEDDED)) == 6


def test_the_vae_keeps_every_attribute(pipe, scenes):
    import torch

    decoded = pipe.decode_video(pipe.encode_video(torch.from_numpy(render(scenes))))
    pairs = [
        (judge.read_pixels(d), evaluation.truth_of(s)) for d, s in zip(decoded, scenes, strict=True)
    ]
    assert evaluation.share(pairs, ATTRIBUTES)["all"] >= 0.95


@pytest.mark.parametrize("mode,least", [("t2v", 0.9), ("v2t", 0.95), ("t2vt", 0.9)])
def test_held_out_cases_are_right_in_all_three_modes(pipe, scenes, mode, least):
    """The project's own bars; the page has figures of 200 cases. Chance is 0.21 for what
    prompts tell."""
    results = evaluation.make(pipe, scenes, mode, SEED, evaluation.STEPS[mode], progress=False)
    attributes = evaluation.IN_PROMPT if mode == "t2v" else ATTRIBUTES
    assert evaluation.grade(scenes, results, mode, attributes)["all"] >= least


@pytest.mark.parametrize("mode,least", [("t2v", 0.9), ("v2t", 0.95), ("t2vt", 0.9)])
def test_fp8_experts_are_right_too(scenes, mode, least):
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu", precision="fp8")
    results = evaluation.make(pipe, scenes, mode, SEED, evaluation.STEPS[mode], progress=False)
    attributes = evaluation.IN_PROMPT if mode == "t2v" else ATTRIBUTES
    assert evaluation.grade(scenes, results, mode, attributes)["all"] >= least


@pytest.mark.parametrize("mode,least", [("t2v", 0.92), ("v2t", 0.95), ("t2vt", 0.92)])
def test_few_steps_are_right_too(scenes, mode, least):
    """The folder says how the model is sampled."""
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu", few_steps=True)
    results = evaluation.make(pipe, scenes, mode, SEED, None, progress=False)
    attributes = evaluation.IN_PROMPT if mode == "t2v" else ATTRIBUTES
    assert evaluation.grade(scenes, results, mode, attributes)["all"] >= least

    used = results[0].settings
    assert used["num_inference_steps"] == (2 if mode == "v2t" else 4)
    if mode != "v2t":
        assert (used["guidance_scale"], used["text_steps"]) == (1.0, 8 if mode == "t2vt" else None)


def test_the_model_of_few_steps_is_packed_as_the_module_says(tmp_path):
    """What it was packed from may have any scale; what is packed again is the same."""
    from safetensors.torch import load_file

    from engine.toy.pack import pack
    from engine.weights import convert

    shipped = EMBEDDED / FEW_STEPS
    convert(shipped, tmp_path / "wide")
    (tmp_path / "wide" / "pipeline.json").write_bytes((shipped / "pipeline.json").read_bytes())
    pack(tmp_path / "wide", tmp_path / "again")
    ours, again = (load_file(f / "model.safetensors") for f in (shipped, tmp_path / "again"))
    assert ours.keys() == again.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == again[name].dtype
        assert np.allclose(tensor.float().numpy(), again[name].float().numpy(), 2e-7), name
    assert (
        json.loads((tmp_path / "again" / "pipeline.json").read_text())["sampling"]
        == (json.loads((shipped / "pipeline.json").read_text())["sampling"])
    )


@pytest.mark.parametrize("other", [None, EMBEDDED])
def test_few_steps_of_a_folder_without_them_are_an_error(tmp_path, other):
    (tmp_path / "model").mkdir()
    error = ModelFileError if other is None else UsageError
    with pytest.raises(error, match="must hold few_steps/|one of few_steps and transformer_path"):
        Pipeline.from_pretrained(tmp_path / "model", transformer_path=other, few_steps=True)


def test_few_steps_on_the_command_line(tmp_path, capsys):
    line = ["generate", "--prompt", "a red circle", "--few-steps", "--mode", "t2vt", "--quiet"]
    assert main([*line, "--output-path", str(tmp_path / "clip.mp4")]) == 0
    said = json.loads((tmp_path / "clip.json").read_text())["settings"]
    assert (said["num_inference_steps"], said["text_steps"], said["guidance_scale"]) == (4, 8, 1.0)
    clip = Pipeline.from_pretrained(EMBEDDED, few_steps=True).generate(
        "a red circle", mode="t2vt", progress=False
    )
    assert f"caption: {clip.caption}" in capsys.readouterr().out
    assert main([*line, "--estimate"]) == 0


def test_captions_from_a_frozen_video_are_right_too(pipe, scenes):
    choices = {"video_cache": "frozen", "progress": False}
    results = evaluation.make(pipe, scenes, "v2t", SEED, evaluation.STEPS["v2t"], **choices)
    assert evaluation.grade(scenes, results, "v2t", ATTRIBUTES)["all"] >= 0.95


def test_the_video_decides_the_caption(pipe):
    """Two clips with equal seeds get their own captions: the text is read off the video."""
    a, b = draw_scenes(2, 9, held_out=True)
    texts = [r.caption for r in pipe.caption(render([a, b]), 24, seed=[3, 3], progress=False)]
    assert texts[0] != texts[1]


def test_the_demo_writes_what_it_says(tmp_path, capsys):
    table = demo.run(tmp_path, cases=2)
    names = {f.name for f in tmp_path.iterdir()}
    assert {"contact-sheet.png", "t2vt-0.mp4", "t2vt-0.gif", "t2vt-0.json", "v2t-5.mp4"} <= names
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "t2vt-0.json").read_text())["caption"] in said
    assert "t2v 24 to 4 steps, " in said and "t2vt 32 to 4 steps, of the text 32 to 8, " in said
    assert {"t2v", "v2t", "t2vt"} <= set(table)


def test_grading_counts_what_could_not_be_read_as_wrong():
    unread = dict.fromkeys(ATTRIBUTES)
    assert evaluation.share([(unread, unread)], ATTRIBUTES)["all"] == 0
    blank = np.full((9, 64, 64, 3), 125, np.uint8)
    assert evaluation.share([(judge.read_pixels(blank), unread)], ATTRIBUTES)["all"] == 0
