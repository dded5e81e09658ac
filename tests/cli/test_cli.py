"""The command line: what each command writes and prints, and how bad input ends."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from pipeline_folder import build_pipeline_folder
from safetensors import safe_open
from safetensors.torch import load_file

from engine import train_step
from engine.cli import environment, exit_code, main
from engine.cli.commands import Env
from engine.cli.entry import complaint
from engine.errors import (
    Cancelled,
    MissingPackage,
    ModelFileError,
    NonFinite,
    OutOfMemory,
    UsageError,
)
from engine.media import read_video, write_video
from engine.toy import draw_scenes, recipe, render
from engine.weights import load_model, save_pretrained
from engine.weights.names import precision_of
from univigu_kernels import OPS

PROMPT = "a red circle moves left"
GENERATE = f"generate --prompt '{PROMPT}' --num-inference-steps 2 --model-path {{folder}} "
TRAIN = "train --data {shard} --batch-size 1 --steps 2 --output-path run "


@pytest.fixture(scope="module")
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
    """Runs a command line in an empty folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line.format(**places)))
        return code, *capsys.readouterr()

    return run


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


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
    (TRAIN + "--preset tiny --stage nonsense", 2, ["stage", "recall or refine"]),
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
    code, _, err = run(GENERATE + "--num-frames 400000000001")
    assert code == 5
    assert "ran out of memory" in err and err.count("\n") == 1
    assert written(tmp_path) == []


def test_missing_package_is_found_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    code, _, err = run("generate --prompt x --model-path nowhere")
    assert code == 3
    assert "univigu-engine[video]" in err and err.count("\n") == 1


def test_weights_that_are_not_finite(run, places, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(places["folder"], broken)
    model = load_model(broken)
    with torch.no_grad():
        model.blocks[1].attn2.to_out.weight.fill_(torch.nan)
    save_pretrained(model, broken / "transformer")
    before = written(tmp_path)
    code, _, err = run(GENERATE.replace("{folder}", "broken") + "--quiet")
    assert code == 6
    assert "step 0" in err and "block 1" in err and err.count("\n") == 1
    assert written(tmp_path) == before


def test_generate_video_and_caption(run, tmp_path):
    code, out, err = run(GENERATE + "--task t2vt --seed 3 --num-frames 5 --output-path a.mp4")
    assert code == 0, err
    assert written(tmp_path) == ["a.json", "a.mp4"]
    assert read_video(tmp_path / "a.mp4").frames.shape == (5, 64, 64, 3)
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["seed"] == 3 and record["prompt"] == PROMPT
    assert record["settings"]["num_inference_steps"] == 2
    path, caption, seed, stages = out.splitlines()
    assert (path, seed) == ("a.mp4", "seed: 3")
    assert caption == f"caption: {record['caption']}"
    assert [part.split()[0] for part in stages.split(", ")] == ["encode", "denoise", "decode"]


def test_generate_quietly_and_again(run, tmp_path):
    """Choices reach the pipeline; the same flags make the same bytes, another seed others."""
    line = GENERATE + "--quiet --guidance-scale 2 --flow-shift 5 --solver euler --text-rows 8 "
    line += "--num-frames 1 --negative-prompt 'a blue square' --kernels reference "
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(line + f"--seed {seed} --output-path {name}.gif") == (0, f"{name}.gif\n", "")
    a, b, c = ((tmp_path / f"{name}.gif").read_bytes() for name in "abc")
    assert a == b != c
    record = json.loads((tmp_path / "a.json").read_text())
    assert set(record["backends"].values()) == {"reference"}
    wanted = {"guidance_scale": 2, "flow_shift": 5, "solver": "euler"}
    assert record["settings"].items() >= wanted.items()


def test_caption(run, places, tmp_path):
    line = "caption --model-path {folder} --num-inference-steps 2 --seed 4 --video {clip} "
    code, out, err = run(line + "--output-path caption.json")
    assert code == 0, err
    (record,) = json.loads((tmp_path / "caption.json").read_text())["captions"]
    assert record["video"] == str(places["clip"]) and record["seed"] == 4
    assert out.splitlines()[:2] == [record["caption"], "seed: 4"]
    assert run(line + "{clip} --quiet")[1] == f"{places['clip']}: {record['caption']}\n" * 2


def test_preprocess_takes_rows_and_seed(run, places, tmp_path):
    line = "preprocess --model-path {folder} --synthetic 3 --quiet --text-rows 20 --seed 1 "
    assert run(line + "--output-path new/a.safetensors") == (0, "new/a.safetensors\n", "")
    tensors = load_file(tmp_path / "new" / "a.safetensors")
    assert tensors["caption_tokens"].shape == (3, 20)
    first = load_file(places["shard"])
    assert first["caption_tokens"].shape == (8, 24)
    assert not torch.equal(first["latents"][:3], tensors["latents"])


def test_interrupted_training_resumes_where_it_was(run, tmp_path, monkeypatch):
    line = TRAIN + "--preset tiny --save-every 1 --quiet "
    assert run(line + "--output-path whole") == (0, "whole/model\n", "")

    def step(state, batch):
        if state.step == 1:
            raise KeyboardInterrupt
        return train_step(state, batch)

    with monkeypatch.context() as patch:
        patch.setattr("engine.train.loop.train_step", step)
        assert run(line) == (130, "", "univigu: cancelled.\n")
    code, _, err = run(line)
    assert code == 2 and "--resume" in err
    assert run(line + "--resume") == (0, "run/model\n", "")
    whole, resumed = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole | resumed)


