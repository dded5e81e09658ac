"""LoRA files: every spelling against diffusers' loader and against dense sums, and what is wrong
with a file named before anything is applied."""

import json
from pathlib import Path

import adapter_files as made
import pytest
import torch
from safetensors.torch import save_file

from engine.cli import main
from engine.errors import ModelFileError, UsageError
from engine.weights import convert, load_model, save_pretrained
from engine.weights.names import from_diffusers, to_stock

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("wan")
    made.make_wan().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def wan():
    return made.make_wan()


def ours(path: Path, *lora: tuple, **options) -> dict[str, torch.Tensor]:
    """The stock tensors of a model with adapters in it."""
    model = load_model(path, kernels="reference", lora=lora, **options)
    return {name: t.detach() for name, t in to_stock(model.state_dict(), model.cfg).items()}


def distance(found: dict, wan) -> float:
    expected = from_diffusers(dict(wan.named_parameters()))
    return max((found[name] - p).abs().max().item() for name, p in expected.items())


def dense(wan, pairs: dict, factor: float, diffs: dict | None = None, scale: float = 1.0):
    """The same transformer with factor * scale * up @ down and scale * diffs added in fp64."""
    changed = made.make_wan()
    with torch.no_grad():
        for stem, (down, up) in pairs.items():
            product = up.double().flatten(1) @ down.double().flatten(1)
            weight = changed.get_parameter(f"{stem}.weight")
            weight.copy_(weight.double() + factor * scale * product.view(weight.shape))
        for name, parameter in changed.named_parameters():
            stem, _, kind = name.rpartition(".")
            key = f"diffusion_model.{made.original(stem)}"
            ends = {"weight": f"{key}.diff", "bias": f"{key}.diff_b"}
            ends["scale_shift_table"] = f"diffusion_model.{stem or 'head'}.diff_m"
            if ends[kind] in (diffs or {}):
                parameter += scale * diffs[ends[kind]]
    return changed


def by_diffusers(file: Path, scale: float):
    from diffusers import WanPipeline

    pipe = WanPipeline(None, None, None, None, made.make_wan())
    pipe.load_lora_weights(str(file), adapter_name="one")
    pipe.set_adapters("one", scale)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.transformer


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("spelling", made.SPELLINGS)
def test_a_spelling_is_the_dense_sum(tmp_path, folder, wan, spelling, alpha):
    pairs = made.factors(wan)
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, spelling, alpha))
    expected = dense(wan, pairs, 1.0 if alpha is None else alpha / 4, scale=0.7)
    assert distance(ours(folder, (file, 0.7)), expected) <= TOLERANCE
    assert distance(ours(folder), expected) > 0.1


@pytest.mark.parametrize(
    "spelling, alpha",
    [("kohya", 2.0), ("comfyui", 2.0), ("lightx2v", None), ("diffusers", None)],
)
def test_a_spelling_is_what_diffusers_makes_of_it(tmp_path, folder, wan, spelling, alpha):
    tensors = made.tensors(made.factors(wan), spelling, alpha)
    if spelling == "lightx2v":  # the biases, which diffusers takes as those of lora_B
        pairs = made.diffs(wan).items()
        tensors |= {k: v for k, v in pairs if k.endswith(".diff_b") and ".ffn." in k}
    file = made.write(tmp_path / "a.safetensors", tensors)
    assert distance(ours(folder, (file, 0.7)), by_diffusers(file, 0.7)) <= TOLERANCE


@pytest.mark.parametrize("rslora", [False, True])
def test_metadata_of_diffusers_has_the_alphas(tmp_path, folder, wan, rslora):
    pairs = made.factors(wan, ["blocks.0.attn1.to_q", "blocks.1.attn1.to_q", "proj_out"])
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"blocks.1.attn1.to_q": 3}}
    config |= {"use_rslora": rslora, "target_modules": ["attn1.to_q", "proj_out"]}
    said = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": config[k] for k in config})}
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "diffusers"), said)
    found = ours(folder, (file, 1.0))
    assert distance(found, by_diffusers(file, 1.0)) <= TOLERANCE
    down, up = pairs["blocks.1.attn1.to_q"]
    change = found["blocks.1.attn1.to_q.weight"] - wan.get_parameter("blocks.1.attn1.to_q.weight")
    assert (change - 3 / (2 if rslora else 4) * up @ down).abs().max() <= TOLERANCE


