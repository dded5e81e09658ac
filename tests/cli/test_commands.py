"""The command line: what each command writes and prints."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from command_lines import GENERATE, PROMPT, TRAIN, written
from safetensors import safe_open
from safetensors.torch import load_file

from engine import train_step
from engine.cli import environment
from engine.media import read_video
from engine.toy import recipe
from engine.weights import load_model
from engine.weights.names import precision_of
from univigu_kernels import OPS


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
    names = [part.rsplit(" ", 2)[0] for part in stages.split(", ")]
    assert names == ["encode", "denoise", "until first frame", "decode", "file"]


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
