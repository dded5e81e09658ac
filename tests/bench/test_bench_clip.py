"""`python -m bench clip` and `few`: their boundaries are those of `univigu profile --clip`."""

import json

import pytest

from bench import clip
from bench.harness import record
from bench.pages import clip as page
from bench.pages.tables import fill
from engine import Pipeline
from engine.cli.clip import STAGES
from engine.config import EMBEDDED
from engine.result import FIRST


def test_a_clip_of_ours_has_the_stages(tmp_path):
    call = clip.ours(tmp_path)
    found = call({"num_inference_steps": 1, "guidance_scale": 1.0}, 5, 32)
    assert {*found} == {*STAGES, FIRST} and (tmp_path / "ours.mp4").exists()


def test_few_steps_are_measured_beside_guided_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "FEW_ROUNDS", 1)
    monkeypatch.setattr(clip, "SIZES", ((9, 64), (5, 32)))
    clip.write(tmp_path / "few.json", clip.few)
    found = json.loads((tmp_path / "few.json").read_text())
    assert [row["run"] for row in found["rows"]] == 2 * [clip.GUIDED, clip.FEW]
    guided, few = (row["seconds"] for row in found["rows"][:2])
    assert {*few} == {*STAGES, FIRST, clip.WHOLE} and few["steps"] < guided["steps"]
    lines = page.tables(few=tmp_path / "few.json")["few"].splitlines()
    assert lines[2].startswith("| 9 frames of 64 x 64, 24 guided steps | ")
    assert lines[6].startswith("| 5 frames of 32 x 32, few_steps=True | ")
    assert lines[4].startswith("| so many times less | ")


def test_a_file_of_another_clip_is_refused(tmp_path):
    pipe, path = Pipeline.from_pretrained(EMBEDDED), tmp_path / "clip.mp4"
    how = {"num_frames": 1, "progress": False, "output_path": path}
    few, many = (pipe.generate("a", num_inference_steps=n, **how) for n in (1, 2))
    clip.check_file(path, many)
    with pytest.raises(RuntimeError, match="its sidecar says"):
        clip.check_file(path, few)


def test_the_page_has_what_was_measured():
    text = (record.ROOT / "docs" / "few-steps.md").read_text()
    assert fill(text, page.tables()) == text