def test_refine_starts_from_the_model_of_recall(run, tmp_path):
    assert run(TRAIN + "--preset tiny --quiet")[0] == 0
    line = TRAIN + "--init-from run/model --stage refine --lr 1e-12 --save-dtype float16 --quiet "
    assert run(line + "--output-path next --blind-video") == (0, "next/model\n", "")
    (record,) = (tmp_path / "next" / "checkpoint").glob("*/state.json")
    state = json.loads(record.read_text())
    assert state["train"]["stage"] == "refine"
    recall, refine = load_model(tmp_path / "run" / "model"), load_model(tmp_path / "next" / "model")
    assert recall.cfg.video_sees_text and not refine.cfg.video_sees_text
    for (name, a), b in zip(recall.named_parameters(), refine.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=name)
    with safe_open(tmp_path / "next" / "model" / "model.safetensors", "pt") as file:
        assert file.get_tensor("patch_embedding.weight").dtype == torch.float16


def test_text_encoder_recipe(run, tmp_path, monkeypatch):
    """The recipe itself, for 2 of its 1500 steps."""
    short = partial(recipe.train_text_encoder, steps=2, batch=4)
    monkeypatch.setattr(recipe, "train_text_encoder", short)
    code, out, err = run("train --part text-encoder --seed 2 --output-path parts")
    assert code == 0 and out.endswith("parts\n"), err
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"text_encoder", "tokenizer"}


def test_vae_recipe_gets_folder_and_seed(run, monkeypatch):
    """It takes 15 minutes, so only the call is checked."""
    calls = []
    monkeypatch.setattr(recipe, "train_vae", lambda path, seed: calls.append((path, seed)))
    assert run("train --part vae --seed 2 --output-path parts")[:2] == (0, "parts\n")
    assert calls == [(Path("parts"), 2)]


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_convert(run, places, tmp_path, dtype):
    line = f"convert --model-path {{folder}} --output-path out --dtype {dtype}"
    assert run(line) == (0, "out\n", "")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        got = file.get_tensor("blocks.0.attn1.to_q.weight").dtype
    assert got == (torch.float32 if dtype == "keep" else torch.bfloat16)
    assert load_model(tmp_path / "out").cfg == load_model(places["folder"]).cfg
    assert run(f"{line} --precision fp8") == (0, "out\n", "")
    assert precision_of(load_file(tmp_path / "out" / "model.safetensors")) == "fp8"


def test_evaluate(run, tmp_path):
    line = "evaluate --model-path {folder} --cases 2 --num-inference-steps 1 --seed 5 --quiet "
    code, out, err = run(line + "--solver euler --output-path table.json")
    assert (code, err) == (0, "")
    table = json.loads((tmp_path / "table.json").read_text())
    assert (table["cases"], table["seed"], table["solver"]) == (2, 5, "euler")
    assert table["t2vt"]["steps"] == 1
    assert "2 held-out cases" in out


def test_env(run):
    code, out, err = run("env --json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["torch"]["version"] == torch.__version__
    assert report["packages"].keys() == environment.EXTRAS.keys()
    assert all(name in report["kernels"]["cpu float32"] for name in OPS)
    assert f"{Path.home()}/" not in out and f"{sys.prefix}/" not in out
    code, text, _ = run("env")
    assert code == 0 and report["kernels"]["cpu float32"] in text
    assert all(name in text for name in (*environment.EXTRAS, torch.__version__))


def test_env_says_why_a_package_is_missing(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    (tmp_path / "broken_one.py").write_text("import no_such_module")
    (tmp_path / "broken_two.py").write_text("raise OSError('/home/someone/lib.so: undefined')")
    (tmp_path / "sound.py").write_text("__version__ = '1.2'")
    assert environment.package("sound", "x") == "1.2"
    assert "univigu-engine[x]" in environment.package("no_such_module", "x")
    assert "no_such_module" in environment.package("broken_one", "x")
    assert environment.package("broken_two", "x") == "broken: OSError: ~/lib.so: undefined"


def test_env_survives_a_bad_request_in_the_environment(run, monkeypatch):
    monkeypatch.setenv("UNIVIGU_KERNELS", "nonsense")
    code, out, _ = run("env")
    assert code == 0 and "none: bind: request" in out
    code, _, err = run(GENERATE)
    assert code == 2 and "nonsense" in err
