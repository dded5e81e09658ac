"""The command line: how bad input and errors end, in a line and a code."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_lines import GENERATE, TRAIN, written
from safetensors.torch import load_file, save_file

from engine.cli import exit_code
from engine.cli.commands import Env
from engine.cli.parsing import complaint
from engine.errors import (
    Cancelled,
    MissingPackage,
    ModelFileError,
    NonFinite,
    OutOfMemory,
    UsageError,
)
from engine.weights import load_model, save_pretrained

BAD = [  # (command line, exit code, what the message says)
    (GENERATE + "--num-frames 8", 2, ["num_frames", "8", "5 or 9"]),
    (GENERATE + "--num-frames 0", 2, ["num_frames", "Nearest: 1"]),
    (GENERATE + "--height 50", 2, ["height", "50", "48 or 64"]),
    (GENERATE + "--width 8208", 2, ["8208", "8192"]),
    (GENERATE + "--prompt ''", 2, ["--prompt", "empty"]),
    (GENERATE + "--prompt '&nbsp;'", 2, ["empty"]),
    (GENERATE + f"--prompt '{'red ' * 30}'", 2, ["at most 24 tokens", "got 31"]),
    (GENERATE + "--output-path out.avi", 2, [".mp4", ".gif", "out.avi"]),
    (GENERATE + "--output-path nowhere/out.mp4", 2, ["nowhere/out.mp4", "Create"]),
    (GENERATE + "--kernels nonsense", 2, ["--kernels", "nonsense", "reference"]),
    (GENERATE + "--kernels adaln=nonsense", 2, ["adaln", "nonsense"]),
    (GENERATE + "--device nonsense", 2, ["--device", "nonsense", "cpu"]),
    (GENERATE + "--dtype int8", 2, ["--dtype", "int8", "bfloat16"]),
    (GENERATE + "--mode v2t", 2, ["--mode", "v2t", "t2vt"]),
    (GENERATE + "--num-frames many", 2, ["--num-frames", "many"]),
    (GENERATE + "--num-inference-steps 0", 2, ["--num-inference-steps", "at least 1"]),
    (GENERATE + "--seed -1", 2, ["--seed", "-1"]),
    (GENERATE + "--guidance-scale nan", 2, ["--guidance-scale", "finite"]),
    (GENERATE + "--flow-shift 0", 2, ["--flow-shift", "positive"]),
    (GENERATE + "--temperature -1", 2, ["--temperature", "at least 0"]),
    (GENERATE + "--temperature inf", 2, ["--temperature", "finite"]),
    (GENERATE + "--text-steps 0", 2, ["--text-steps", "at least 1"]),
    (GENERATE + "--text-steps 4", 2, ["text_steps", "t2vt"]),
    (GENERATE + "--offload model", 2, ["--offload", "text-encoder"]),
    (GENERATE + "--precision int4", 2, ["--precision", "int4", "fp8"]),
    (GENERATE + "--estimate --model-path nowhere", 4, ["nowhere"]),
    (GENERATE + "--num-frame 9", 2, ["--num-frame,", "Perhaps you meant --num-frames."]),
    (GENERATE + "--nonsense", 2, ["--nonsense", "univigu generate --help"]),
    ("generate", 2, ["--prompt", "univigu generate --help"]),
    ("generate --prompt x --model-path {empty}", 4, ["vae/config.json"]),
    ("generate --prompt x --model-path nowhere", 4, ["nowhere", "--model-path"]),
    ("caption --model-path {folder} --video {text}", 4, ["text.mp4", "video"]),
    ("caption --model-path {folder} --video nowhere.mp4", 4, ["nowhere.mp4"]),
    ("caption --model-path {folder} --video {clip} --video-cache 0", 2, ["--video-cache", "'0'"]),
    ("caption --model-path {folder} --video {clip} --video-cache on", 2, ["frozen", "'on'"]),
    ("caption --model-path {folder} --video {clip} --commit no", 2, ["--commit", "confidence"]),
    ("caption --model-path {folder} --video {clip} --output-path a.txt", 2, [".json", "a.txt"]),
    ("caption --video", 2, ["--video"]),
    (TRAIN + "--preset tiny --lr 0", 2, ["lr", "positive"]),
    (TRAIN + "--preset tiny --stage nonsense", 2, ["stage", "recall, refine or distill"]),
    (TRAIN + "--preset tiny --batch-size 9", 2, ["batch_size", "8 clips", "got 9"]),
    (TRAIN + "--preset tiny --save-every 0", 2, ["--save-every", "at least 1"]),
    (TRAIN + "--preset tiny --kernels nonsense", 2, ["--kernels", "nonsense"]),
    (TRAIN + "--preset tiny --resume", 4, ["run/checkpoint"]),
    (TRAIN + "--preset nonsense", 2, ["preset", "wan2.1-14b", "nonsense"]),
    (TRAIN + "--preset tiny --init-from {folder}", 2, ["--preset", "--init-from", "both"]),
    (TRAIN, 2, ["--preset", "--init-from", "neither"]),
    (TRAIN + "--init-from nowhere", 4, ["nowhere"]),
    (TRAIN + "--preset tiny --data nowhere", 4, ["nowhere", "preprocess"]),
    (TRAIN + "--preset tiny --output-path {clip}", 2, ["--output-path", "folder"]),
    ("train --output-path run --preset tiny", 2, ["--data", "preprocess"]),
    ("train --output-path run --part vae --steps 3", 2, ["--part vae", "--seed"]),
    ("preprocess --model-path {folder} --synthetic 0 --output-path a.safetensors", 2, ["at least"]),
    ("preprocess --model-path {folder} --synthetic 1 --output-path a.pt", 2, [".safetensors"]),
    ("preprocess --model-path {empty} --synthetic 1 --output-path a.safetensors", 4, ["vae"]),
    ("convert --model-path {text} --output-path out", 4, ["text.mp4", ".safetensors"]),
    ("convert --model-path {folder} --output-path {folder}", 2, ["pipeline.json"]),
    ("evaluate --model-path {folder} --cases 0", 2, ["--cases", "at least 1"]),
    ("evaluate --model-path {folder} --output-path table.txt", 2, [".json", "table.txt"]),
    ("nonsense", 2, ["nonsense", "univigu --help"]),
    ("", 2, ["generate", "caption", "univigu --help"]),
]


@pytest.mark.parametrize("line, code, words", BAD)
def test_bad_input_is_one_line_and_writes_nothing(run, tmp_path, line, code, words):
    got, out, err = run(line)
    assert got == code, err
    assert err.startswith("univigu: ") and err.count("\n") == 1 and err.endswith("\n")
    assert "Traceback" not in err and out == ""
    assert [word for word in words if word not in err] == []
    assert written(tmp_path) == []


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_the_module_as_a_program(tmp_path, encoding):
    """The parser draws its report in ASCII or Unicode, as stdout allows; ours is a line in both."""
    env = os.environ | {"PYTHONIOENCODING": encoding}
    command = [sys.executable, "-m", "engine", "generate", "--num-frame", "9", "--prompt", "x"]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == (
        "univigu: Unrecognized options: --num-frame, 9. Perhaps you meant --num-frames. "
        "See univigu generate --help.\n"
    )


def test_a_coloured_report_loses_its_colours():
    red, plain = "\x1b[91m", "\x1b[0m"
    report = f"{red}╭─{plain} Oops {red}─╮{plain}\n{red}│{plain} no such thing {red}│{plain}\n╰──╯"
    assert complaint(report) == "no such thing."


def test_debug_adds_the_traceback_and_keeps_the_code(run):
    code, _, err = run("--debug " + GENERATE + "--seed -1")
    assert code == 2
    assert err.startswith("Traceback") and err.splitlines()[-1].startswith("univigu: ")


def test_help_imports_nothing_large():
    """It took 0.4 s of processor time where this was written, and 3 s with torch."""
    code = "import sys; from engine.cli import main; main(['train', '--help']); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    assert {"torch", "numpy", "triton", "tyro", "av"} & {*found.split()} == {"tyro"}


ERRORS = [
    (UsageError("x"), 2),
    (MissingPackage("x"), 3),
    (ImportError("x"), 3),
    (ModelFileError("x"), 4),
    (PermissionError(13, "no", "x"), 4),
    (torch.cuda.OutOfMemoryError("x"), 5),
    (MemoryError(), 5),
    (OutOfMemory("x"), 5),
    (NonFinite("x"), 6),
    (Cancelled("x"), 130),
    (KeyboardInterrupt(), 130),
    (RuntimeError("a bug"), 1),
]


@pytest.mark.parametrize("error, code", ERRORS)
def test_exit_codes(run, monkeypatch, error, code):
    def fail(self):
        raise error

    monkeypatch.setattr(Env, "run", fail)
    got, _, err = run("env")
    assert got == exit_code(error) == code
    assert err.startswith("univigu: ") and err.count("\n") == 1
    assert ("--debug" in err) == (code == 1)


def test_too_large_for_memory(run, tmp_path):
    code, _, err = run(GENERATE + "--num-frames 65533 --height 8192 --width 8192")
    assert code == 5
    assert "ran out of memory" in err and err.count("\n") == 1
    assert written(tmp_path) == []


def test_missing_package_is_found_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = run("generate --prompt x --model-path nowhere")
    assert code == 3
    assert "univigu-engine[video]" in err and err.count("\n") == 1


def test_weights_that_are_not_finite(run, places, tmp_path):
    broken = shutil.copytree(places["folder"], tmp_path / "broken")
    path = broken / "transformer" / "model.safetensors"
    state = load_file(path)
    state["blocks.1.attn2.to_out.0.weight"].fill_(torch.nan)
    save_file(state, path)
    path.with_name("sha256.json").unlink()
    before = written(tmp_path)
    code, _, err = run(GENERATE.replace("{folder}", "broken") + "--quiet")
    assert code == 4
    assert "NaN or infinity in blocks.1.attn2.to_out.0.weight" in err and err.count("\n") == 1
    assert written(tmp_path) == before


def test_numbers_that_do_not_stay_finite(run, places, tmp_path):
    broken = shutil.copytree(places["folder"], tmp_path / "broken")
    model = load_model(broken)
    with torch.no_grad():
        model.blocks[1].attn2.to_out.weight.fill_(3e38)
    save_pretrained(model, broken / "transformer")
    before = written(tmp_path)
    code, _, err = run(GENERATE.replace("{folder}", "broken") + "--quiet")
    assert code == 6
    assert "step 0" in err and "block 1" in err and err.count("\n") == 1
    assert written(tmp_path) == before