def test_a_folder_of_peft_is_what_peft_makes_of_it(tmp_path, folder):
    from peft import LoraConfig, get_peft_model

    targets = ["to_q", "to_out.0", "ffn.net.2", "time_embedder.linear_1"]
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=targets,
        rank_pattern={"blocks.1.attn1.to_q": 2},
        alpha_pattern={"blocks.1.attn1.to_q": 9},
        lora_bias=True,
    )
    theirs = get_peft_model(made.make_wan(), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    assert distance(ours(folder, (tmp_path / "adapter", 1)), theirs.merge_and_unload()) <= TOLERANCE


def test_sums_that_diffusers_drops_are_applied(tmp_path, folder, wan):
    """Norms, modulations, the head, the patch embedding: 44 tensors beside the products."""
    pairs, diffs = made.factors(wan), made.diffs(wan)
    assert len(diffs) == 44
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "lightx2v") | diffs)
    expected = dense(wan, pairs, 1.0, diffs, 0.5)
    assert distance(ours(folder, (file, 0.5)), expected) <= TOLERANCE
    moved = {k.replace(".diff_m", ".modulation.diff"): v for k, v in diffs.items()}
    file = made.write(tmp_path / "b.safetensors", made.tensors(pairs, "lightx2v") | moved)
    assert distance(ours(folder, (file, 0.5)), expected) <= TOLERANCE


def test_a_product_of_a_convolution(tmp_path, folder, wan):
    pairs = made.factors(wan, ["patch_embedding"])
    assert pairs["patch_embedding"][0].ndim == 5
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "comfyui", 1.0))
    assert distance(ours(folder, (file, 1)), dense(wan, pairs, 0.25)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_factors_of_every_dtype(tmp_path, folder, wan, dtype):
    pairs = {k: tuple(x.to(dtype) for x in pair) for k, pair in made.factors(wan).items()}
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "comfyui"))
    pairs = {k: tuple(x.float() for x in pair) for k, pair in pairs.items()}
    assert distance(ours(folder, (file, 1)), dense(wan, pairs, 1.0)) <= TOLERANCE


@pytest.mark.parametrize("name", ["a.pth", "folder/adapter_model.bin"])
def test_a_torch_file_and_an_alpha_in_whole_numbers(tmp_path, folder, wan, name):
    pairs = made.factors(wan)
    tensors = made.tensors(pairs, "kohya", 2.0)
    tensors |= {k: v.long() for k, v in tensors.items() if k.endswith("alpha")}
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(tensors, tmp_path / name)
    path = tmp_path / name.removesuffix("/adapter_model.bin")
    assert distance(ours(folder, (path, 1)), dense(wan, pairs, 0.5)) <= TOLERANCE


def test_several_add_and_the_text_keeps_its_own(tmp_path, folder, wan):
    first, second = made.factors(wan, seed=1), made.factors(wan, rank=2, seed=5)
    files = made.tensors(first, "kohya", 4.0), made.tensors(second, "peft")
    files = [made.write(tmp_path / f"{i}.safetensors", x) for i, x in enumerate(files)]
    found, base = ours(folder, (files[0], 0.5), (files[1], -1.5)), ours(folder)
    expected = dense(wan, first, 0.5)
    for stem, (down, up) in second.items():
        expected.get_parameter(f"{stem}.weight").data -= 1.5 * up @ down
    assert distance(found, expected) <= TOLERANCE
    text = [name for name in base if "ffn_t." in name]
    assert text and all(torch.equal(found[name], base[name]) for name in text)


def test_the_network_is_diffusers_with_the_adapter(tmp_path, wan):
    """With its text rows hidden, as `test_wan_velocity_survives_the_conversion` has it."""
    folder = tmp_path / "wan"
    wan.save_pretrained(folder)
    pairs = made.factors(wan)
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "kohya", 1.0))
    model = load_model(folder, kernels="reference", lora=[(file, 0.3)])
    theirs = by_diffusers(file, 0.3)
    torch.manual_seed(0)
    video, context, time = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 20), torch.tensor([321.0])
    tokens, lengths = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        want = theirs(video, time, context, return_dict=False)[0]
        got = model(video, tokens, time, time, context, lengths).velocity
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


