"""Forms in which models are published: prefixes, nestings and FP8 are read; the rest is refused by
name, with the file and the way out."""

import json
import runpy
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import GOLDEN, assert_same, save_originals, stock_of

from engine import ModelFileError, load_model
from engine.weights import forms, open_model

E4, E5 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(scope="module")
def official():
    return load_file(GOLDEN / "univigu_small.weights.safetensors")


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Tensors of a Wan model in the names of its release and of diffusers."""
    root = save_originals(tmp_path_factory.mktemp("wan"))
    folders = {"original": root / "original", "diffusers": root / "wan"}
    name = "diffusion_pytorch_model.safetensors"
    return {layout: load_file(folder / name) for layout, folder in folders.items()}


@pytest.fixture(autouse=True)
def fresh_notices(monkeypatch):
    """Notices are said once in a process; here once in a test. A Wan model gets 60 embeddings."""
    forms.say.cache_clear()
    monkeypatch.setattr(open_model, "__defaults__", (60,))


def means(path, state, tmp_path):
    """Whether `path` is read as the bare tensors are."""
    save_file(state, tmp_path / "bare.safetensors")
    found, bare = stock_of(path), stock_of(tmp_path / "bare.safetensors")
    assert_same(found, bare)


PREFIXES = [
    "model.diffusion_model.",
    "diffusion_model.",
    "module.",
    "model.",
    "_orig_mod.",
    "pipe.dit.",
    "module._orig_mod.",
    "generator.model._fsdp_wrapped_module.",
    "my_trainer.net.",
]


@pytest.mark.parametrize("layout", ["original", "diffusers", "stock"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_of_all_tensors_goes(tmp_path, wan, official, prefix, layout):
    state = official if layout == "stock" else wan[layout]
    save_file({prefix + name: x for name, x in state.items()}, tmp_path / "m.safetensors")
    means(tmp_path / "m.safetensors", state, tmp_path)


@pytest.mark.parametrize("inside", ["_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_wrappers_inside_names_go(tmp_path, wan, inside):
    state = {n.replace("blocks.0.", f"blocks.0.{inside}"): x for n, x in wan["original"].items()}
    save_file(state, tmp_path / "m.safetensors")
    means(tmp_path / "m.safetensors", wan["original"], tmp_path)


def test_parts_beside_the_transformer_are_ignored_and_said_once(tmp_path, wan, capsys):
    state = {"model.diffusion_model." + n: x for n, x in wan["original"].items()}
    state |= {"vae.decoder.conv1.bias": torch.ones(4), "text_encoders.t5.shared": torch.ones(4)}
    save_file(state, tmp_path / "all.safetensors")
    for _ in range(2):
        means(tmp_path / "all.safetensors", wan["original"], tmp_path)
    (line,) = capsys.readouterr().err.splitlines()
    assert "all.safetensors: 2 tensors of other parts are ignored" in line


@pytest.mark.parametrize(
    "change,message",
    [
        ({"patch_embedding.bias": "other.patch_embedding.bias"}, r"unexpected 1: other\.patch_emb"),
        ({"head.head.bias": "head.head.bias.extra.thing"}, r"module\.head\.head\.bias\.extra"),
    ],
)
def test_what_has_another_prefix_is_not_passed_over(tmp_path, wan, change, message):
    state = {"module." + n: x for n, x in wan["original"].items()}
    for old, new in change.items():
        state[new if "other" in new else "module." + new] = state.pop("module." + old)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=message.replace(r"module\.head", "head")):
        load_model(tmp_path / "m.safetensors")


def test_two_models_in_one_file_are_told_apart_or_refused(tmp_path, official):
    both = {f"{k}.{n}": x.clone() for k in ("generator", "critic") for n, x in official.items()}
    save_file(both, tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=r"one transformer; got 2: .*critic\.patch_embedding"):
        load_model(tmp_path / "m.safetensors")


NESTINGS = {
    "state_dict": lambda x: {"state_dict": x, "step": 3},
    "model": lambda x: {"model": x, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
    "generator": lambda x: {"generator": x},
    "ema": lambda x: {"ema": x, "decay": 0.99},
    "module": lambda x: {"module": x, "global_steps": 5, "rng": torch.ones(3)},
    "dit": lambda x: {"dit": x},
    "deep": lambda x: {"state_dict": {"model": {"module": x}}},
    "prefixed": lambda x: {"model": {"module." + n: t for n, t in x.items()}},
}


@pytest.mark.parametrize("ending", ["pth", "pt", "bin", "ckpt"])
@pytest.mark.parametrize("nest", NESTINGS.values(), ids=NESTINGS)
def test_one_nested_state_dict_is_found(tmp_path, official, capsys, nest, ending):
    torch.save(nest(official), tmp_path / f"m.{ending}")
    means(tmp_path / f"m.{ending}", official, tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "keys,taken",
    [
        (("model", "ema"), "ema"),
        (("generator", "critic", "generator_ema"), "generator_ema"),
        (("generator", "critic"), "generator"),
        (("model", "model_ema"), "model_ema"),
    ],
)
def test_of_several_the_average_is_taken_and_said_once(tmp_path, official, capsys, keys, taken):
    states = {key: {n: x + i for n, x in official.items()} for i, key in enumerate(keys)}
    torch.save(states, tmp_path / "m.pt")
    for _ in range(2):
        assert_same(stock_of(tmp_path / "m.pt"), states[taken])
    (line,) = capsys.readouterr().err.splitlines()
    assert f"m.pt: holds {', '.join(sorted(keys))}; {taken} is read" in line


def test_of_several_unknown_ones_none_is_taken(tmp_path, official):
    torch.save({"one": official, "two": official}, tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match=r"m\.pt: must hold one model.*got one, two\. Save"):
        load_model(tmp_path / "m.pt")


def matrices(state):
    return [n for n, x in state.items() if n.startswith("blocks") and x.ndim == 2]


def beside(name, ending):
    return f"{name.removesuffix('.weight')}.{ending}"


def cast(state, kind):
    return {n: x.to(kind) if n in matrices(state) else x.bfloat16() for n, x in state.items()}


def scaled(state, ending, shape=(), rows=False):
    """Each matrix in e4m3 with a scale beside it, as ComfyUI (one number) or by rows."""
    found = {n: x.half() for n, x in state.items()}
    for name in matrices(state):
        x = state[name]
        scale = (x.abs().amax(1) if rows else x.abs().max()) / 448
        found[name] = (x / (scale[:, None] if rows else scale)).to(E4)
        found[beside(name, ending)] = scale.reshape(shape)
    return found


FP8 = {
    "e4m3": lambda x: cast(x, E4),
    "e5m2": lambda x: cast(x, E5),
    "all-e4m3": lambda x: {n: t.to(E4) for n, t in x.items()},
    "scale_weight": lambda x: scaled(x, "scale_weight") | {"scaled_fp8": torch.zeros(2).to(E4)},
    "scale_weight-1": lambda x: scaled(x, "scale_weight", (1,)),
    "weight_scale": lambda x: scaled(x, "weight_scale"),
    "weight_scale-rows": lambda x: scaled(x, "weight_scale", (-1,), rows=True),
    "weight_scale-columns": lambda x: scaled(x, "weight_scale", (-1, 1), rows=True),
}


def dequantised(state):
    """An oracle of its own: in fp64."""
    found = {}
    for name, x in state.items():
        scales = [state.get(beside(name, e)) for e in ("scale_weight", "weight_scale")]
        scale = next((s for s in scales if s is not None), torch.ones(()))
        rows = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())
        if name.endswith((".weight", ".bias", "modulation", "table")):
            found[name] = x.double() * rows.double() if name.endswith(".weight") else x.double()
    return found


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("form", FP8.values(), ids=FP8)
def test_fp8_of_others_is_dequantised(tmp_path, wan, form, layout, prefix):
    made = form({n: x * 0.05 for n, x in wan[layout].items()})
    save_file({prefix + n: x for n, x in made.items()}, tmp_path / "fp8.safetensors")
    save_file(dequantised(made), tmp_path / "plain.safetensors")
    got, want = (stock_of(tmp_path / f"{name}.safetensors") for name in ("fp8", "plain"))
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name].double(), x.double(), rtol=1e-6, atol=0, msg=name)
    model = load_model(tmp_path / "fp8.safetensors", dtype=torch.bfloat16, kernels="reference")
    q = model.state_dict()["blocks.1.attn1.to_out.weight"]
    torch.testing.assert_close(q, want["blocks.1.attn1.to_out.0.weight"].bfloat16(), rtol=0, atol=0)


def test_official_tensors_in_fp8_with_comfyui_scales_are_dequantised(tmp_path, official):
    made = scaled(official, "scale_weight")
    save_file(made, tmp_path / "m.safetensors")
    name = "blocks.1.ffn_t.net.2.weight"
    want = made[name].float() * made[beside(name, "scale_weight")]
    assert torch.equal(stock_of(tmp_path / "m.safetensors")[name], want)


def test_scales_of_inputs_are_ignored_by_name(tmp_path, wan, capsys):
    made = scaled(wan["original"], "scale_weight")
    inputs = {beside(n, "scale_input"): torch.ones(()) for n in matrices(wan["original"])}
    save_file(made | inputs, tmp_path / "m.safetensors")
    stock_of(tmp_path / "m.safetensors")
    (line,) = capsys.readouterr().err.splitlines()
    assert "scale_input" in line and "ignored" in line


Q = "blocks.0.self_attn.q"
BAD_SCALES = {
    "alone": ({f"{Q}x.weight_scale": torch.ones(())}, r"qx\.weight_scale must have a weight"),
    "shape": ({f"{Q}.weight_scale": torch.ones(3)}, r"q\.weight_scale must be .*got \[3\]"),
    "blocks": ({f"{Q}.weight_scale_inv": torch.ones(1, 1)}, r"got FP8 in blocks .*scale_inv"),
    "nan": ({f"{Q}.weight_scale": torch.tensor(torch.nan)}, r"finite and positive; got \[nan\]"),
    "nvfp4": ({f"{Q}.weight_scale_2": torch.ones(())}, "got NVFP4"),
    "bnb": ({f"{Q}.weight.absmax": torch.ones(3)}, "got bitsandbytes"),
    "int8": (
        {f"{Q}.weight": torch.ones(128, 128, dtype=torch.int8)},
        r"not floating point 1: .*I8",
    ),
}


@pytest.mark.parametrize("change,message", BAD_SCALES.values(), ids=BAD_SCALES)
def test_other_quantisations_and_scales_are_refused(tmp_path, wan, change, message):
    save_file(cast(wan["original"], E4) | change, tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=message) as error:
        load_model(tmp_path / "m.safetensors", kernels="reference")
    assert len(str(error.value)) < 700


LORA = {
    "peft": "base_model.model.blocks.0.self_attn.q.lora_A.weight",
    "kohya": "lora_unet_blocks_0_self_attn_q.lora_down.weight",
    "comfyui": "diffusion_model.blocks.0.self_attn.q.lora_B.weight",
    "diffusers": "transformer.blocks.0.attn1.to_q.lora.up.weight",
    "lightx2v": "diffusion_model.blocks.0.self_attn.q.diff_b",
    "loha": "lora_unet_blocks_0_self_attn_q.hada_w1_a",
}


@pytest.mark.parametrize("key", LORA.values(), ids=LORA)
def test_an_adapter_in_the_place_of_a_model_is_named(tmp_path, key):
    save_file({key: torch.ones(4, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(ModelFileError, match=r"lora\.safetensors: .*LoRA adapter .*--lora"):
        load_model(tmp_path / "lora.safetensors")


def gguf(root):
    (root / "wan.gguf").write_bytes(b"GGUF" + bytes(60))
    return root / "wan.gguf"


def renamed_gguf(root):
    return gguf(root).rename(root / "wan.safetensors")


def gguf_folder(root):
    return gguf(root).parent


def adapter_folder(root):
    (root / "adapter_config.json").write_text("{}")
    save_file({LORA["peft"]: torch.ones(4, 4)}, root / "adapter_model.safetensors")
    return root


def adapter_of_diffusers(root):
    save_file({LORA["diffusers"]: torch.ones(4, 4)}, root / "pytorch_lora_weights.safetensors")
    return root


def pickled(root):
    torch.save({"model": {"a": torch.ones(2)}, "args": SimpleNamespace(lr=1)}, root / "m.pth")
    return root / "m.pth"


def before_zip(root):
    state = {"patch_embedding.weight": torch.ones(2)}
    torch.save(state, root / "m.bin", _use_new_zipfile_serialization=False)
    return root / "m.bin"


def run_folder(root):
    (root / "checkpoint").mkdir()
    return root


REFUSED = {
    "gguf": (gguf, r"wan\.gguf: .*a GGUF file.*from_single_file"),
    "gguf-renamed": (renamed_gguf, r"wan\.safetensors: .*a GGUF file.*from_single_file"),
    "gguf-folder": (gguf_folder, r"wan\.gguf: .*a GGUF file.*from_single_file"),
    "peft-folder": (adapter_folder, r"LoRA adapter \(adapter_config\.json.*--lora"),
    "diffusers-lora": (adapter_of_diffusers, r"LoRA adapter \(pytorch_lora_weights.*--lora"),
    "pickle": (pickled, r"m\.pth: .*pickled objects too \(types\.SimpleNamespace\).*python -c"),
    "before-zip": (before_zip, r"m\.bin: .*format before 1\.6.*python -c"),
    "run": (run_folder, r"the folder of a training run.*/checkpoint"),
}


@pytest.mark.parametrize("make,message", REFUSED.values(), ids=REFUSED)
def test_other_forms_are_refused_with_the_way_out(tmp_path, make, message):
    with pytest.raises(ModelFileError, match=message):
        load_model(make(tmp_path))


def command_in(error) -> list[str]:
    """The command that a message gives, after `python`."""
    text = str(error.value)
    line = text[text.index("python ") : text.index(" and pass") if " and pass" in text else None]
    line = line.split(" with the key")[0].rstrip(", ")
    return shlex.split(line)[1:]


def run(words, monkeypatch):
    """In this process: another takes seconds to import torch."""
    flag, what, *rest = words
    if flag == "-c":
        exec(compile(what, "command", "exec"), {})
        return
    monkeypatch.setattr(sys, "argv", [what, *rest])
    runpy.run_module(what, run_name="__main__")


@pytest.mark.parametrize("form", ["dcp", "pickle", "before-zip"])
def test_the_command_in_the_message_makes_a_file_that_is_read(
    tmp_path, official, form, monkeypatch
):
    path = tmp_path / "source"
    if form == "dcp":
        from torch.distributed import checkpoint

        checkpoint.save({"model": official}, checkpoint_id=path, no_dist=True)
    else:
        path = tmp_path / "old.pth"
        content = {"model": official, "args": SimpleNamespace(lr=1)}
        old = form == "before-zip"
        content = official if old else content
        torch.save(content, path, _use_new_zipfile_serialization=not old)
    with pytest.raises(ModelFileError) as error:
        load_model(path)
    monkeypatch.chdir(tmp_path)
    run(command_in(error), monkeypatch)
    means(tmp_path / "model.pth", official, tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_folder_of_bin_files_is_read_where_no_safetensors_are(tmp_path, wan, sharded):
    state, folder = wan["original"], tmp_path / "wan"
    folder.mkdir()
    if sharded:
        names = [f"diffusion_pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        where = {name: names[i % 2] for i, name in enumerate(state)}
        for file in names:
            torch.save({n: x for n, x in state.items() if where[n] == file}, folder / file)
        index = json.dumps({"weight_map": where})
        (folder / "diffusion_pytorch_model.bin.index.json").write_text(index)
    else:
        torch.save(state, folder / "diffusion_pytorch_model.bin")
    means(folder, state, tmp_path)
    scaled_state = {n: x + 1 for n, x in state.items()}
    save_file(scaled_state, folder / "diffusion_pytorch_model.safetensors")
    means(folder, scaled_state, tmp_path)
