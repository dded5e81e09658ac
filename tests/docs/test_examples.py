"""examples/: each script runs as its docstring says, with the model of the package."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MODEL = "engine/assets/tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("reader")
    (made / "engine").symlink_to(ROOT / "engine")
    return made


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a script in this process, in the reader's folder. -> what it prints."""

    def start(name: str, *arguments: str) -> str:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return start


def test_all_examples_are_run_here():
    """By the name of the script in this file."""
    text = Path(__file__).read_text()
    assert len(EXAMPLES) == 3 and all(f'"{path.name}"' in text for path in EXAMPLES)


def test_examples_are_short():
    assert all(len(path.read_text().splitlines()) <= 60 for path in EXAMPLES)


def test_generate_then_caption(run, folder):
    said = run("generate.py")
    assert (folder / "clip.mp4").exists() and (folder / "clip.json").exists()
    assert "clip.mp4: a red circle" in said

    said = run("caption.py", "clip.mp4")
    exact, frozen = re.findall(r"^(?:exact|frozen): +(.*) \([\d.]+ s\)$", said, re.M)
    assert "red circle" in exact and "red circle" in frozen and "text_agreement" in said


def test_train_loop_takes_the_same_steps_in_one_process_and_in_two(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = f"preprocess --model-path {MODEL} --synthetic 16 --output-path toy.safetensors --quiet"
    assert cli.main(words.split()) == 0
    alone = run("train_loop.py", "toy.safetensors", "alone")
    assert (folder / "alone" / "config.json").exists()

    script = str(ROOT / "examples" / "train_loop.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", script, "toy.safetensors", "both"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        torchrun, cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "both" / "config.json").exists()

    losses = [re.findall(r"^step \d: loss ([\d.]+)$", said, re.M) for said in (alone, done.stdout)]
    assert len(losses[0]) == 4
    assert list(map(float, losses[1])) == pytest.approx(list(map(float, losses[0])), abs=2e-4)
