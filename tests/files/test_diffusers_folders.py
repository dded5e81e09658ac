"""What a diffusers folder says beside its tensors: how it is sampled is taken, another pipeline or
a second expert refused by name, what is not followed said once."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import edit_json

from engine import ModelFileError, Pipeline, load_model
from engine.cli import main
from engine.config import EMBEDDED
from engine.weights import convert, forms
from engine.weights.index import Index, read_index

UNIPC = "UniPCMultistepScheduler"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SIZE = {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 3, "progress": False}


@pytest.fixture(autouse=True)
def fresh_notices():
    forms.say.cache_clear()


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A pipeline folder in diffusers' layout: the embedded parts around a random Wan model."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("wan") / "wan"
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(EMBEDDED / part, folder / part)
    sizes = {"num_attention_heads": 1, "attention_head_dim": 24, "num_layers": 1, "ffn_dim": 32}
    model = WanTransformer3DModel(**sizes, text_dim=64, freq_dim=16, cross_attn_norm=True)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    model.save_pretrained(folder / "transformer")
    write(folder, "model_index.json", _class_name="WanPipeline", boundary_ratio=None)
    return folder


@pytest.fixture
def folder(wan, tmp_path):
    return Path(shutil.copytree(wan, tmp_path / "wan", copy_function=os.link))


def write(folder, name, **content):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_text(json.dumps(content))


def schedule(folder, **content):
    write(folder, "scheduler/scheduler_config.json", **content)


SAMPLED = {
    "unipc-8": ({"_class_name": UNIPC, "flow_shift": 8.0, **FLOW}, (8.0, "unipc")),
    "unipc-int": ({"_class_name": UNIPC, "flow_shift": 5, **FLOW}, (5.0, "unipc")),
    "unipc-unsaid": ({"_class_name": UNIPC, **FLOW}, (3.0, "unipc")),
    "euler": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}, (7.0, "euler")),
    "euler-1": ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}, (1.0, "euler")),
    "lcm": ({"_class_name": "FlowMatchLCMScheduler", "shift": 5.0}, (5.0, "lcm")),
    "bare": ({"flow_shift": 4.5}, (4.5, "unipc")),
}


@pytest.mark.parametrize("content,chosen", SAMPLED.values(), ids=SAMPLED)
def test_a_folders_scheduler_is_how_it_is_sampled(folder, capsys, content, chosen):
    schedule(folder, **content)
    assert read_index(folder) == read_index(folder / "transformer") == Index(*chosen)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("form", ["unipc-8", "euler"])
def test_a_folder_samples_as_if_its_settings_were_given(folder, form):
    content, (shift, solver) = SAMPLED[form]
    schedule(folder, **content)
    pipe = Pipeline.from_pretrained(folder, "cpu")
    own = pipe.generate("a red circle", text_rows=0, **SIZE)
    assert own.settings["flow_shift"] == shift and own.settings["solver"] == solver
    said = pipe.generate("a red circle", text_rows=0, flow_shift=shift, solver=solver, **SIZE)
    other = pipe.generate("a red circle", text_rows=0, flow_shift=2.0, solver=solver, **SIZE)
    assert np.array_equal(own.frames, said.frames) and not np.array_equal(own.frames, other.frames)


def test_what_diffusers_saves_is_followed_without_a_word(folder, capsys):
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
    )

    for scheduler in (
        UniPCMultistepScheduler(flow_shift=6.0, **FLOW),
        FlowMatchEulerDiscreteScheduler(shift=6.0),
        FlowMatchLCMScheduler(shift=6.0),
    ):
        (folder / "scheduler" / "scheduler_config.json").unlink(missing_ok=True)
        scheduler.save_pretrained(folder / "scheduler")
        index = read_index(folder)
        assert (index.flow_shift, index.ignored) == (6.0, "")


def test_a_folder_without_a_scheduler_has_the_defaults(folder):
    assert read_index(folder) == Index(3.0, "unipc", "")


IGNORED = {
    "class": ({"_class_name": "DPMSolverMultistepScheduler", "flow_shift": 5.0}, "DPMSolver"),
    "karras": ({"_class_name": UNIPC, "use_karras_sigmas": True}, "use_karras_sigmas True"),
    "order": ({"_class_name": UNIPC, "solver_order": 3}, "solver_order 3"),
    "dynamic": (
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
        "use_dynamic_shifting True",
    ),
}


@pytest.mark.parametrize("content,said", IGNORED.values(), ids=IGNORED)
def test_what_is_not_followed_is_said_once(folder, capsys, content, said):
    schedule(folder, **content)
    for _ in range(2):
        Pipeline.from_pretrained(folder, "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "scheduler_config.json" in line


BAD_SCHEDULES = {
    "epsilon": ({"prediction_type": "epsilon"}, r"prediction_type must be flow_.*got 'epsilon'"),
    "v": ({"prediction_type": "v_prediction"}, r"prediction_type must be flow_.*'v_prediction'"),
    "negative": ({"flow_shift": -1}, r"flow_shift must be between 0.001 and 1000; got -1"),
    "text": ({"flow_shift": "3"}, r"flow_shift must be a number; got '3'"),
    "bool": ({"flow_shift": True}, r"flow_shift must be a number; got True"),
    "nan": ({"shift": float("nan")}, r"shift must be between 0.001 .*; got nan"),
}


@pytest.mark.parametrize("content,message", BAD_SCHEDULES.values(), ids=BAD_SCHEDULES)
def test_a_scheduler_that_cannot_be_followed_is_refused(folder, content, message):
    schedule(folder, **content)
    for load in (Pipeline.from_pretrained, load_model):
        with pytest.raises(ModelFileError, match=rf"scheduler_config\.json: {message}"):
            load(folder)


def test_damaged_json_is_named(folder):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"scheduler_config\.json: must be JSON"):
        Pipeline.from_pretrained(folder, "cpu")


def second_expert(folder):
    shutil.copytree(folder / "transformer", folder / "transformer_2")


def boundary(folder):
    write(folder, "model_index.json", _class_name="WanPipeline", boundary_ratio=0.875)


def listed_expert(folder):
    experts = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
    write(folder, "model_index.json", _class_name="WanPipeline", **experts)


def is_a(name, **more):
    return lambda folder: write(folder, "model_index.json", _class_name=name, **more)


OTHERS = {
    "transformer_2": (second_expert, "Wan2.2 A14B, which has two experts: transformer_2/"),
    "boundary_ratio": (boundary, "two experts: boundary_ratio"),
    "listed": (listed_expert, "two experts: transformer_2"),
    "image-to-video": (is_a("WanImageToVideoPipeline"), "an image-to-video pipeline"),
    "vace": (is_a("WanVACEPipeline"), "a VACE pipeline"),
    "animate": (is_a("WanAnimatePipeline"), "an Animate pipeline"),
    "ti2v": (is_a("WanPipeline", expand_timesteps=True), "a Wan2.2 TI2V pipeline"),
}


@pytest.mark.parametrize("change,message", OTHERS.values(), ids=OTHERS)
def test_other_pipelines_are_refused_on_every_road(folder, tmp_path, change, message):
    change(folder)
    roads = (
        lambda: Pipeline.from_pretrained(folder, "cpu"),
        lambda: load_model(folder),
        lambda: load_model(folder / "transformer"),
        lambda: convert(folder, tmp_path / "out"),
        lambda: Pipeline.from_pretrained(EMBEDDED, "cpu", transformer_path=folder),
    )
    for road in roads:
        with pytest.raises(ModelFileError, match=message):
            road()
    assert not (tmp_path / "out").exists()


def test_a_folder_of_two_experts_lends_its_other_parts(folder):
    second_expert(folder)
    schedule(folder, flow_shift=5.0)
    pipe = Pipeline.from_pretrained(folder, "cpu", transformer_path=EMBEDDED)
    assert pipe.index.flow_shift == 5.0


def test_wan22_entries_of_null_are_no_second_expert(folder):
    """As in the release of its 5B, whose tensors tell it."""
    write(folder, "model_index.json", _class_name="WanPipeline", transformer_2=[None, None])
    assert read_index(folder) == Index()


def test_an_unknown_wan_pipeline_is_read_and_said(folder, capsys):
    write(folder, "model_index.json", _class_name="WanDMDPipeline")
    Pipeline.from_pretrained(folder, "cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert "WanDMDPipeline is read as WanPipeline" in line


def originals(folder, where):
    target = folder.parent / where
    target.mkdir(parents=True)
    state = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return state, target


@pytest.mark.parametrize(
    "where", ["high_noise_model/m", "wan2_t2v_low_noise_14B_fp8", "Wan22-HighNoise"]
)
def test_a_lone_expert_is_known_by_its_name(folder, where):
    state, target = originals(folder, where)
    save_file(state, target.with_suffix(".safetensors"))
    with pytest.raises(ModelFileError, match=rf"two experts: .*{where[:4]}"):
        load_model(target.with_suffix(".safetensors"))


def test_a_folder_of_both_experts_is_known_by_theirs(folder):
    for name in ("high_noise_model", "low_noise_model"):
        shutil.copytree(folder / "transformer", folder.parent / "release" / name)
    with pytest.raises(ModelFileError, match=r"two experts: high_noise_model/"):
        load_model(folder.parent / "release")
    with pytest.raises(ModelFileError, match=r"two experts: high_noise_model"):
        load_model(folder.parent / "release" / "high_noise_model")


VARIANTS = {
    "i2v": ("condition_embedder.image_embedder.norm1.weight", (4,), "an image-to-video model"),
    "i2v-k": ("blocks.0.attn2.add_k_proj.weight", (4, 4), "an image-to-video model"),
    "flf2v": ("condition_embedder.image_embedder.pos_embed", (4,), "a first-and-last-frame model"),
    "vace": ("vace_blocks.0.proj_in.weight", (4, 4), "a VACE model"),
    "animate": ("pose_patch_embedding.weight", (24, 16, 1, 2, 2), "an Animate model"),
    "fun": ("ref_conv.weight", (24, 16, 2, 2), "a Fun control model"),
    "skyreels": ("fps_embedding.weight", (2, 24), "a SkyReels diffusion-forcing model"),
    "36": ("patch_embedding.weight", (24, 36, 1, 2, 2), "an image-to-video or Fun InP model"),
    "48": ("patch_embedding.weight", (24, 48, 1, 2, 2), "a Wan2.2 TI2V-5B or Fun control model"),
    "7": ("patch_embedding.weight", (24, 7, 1, 2, 2), "a model of another latent space"),
}


@pytest.mark.parametrize("name,shape,what", VARIANTS.values(), ids=VARIANTS)
def test_relatives_are_named_for_what_they_are(folder, name, shape, what):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file) | {name: torch.ones(shape)}
    file.unlink()
    save_file(state, file)
    with pytest.raises(ModelFileError, match=rf"wan/transformer: tensors .*got {what} \(.*T2V"):
        load_model(folder)


@pytest.mark.parametrize("kind,what", [("i2v", "an image-to-video"), ("s2v", "an audio-driven")])
def test_a_config_names_a_relative(folder, kind, what):
    file = folder / "transformer" / "config.json"
    shutil.copy(file, file.with_suffix(".own"))
    file.unlink()
    file.with_suffix(".own").rename(file)
    edit_json(file, model_type=kind)
    with pytest.raises(ModelFileError, match=rf"got {what} model \(model_type '{kind}'"):
        load_model(folder)


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """The folder as the model me/wan in Hugging Face's cache."""
    from huggingface_hub import constants

    snapshot = tmp_path / "cache" / "models--me--wan" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot)
    refs = tmp_path / "cache" / "models--me--wan" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return "me/wan"


def test_every_command_that_takes_a_folder_takes_a_hub_id(hub, tmp_path, capsys):
    def run(line):
        assert main(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert run(f"convert --model-path {hub} --output-path out --dtype bfloat16") == "out\n"
    assert load_model(tmp_path / "out", kernels="reference").cfg == load_model(hub).cfg
    preprocess = "--synthetic 2 --output-path a.safetensors --quiet --text-rows 24"
    assert run(f"preprocess --model-path {hub} {preprocess}") == "a.safetensors\n"
    assert "t2v" in run(f"generate --model-path {hub} --prompt x --estimate --device cpu")
    size = "--num-frames 1 --height 32 --width 32 --text-rows 0"
    once = f"--prompt x --num-inference-steps 1 {size} --output-path x.gif --quiet"
    assert run(f"generate --model-path {hub} {once}") == "x.gif\n"
    (tmp_path / "nothing").mkdir()
    assert main("convert --model-path me/none --output-path out".split()) == 4
    assert "hf download me/none" in capsys.readouterr().err
