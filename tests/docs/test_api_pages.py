"""Pages for users: public names, arguments of diffusers, and a batch as a step takes it."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import engine
from engine.config import EMBEDDED
from engine.data import LatentSet, data_fingerprint
from engine.pipeline import Pipeline
from engine.toy import preprocess_scenes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BATCH = r"^\| `(\w+)` \| \[([\w, ]+)\] \| (\w+) \|"


def test_all_public_names_are_on_the_page():
    page = (DOCS / "api.md").read_text()
    table = page[page.index("## From `engine`") : page.index("## By module")]
    named = set(re.findall(r"`(\w+)`", table))
    assert set(engine.__all__) <= named


def test_all_arguments_of_diffusers_are_on_the_page():
    wan = pytest.importorskip("diffusers").WanPipeline
    page = (DOCS / "from-diffusers.md").read_text()
    left = "".join(re.findall(r"^\| ([^|]*)", page[page.index("## Call") :], re.M))
    named = set(re.findall(r"\w+", left))
    assert set(inspect.signature(wan.__call__).parameters) - {"self"} <= named


def test_the_table_of_a_batch_is_what_a_shard_gives(tmp_path):
    parts, shard = Pipeline.without_model(EMBEDDED), tmp_path / "toy.safetensors"
    preprocess_scenes(parts, data_fingerprint(EMBEDDED), shard, 2, 0, 16)
    given = LatentSet(shard).batch(torch.arange(2))
    rows = re.findall(BATCH, (DOCS / "training.md").read_text(), re.M)
    said = {name: (len(shape.split(",")), dtype) for name, shape, dtype in rows}
    assert said == {name: (x.ndim, str(x.dtype).split(".")[1]) for name, x in given.items()}


def test_the_batch_made_by_hand_is_one(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (DOCS / "training.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
    names: dict = {}
    exec(compile(code, "training.md", "exec"), names)
    rows = {name: shape.split(", ") for name, shape, _ in re.findall(BATCH, page, re.M)}
    sizes: dict[str, int] = {"16": 16}
    for name, shape in rows.items():
        for letter, size in zip(shape, names["batch"][name].shape, strict=True):
            assert sizes.setdefault(letter, size) == size, (name, letter)
    assert float(re.search(r"tensor\(([\d.]+)", capsys.readouterr().out)[1]) > 0


def test_the_python_of_the_page_on_serving_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    page = (DOCS / "serving.md").read_text()
    for code in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M):
        exec(compile(code, "serving.md", "exec"), {})
    said = capsys.readouterr().out
    assert "in all, denoising" in said and said.endswith(" clip.mp4\n")
    assert {path.name for path in tmp_path.iterdir()} == {"clip.mp4", "clip.json"}