def test_convert_rounds_once_and_quantises_the_sum(tmp_path, folder, wan):
    pairs = made.factors(wan)
    file = made.write(tmp_path / "a.safetensors", made.tensors(pairs, "kohya", 2.0))
    save_pretrained(load_model(folder), tmp_path / "ours")
    folder = tmp_path / "ours"
    arguments = ["--model-path", str(folder), "--lora", f"{file}:0.7"]
    assert main(["convert", *arguments, "--output-path", str(tmp_path / "wide")]) == 0
    assert distance(ours(tmp_path / "wide"), dense(wan, pairs, 0.5, scale=0.7)) <= TOLERANCE

    convert(folder, tmp_path / "half", dtype=torch.bfloat16)
    convert(tmp_path / "half", tmp_path / "sum", lora=[(file, 0.7)])
    base, found = ours(tmp_path / "half"), ours(tmp_path / "sum")
    name = "blocks.1.attn2.to_v"
    down, up = (x.double() for x in pairs[name])
    exact = base[f"{name}.weight"].double() + 0.35 * up @ down
    assert torch.equal(found[f"{name}.weight"], exact.float().bfloat16().float())

    convert(folder, tmp_path / "fp8", precision="fp8", lora=[(file, 0.7)])
    convert(tmp_path / "wide", tmp_path / "wide-fp8", precision="fp8")
    one, two = (load_model(tmp_path / x).state_dict() for x in ("fp8", "wide-fp8"))
    assert all(torch.equal(one[k].view(torch.uint8), two[k].view(torch.uint8)) for k in one)
    with pytest.raises(UsageError, match="as they were before fp8.*with precision fp8"):
        load_model(tmp_path / "fp8", lora=[(file, 1)])


def renamed(tensors: dict, old: str, new: str) -> dict:
    return {key.replace(old, new): value for key, value in tensors.items()}


def without(tensors: dict, end: str) -> dict:
    key = next(key for key in tensors if key.endswith(end))
    return {k: v for k, v in tensors.items() if k != key}


def plus(key: str, *shape: int):
    return lambda tensors: tensors | {key: torch.ones(shape)}


