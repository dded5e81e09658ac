"""README speaks the truth: its example runs, its commands parse, its paths exist."""

import re
import shlex
from pathlib import Path

from bench.pages import readme
from bench.pages.tables import fill
from engine import cli
from engine.data import fingerprint
from engine.pipeline import EMBEDDED, Pipeline
from engine.toy import preprocess_scenes

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path, monkeypatch):
    (tmp_path / "engine").symlink_to(ROOT / "engine")
    monkeypatch.chdir(tmp_path)
    parts, made_with = Pipeline.without_model(EMBEDDED), fingerprint(EMBEDDED)
    preprocess_scenes(parts, made_with, "runs/train.safetensors", 16, 0, 16)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert Path("clip.mp4").exists() and Path("clip.json").exists()
    assert names["metrics"]["loss"].isfinite() and names["clip"].caption


def test_every_command_parses():
    lines = TEXT.replace("\\\n", " ").splitlines()
    lines = [line.replace("-m engine", "&& univigu").split("&& ")[-1] for line in lines]
    commands = [line.partition("#")[0] for line in lines if line.startswith("univigu ")]
    assert len(commands) == 13
    for command in commands:
        assert cli.parse(shlex.split(command)[1:]) is not None, command


def test_the_table_of_times_is_that_of_the_results():
    """`make pages` writes it."""
    assert fill(TEXT, readme.tables()) == TEXT


def test_every_path_exists():
    table = TEXT[TEXT.index("## Rooms") :]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    folder, missing = ROOT, []
    for name in re.findall(r"`([^`]+)`", " ".join(cells)):
        path = ROOT / name if (ROOT / name).exists() else folder / name
        folder = path.parent
        if not path.exists():
            missing.append(name)
    assert cells and not missing
