"""What a model says of its own sampling: in pipeline.json, in an adapter, or beside one."""

import json
import warnings
from functools import partial

import adapter_files as made
import numpy as np
import pytest
import torch

import engine
from engine import schedule
from engine.cli import main
from engine.config import EMBEDDED, PipelineConfig, SamplingConfig
from engine.errors import ModelFileError, UsageError
from engine.weights.adapters import read_sampling

SIGMAS, TIMES = [1.0, 0.75, 0.5, 0.25], [1000.0, 757.0, 522.0]
SIZE = {"num_frames": 5, "height": 32, "width": 32, "progress": False}
ASKED = dict.fromkeys(
    ("num_inference_steps", "sigmas", "timesteps", "flow_shift", "solver", "guidance_scale")
) | {"text_steps": None, "mode": "t2v", "sampler": "exact"}


@pytest.fixture
def few(tmp_path):
    """Writes the embedded model's folder with a `sampling` of its own."""

    def write(**sampling):
        folder = tmp_path / "few"
        folder.mkdir()
        for part in EMBEDDED.iterdir():
            if part.name != "pipeline.json":
                (folder / part.name).symlink_to(part)
        record = json.loads((EMBEDDED / "pipeline.json").read_text()) | {"sampling": sampling}
        (folder / "pipeline.json").write_text(json.dumps(record))
        return folder

    return write


def same(a, b) -> bool:
    return np.array_equal(a.frames, b.frames) and a.caption == b.caption


def test_a_folder_says_how_it_is_sampled(few):
    told = {"sigmas": SIGMAS, "flow_shift": 5, "solver": "lcm", "guidance_scale": 1.0}
    pipe = engine.Pipeline.from_pretrained(few(**told, text_steps=6, caption_steps=2), "cpu")
    own = pipe.generate("a red circle", mode="t2vt", **SIZE)
    given = pipe.generate("a red circle", mode="t2vt", **told, text_steps=6, **SIZE)
    assert same(own, given) and "sampling" not in given.settings
    assert own.settings["sampling"] == dict.fromkeys((*told, "text_steps"), "pipeline.json")
    assert {name: own.settings[name] for name in told} == told

    plain = pipe.generate("a red circle", num_inference_steps=2, solver="euler", **SIZE).settings
    assert plain["num_inference_steps"] == 2 and "sigmas" not in plain
    assert plain["sampling"] == dict.fromkeys(("flow_shift", "guidance_scale"), "pipeline.json")

    said = pipe.caption(own.frames, progress=False).settings
    assert said["num_inference_steps"] == 2
    assert said["sampling"] == {"num_inference_steps": "pipeline.json"}
    assert (
        pipe.caption(own.frames, num_inference_steps=1, progress=False).settings[
            "num_inference_steps"
        ]
        == 1
    )


def test_another_transformer_says_it_for_itself(few):
    folder = few(solver="lcm")
    load = partial(engine.Pipeline.from_pretrained, device="cpu")
    assert load(folder).sampling == [("pipeline.json", SamplingConfig(solver="lcm"))]
    assert load(folder, transformer_path=EMBEDDED / "transformer").sampling == []
    assert load(EMBEDDED, transformer_path=folder / "transformer").sampling == load(folder).sampling


