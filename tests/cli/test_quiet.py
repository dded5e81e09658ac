"""What a run prints: each command in a process of its own."""

import re
import subprocess
import sys
from pathlib import Path

from engine.media import write_video
from engine.toy import draw_scenes, render

BAR = re.compile(r"\r *\d+%\|[^|\r]*\| \d/\d \[[^]\r]*\]")  # our progress bar, at any step
SECONDS = r"\d+\.\d\d s"


def univigu(*words: object, cwd: Path) -> tuple[str, str]:
    """Runs a command; returns stdout, and stderr without our progress bar."""
    command = [sys.executable, "-m", "engine", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, timeout=300)
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert BAR.search(err), "the bar is not as this test knows it"
    return out.rstrip("\n"), BAR.sub("", err).strip(" \r")


def test_generate_prints_the_result_and_our_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    words = "--prompt", "a red circle moves left", "--num-inference-steps", 2, "--seed", 3
    out, err = univigu("generate", *words, cwd=tmp_path)
    stages = f"encode {SECONDS}, denoise {SECONDS}, until first frame {SECONDS}, "
    stages += f"decode {SECONDS}, file {SECONDS}"
    assert re.fullmatch(rf"out\.mp4\nseed: 3\n{stages}", out)
    assert err == ""


def test_caption_prints_the_result_and_our_bar(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    write_video(tmp_path / "clip.mp4", render(draw_scenes(1, 0, held_out=True))[0], 8)
    words = "--video", "clip.mp4", "--num-inference-steps", 2
    out, err = univigu("caption", *words, cwd=tmp_path)
    assert re.fullmatch(rf"[^\n]+\nseed: 0\nencode {SECONDS}, denoise {SECONDS}", out)
    assert err == ""


IMPORTS = """
import sys

from engine.cli import main

words = "--num-inference-steps 2 --quiet --output-path out.mp4"
assert main(["generate", "--prompt", "a red circle", *words.split()]) == 0
heavy = "diffusers", "transformers", "torch._dynamo", "torch._inductor", "huggingface_hub", "sympy"
print([name for name in heavy if name in sys.modules])
"""


def test_a_run_imports_none_of_the_large_libraries(tmp_path, monkeypatch):
    """torch._dynamo alone took seconds of a cold start."""
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    command = [sys.executable, "-c", IMPORTS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
