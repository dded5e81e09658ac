"""The model that comes with the package: small, whole, and as good as docs/tiny-model.md says."""

import json

import numpy as np
import pytest

from engine.config import EMBEDDED
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


def test_all_weights_together_take_at_most_12_mb():
    sizes = [f.stat().st_size for f in EMBEDDED.parent.rglob("*") if f.is_file()]
    assert 10**6 < sum(sizes) <= 12 * 10**6


def test_every_file_is_as_its_hashes_say():
    """`univigu verify engine/assets/tiny --write` makes them."""
    assert [fault for part in parts_of(EMBEDDED) for fault in faults(part, pytest.fail)] == []
    assert len(parts_of(EMBEDDED)) == 5


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
    assert json.loads((tmp_path / "t2vt-0.json").read_text())["caption"] in capsys.readouterr().out
    assert {"t2v", "v2t", "t2vt"} <= set(table)


def test_grading_counts_what_could_not_be_read_as_wrong():
    unread = dict.fromkeys(ATTRIBUTES)
    assert evaluation.share([(unread, unread)], ATTRIBUTES)["all"] == 0
    blank = np.full((9, 64, 64, 3), 125, np.uint8)
    assert evaluation.share([(judge.read_pixels(blank), unread)], ATTRIBUTES)["all"] == 0