RECORD = {"sigmas": [1.0, 0.6], "flow_shift": 5.0, "solver": "lcm", "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """A folder of the embedded parts around a random Wan, and what an adapter of it holds."""
    from diffusers import WanTransformer3DModel

    folder = tmp_path_factory.mktemp("wan")
    for part in ("vae", "text_encoder", "tokenizer"):
        (folder / part).symlink_to(EMBEDDED / part)
    torch.manual_seed(0)
    base = WanTransformer3DModel(**made.SHAPE | {"text_dim": 64}).eval()
    base.save_pretrained(folder / "transformer")
    return folder, made.factors(base)


@pytest.mark.parametrize("spelling", ["kohya", "comfyui", "diffusers", "lightx2v", "beside"])
def test_an_adapter_of_few_steps_runs_at_its_own_settings(wan, tmp_path, spelling):
    """In its metadata, in four spellings; or in a file beside one that has none."""
    folder, factors = wan
    beside = spelling == "beside"
    tensors = made.tensors(factors, "kohya" if beside else spelling)
    said = {} if beside else {"sampling": json.dumps(RECORD)}
    file = made.write(tmp_path / "fast.safetensors", tensors, said)
    if beside:
        (tmp_path / "fast.sampling.json").write_text(json.dumps(RECORD))

    pipe = engine.Pipeline.from_pretrained(folder, "cpu")
    plain = pipe.generate("a red circle", num_inference_steps=1, text_rows=0, **SIZE)
    assert "sampling" not in plain.settings
    pipe.load_lora_weights(file)
    own = pipe.generate("a red circle", text_rows=0, **SIZE)
    assert own.settings["sampling"] == dict.fromkeys(RECORD, "adapter fast")
    assert own.settings["num_inference_steps"] == 2
    given = pipe.generate("a red circle", text_rows=0, **RECORD, **SIZE)
    assert same(own, given)


def test_a_merged_model_is_said_to_have_lost_its_settings(wan, tmp_path, capsys):
    folder, factors = wan
    said = {"sampling": json.dumps(RECORD)}
    lora = made.write(tmp_path / "fast.safetensors", made.tensors(factors, "kohya"), said)
    given = ["convert", "--model-path", str(folder), "--output-path", str(tmp_path / "merged")]
    assert main([*given, "--lora", str(lora)]) == 0
    assert capsys.readouterr().err == (
        f"{lora}: weights do not hold how it is sampled. Say it in pipeline.json beside them.\n"
    )
    (tmp_path / "merged" / "pipeline.json").write_text(json.dumps({"sampling": RECORD}))
    load = partial(engine.Pipeline.from_pretrained, folder, "cpu")
    merged = load(transformer_path=tmp_path / "merged")
    assert merged.sampling == [("pipeline.json", SamplingConfig(**RECORD))]


def test_which_adapter_decides(tmp_path, few):
    """The last that was added, before the folder; none that is off; a fused one for good."""
    pipe = engine.Pipeline.from_pretrained(few(solver="euler", guidance_scale=2.0), "cpu")
    keys = made.keys("blocks.0.attn1.to_q", *made.SPELLINGS["diffusers"])
    dim, steps = pipe.model.cfg.dim, {"num_inference_steps": 2}
    tensors = {keys[0]: torch.zeros(1, dim), keys[1]: torch.zeros(dim, 1)}
    for name, sampling in {"a": {"sigmas": SIGMAS, "solver": "lcm"}, "b": steps}.items():
        said = {"sampling": json.dumps(sampling)}
        pipe.load_lora_weights(made.write(tmp_path / f"{name}.safetensors", tensors, said))

    def sources() -> dict:
        return schedule.settle(ASKED, pipe.sampling)["sampling"]

    rest = {"guidance_scale": "pipeline.json"}
    both = {"num_inference_steps": "adapter b", "solver": "adapter a"} | rest
    assert sources() == both
    pipe.set_adapters(["a", "b"], [1.0, 0.0])
    assert sources() == {"sigmas": "adapter a", "solver": "adapter a"} | rest
    pipe.set_adapters("b")
    pipe.fuse_lora()
    assert sources() == {"num_inference_steps": "adapter b", "solver": "pipeline.json"} | rest


def test_guidance_for_a_model_without_it_is_a_warning():
    records = [("adapter fast", SamplingConfig(guidance_scale=1.0))]
    with pytest.warns(UserWarning, match="guidance_scale 4.0 is used, .*; adapter fast asks for 1"):
        assert schedule.settle(ASKED | {"guidance_scale": 4.0}, records)["guidance_scale"] == 4.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (None, 1.0):
            schedule.settle(ASKED | {"guidance_scale": scale}, records)
        schedule.settle(ASKED | {"guidance_scale": 4.0}, [("x", SamplingConfig(solver="lcm"))])


@pytest.mark.parametrize(
    "sampling, message",
    [
        ("{", "must be JSON"),
        ("[4]", "must be a JSON object; got list"),
        ('{"steps": 4}', "unexpected keyword argument 'steps'"),
        ('{"sigmas": [0.5, 1]}', "sigmas must be 1 to 10000 numbers that fall"),
        ('{"sigmas": [1], "num_inference_steps": 4}', "Leave out all but one"),
        ('{"num_inference_steps": 4.5}', "num_inference_steps must be a whole number; got 4.5"),
        ('{"caption_steps": 0}', "caption_steps must be between 1 and 10000; got 0"),
        ('{"solver": "ddim"}', "solver must be euler, unipc or lcm; got 'ddim'"),
        ('{"guidance_scale": 1e4}', "guidance_scale must be between -1000 and 1000"),
    ],
)
def test_what_a_model_says_is_checked(tmp_path, sampling, message):
    said = {"sampling": sampling}
    file = made.write(tmp_path / "fast.safetensors", {"a": torch.zeros(1)}, said)
    with pytest.raises(ModelFileError, match=f"fast.safetensors: metadata sampling: .*{message}"):
        read_sampling(file)
    if message.startswith("must be"):
        return
    with pytest.raises((UsageError, TypeError), match=message):
        PipelineConfig(sampling=SamplingConfig(**json.loads(sampling)))


@pytest.mark.parametrize("sampling", [{"steps": 4}, 4, [4], {"sigmas": [0.5, 1]}], ids=str)
def test_a_folder_that_says_it_wrongly_is_refused_by_name(tmp_path, sampling):
    (tmp_path / "pipeline.json").write_text(json.dumps({"sampling": sampling}))
    with pytest.raises(ModelFileError, match="pipeline.json must be a pipeline configuration; got"):
        engine.config.read_pipeline_config(tmp_path)


def test_what_is_written_is_read(tmp_path):
    config = PipelineConfig(sampling=SamplingConfig(timesteps=tuple(TIMES), caption_steps=2))
    pipe = engine.Pipeline.without_model(EMBEDDED)
    pipe.config = config
    pipe.save_config(tmp_path)
    assert engine.config.read_pipeline_config(tmp_path) == config


def test_the_command_line(few, tmp_path, capsys):
    folder = few(**RECORD, caption_steps=1)
    base = ["generate", "--prompt", "a red circle", "--model-path", str(folder), "--quiet"]
    base += ["--num-frames", "1", "--height", "32", "--width", "32"]
    out = ["--output-path", str(tmp_path / "a.gif")]
    assert main([*base, *out]) == 0
    assert main([*base, *out[:1], str(tmp_path / "b.gif"), "--timesteps", "1000", "757"]) == 0
    own, given = (json.loads((tmp_path / f"{x}.json").read_text())["settings"] for x in "ab")
    assert own["sigmas"] == RECORD["sigmas"] and own["sampling"]["solver"] == "pipeline.json"
    assert given["timesteps"] == [1000.0, 757.0] and given["solver"] == "lcm"

    capsys.readouterr()
    assert main([*base, "--estimate"]) == main([*base, "--estimate", "--sigmas", "1"]) == 0
    own, one = capsys.readouterr().out.split("modulations of")[1:]
    assert own.startswith(" 2 steps") and one.startswith(" 1 steps")
    for line, words in (
        ("--sigmas 0.5 1", "sigmas must be 1 to 10000 numbers that fall"),
        ("--sigmas 1 --num-inference-steps 4", "got num_inference_steps and sigmas"),
        ("--timesteps 1000 --flow-shift 5", "flow_shift must be left out with timesteps"),
    ):
        assert main([*base, *line.split()]) == 2
        assert words in capsys.readouterr().err


class Seen:
    """Stands in the place of a pipeline's `Ahead`, which compiles nothing on a CPU."""

    def __init__(self, model):
        self.model, self.requests = model, []

    def __call__(self, request, progress):
        self.requests.append(request)
        return 1


def test_a_pipeline_is_warmed_up_for_its_own_steps(few):
    """What `warm_up` prepares has the steps and the guidance that the folder asks for."""
    pipe = engine.Pipeline.from_pretrained(few(**RECORD, caption_steps=3), "cpu")
    pipe.ahead = seen = Seen(pipe.model)
    assert sum(pipe.warm_up(mode, prompt_tokens=(3,)) for mode in ("t2v", "v2t")) == 2
    pipe.warm_up("t2vt", timesteps=TIMES)
    assert [len(request.schedule) for request in seen.requests] == [2, 3, 3]
    assert not any(request.guided for request in seen.requests)
    assert [request.schedule.noise_count for request in seen.requests] == [1, 0, 2]
