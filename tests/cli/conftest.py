"""What every test of the command line starts from."""

import shlex
from pathlib import Path

import pytest
from pipeline_folder import build_pipeline_folder

from engine.cli import main
from engine.media import write_video
from engine.toy import draw_scenes, render


@pytest.fixture(scope="package")
def places(tmp_path_factory) -> dict[str, Path]:
    """A pipeline folder, a latent shard, a clip, and files that are none of these."""
    base = tmp_path_factory.mktemp("cli")
    places = {name: base / name for name in ("folder", "empty", "text.mp4", "clip.mp4")}
    places = {name.partition(".")[0]: path for name, path in places.items()}
    places["shard"] = base / "shard.safetensors"
    build_pipeline_folder(places["folder"])
    places["empty"].mkdir()
    places["text"].write_text("not a video")
    write_video(places["clip"], render(draw_scenes(1, 0, held_out=True))[0], 8)
    preprocess = "preprocess --model-path {folder} --synthetic 8 --output-path {shard} --quiet"
    assert main(shlex.split(preprocess.format(**places))) == 0
    return places


@pytest.fixture
def run(places, capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder; returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line.format(**places)))
        return code, *capsys.readouterr()

    return run