Q = "lora_unet_blocks_0_self_attn_q"
FAULTS = {  # what is done to a kohya file, what is said of it, and the next step
    "layers": (lambda t: renamed(t, "blocks_1", "blocks_7"), "counterpart.* 30: ", "text-to-video"),
    "image": (plus("lora_unet_blocks_0_cross_attn_k_img.alpha"), "k_img", "text-to-video"),
    "text-encoder": (plus("lora_te1_layer.alpha"), "lora_te1_layer.alpha", "text-to-video"),
    "second-expert": (lambda t: renamed(t, "lora_unet_", "transformer_2."), "60", "text-to-video"),
    "no-down": (lambda t: without(t, "lora_down.weight"), "other half 2: .*lora_up", "Download"),
    "no-up": (lambda t: without(t, "lora_up.weight"), "other half 2: .*lora_down", "Download"),
    "alpha-alone": (plus("lora_unet_time_projection_1.alpha"), "other half 1", "Download"),
    "dora": (plus(f"{Q}.dora_scale", 24, 1), "DoRA, which is not supported, 1: .*dora", "Merge"),
    "dora-peft": (plus(f"{Q}.lora_magnitude_vector", 24), "DoRA, which", "Merge"),
    "loha": (plus(f"{Q}.hada_w1_a", 24, 4), "LoHa, which", "Merge"),
    "lokr": (plus(f"{Q}.lokr_w1", 4, 4), "LoKr, which", "Merge"),
    "locon": (plus(f"{Q}.lora_mid.weight", 4, 4, 1), "LoCon, which", "Merge"),
    "shape": (plus(f"{Q}.diff", 24, 25), r"shape 1: .*\[24, 25\] instead of \[24, 24\]", "size"),
    "bias-shape": (plus(f"{Q}.diff_b", 25), r"\[25\] instead of \[24\]", "size"),
    "rank": (plus(f"{Q}.lora_up.weight", 24, 3), r"\[24, 3\] x \[4, 24\] instead of", "size"),
    "no-rank": (lambda t: {k: v[:0] if "down" in k else v for k, v in t.items()}, "20:", "size"),
    "alphas": (plus(f"{Q}.alpha", 2), r"\[2\] instead of \[1\]", "size"),
    "twice": (plus("lora_unet__blocks_0_self_attn_q.alpha"), "twice 1: lora_unet_", "Keep one"),
    "nan": (
        lambda t: t | {f"{Q}.lora_up.weight": torch.full((24, 4), float("nan"))},
        "finite",
        "U",
    ),
    "infinite": (lambda t: t | {f"{Q}.alpha": torch.tensor(float("inf"))}, "finite 1", "earlier"),
    "int8": (
        lambda t: t | {f"{Q}.lora_up.weight": torch.ones(24, 4, dtype=torch.int8)},
        "floating point 1: .*other half",
        "before it was quantised",
    ),
    "bias-of-peft": (plus("base_model.model.proj_out.bias", 64), "counterpart.* 1", "text-to"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_with_form_file_and_next_step(tmp_path, folder, wan, fault):
    change, said, step = FAULTS[fault]
    tensors = made.tensors(made.factors(wan), "kohya", 2.0)
    file = made.write(tmp_path / "bad.safetensors", change(tensors))
    form = "bare names" if fault == "second-expert" else "kohya"
    pattern = rf"bad.safetensors: every key .*\({form}\).*{said}.*Nothing was applied\. .*{step}"
    with pytest.raises(ModelFileError, match=pattern):
        ours(folder, (file, 1))


def test_files_that_are_no_lora_are_told_so(tmp_path, folder, wan):
    model = folder / "diffusion_pytorch_model.safetensors"
    (tmp_path / "cut.safetensors").write_bytes(model.read_bytes()[:2000])
    save_file({}, tmp_path / "empty.safetensors")
    (tmp_path / "folder").mkdir()
    for path, said in (
        (model, "a LoRA must hold lora_A and lora_B.*--transformer-path"),
        (tmp_path / "empty.safetensors", "a LoRA must hold.*got 0 tensors: none"),
        (tmp_path / "cut.safetensors", "must be complete"),
        (tmp_path / "folder", "a folder with one of adapter_model.safetensors.*got none"),
        (tmp_path / "nothing.safetensors", "a LoRA must be a file, or a folder.*Check the spel"),
    ):
        with pytest.raises(ModelFileError, match=said) as caught:
            ours(folder, (path, 1))
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "config, said",
    [
        ({"init_lora_weights": "pissa"}, "leave the base as it is; got LORA and 'pissa'.*Merge"),
        ({"peft_type": "IA3"}, "peft_type must be LORA.*got IA3"),
        ({"lora_alpha": "much"}, "must be the JSON of a PEFT LoraConfig.*Download"),
        ({"alpha_pattern": {"(": 1}}, "must be the JSON of a PEFT LoraConfig"),
        ({"alpha_pattern": {"((.|\\w)+)+!": 1}}, "could take years to match"),
        ({"alpha_pattern": {".*to_q": 1}}, "could take years to match"),
        (None, "must be the JSON of a PEFT LoraConfig"),
    ],
)
def test_a_config_that_cannot_be_followed_is_named(tmp_path, folder, wan, config, said):
    path = made.write_peft(tmp_path / "adapter", made.tensors(made.factors(wan), "peft"))
    if config is None:
        (path / "adapter_config.json").write_text("[1")
    else:
        made.write_peft(path, made.tensors(made.factors(wan), "peft"), **config)
    with pytest.raises(ModelFileError, match=rf"adapter_config.json: .*{said}"):
        ours(folder, (path, 1))


def test_an_adapter_given_as_a_model_is_called_one(tmp_path, wan, capsys):
    for spelling, form in (("kohya", "kohya"), ("lightx2v", "ComfyUI"), ("peft", "PEFT")):
        file = made.write(tmp_path / "a.safetensors", made.tensors(made.factors(wan), spelling))
        assert (
            main(["convert", "--model-path", str(file), "--output-path", str(tmp_path / "x")]) == 4
        )
        said = capsys.readouterr().err
        assert "a LoRA" in said and form in said and "--lora" in said and "a.safetensors" in said


@pytest.mark.parametrize(
    "flag, code, said",
    [
        ("none.safetensors:0.5", 4, "got 'none.safetensors:0.5', and no none.safetensors"),
        ("a:b.safetensors:inf", 2, "must have a finite scale"),
        ("a:b.safetensors:1:x", 4, "and no a:b.safetensors:1:x"),
    ],
)
def test_flags(tmp_path, monkeypatch, capsys, wan, flag, code, said):
    monkeypatch.chdir(tmp_path)
    made.write(tmp_path / "a:b.safetensors", made.tensors(made.factors(wan), "kohya"))
    assert main(["generate", "--prompt", "red", "--lora", flag]) == code
    assert said in capsys.readouterr().err
    from engine.cli.checks import adapters

    assert adapters(("a:b.safetensors",)) == [(Path("a:b.safetensors"), 1.0)]
    assert adapters(("a:b.safetensors:-.5",)) == [(Path("a:b.safetensors"), -0.5)]
