"""NaN and infinity in weights are an error at loading, and of saving, that names the tensor."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import make_model

from engine import ModelFileError, NonFinite, Pipeline, UniViGU, load_model, save_pretrained
from engine.config import EMBEDDED
from engine.files import write_manifest
from engine.files.tensors import is_finite
from engine.weights import convert


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A model in one file."""
    path = tmp_path_factory.mktemp("made") / "whole"
    torch.manual_seed(0)
    save_pretrained(make_model(), path)
    return path


VALUES = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "minus infinity": -float("inf"),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["blocks.1.attn1.to_k.weight", "scale_shift_table_t"])
def test_weights_that_are_not_finite_are_refused(tmp_path, made, value, dtype, name):
    state = load_file(made / "model.safetensors")
    state = {key: tensor.to(dtype) for key, tensor in state.items()}
    state[name].view(-1)[-1] = value
    save_file(state, tmp_path / "m.safetensors")
    said = rf"must be finite; got NaN or infinity in .*{name}"
    for load in (load_model, lambda path, kernels: convert(path, tmp_path / "out")):
        with pytest.raises(ModelFileError, match=said):
            load(tmp_path / "m.safetensors", kernels="reference")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_fp8_has_codes_of_nan(tmp_path, made, code):
    convert(made, tmp_path / "fp8", precision="fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    state = load_file(path)
    name = next(name for name, x in state.items() if x.dtype == torch.float8_e4m3fn)
    state[name].view(torch.uint8).view(-1)[5] = code
    save_file(state, path, {"format": "pt"})
    write_manifest(tmp_path / "fp8")
    with pytest.raises(ModelFileError, match=f"got NaN or infinity in {name}, torch.float8"):
        load_model(tmp_path / "fp8", kernels="reference")


def test_what_overflows_in_the_dtype_of_loading_is_refused(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].ffn.up.weight[0, 0] = 7e4
    save_pretrained(model, tmp_path)
    with pytest.raises(ModelFileError, match=r"net\.0\.proj\.weight, torch\.float16"):
        load_model(tmp_path, dtype=torch.float16, kernels="reference")
    assert isinstance(load_model(tmp_path, kernels="reference"), UniViGU)


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize(
    ("part", "file", "name"),
    [
        ("vae", "diffusion_pytorch_model", "decoder.conv_out.bias"),
        ("vae", "diffusion_pytorch_model", "encoder.conv_in.weight"),
        ("text_encoder", "model", "shared.weight"),
        ("text_encoder", "model", "encoder.final_layer_norm.weight"),
    ],
)
def test_parts_that_are_not_finite_are_refused(tmp_path, part, file, name, value):
    shutil.copytree(EMBEDDED, tmp_path / "p")
    path = tmp_path / "p" / part / f"{file}.safetensors"
    state = load_file(path)
    state[name].view(-1)[0] = value
    save_file(state, path, {"format": "pt"})
    with pytest.raises(ModelFileError, match=f"got NaN or infinity in {name}"):
        Pipeline.without_model(tmp_path / "p")


def test_what_is_not_finite_is_not_saved(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.blocks[0].norm2.bias[3] = float("nan")
    with pytest.raises(NonFinite, match=r"save: blocks\.0\.norm2\.bias must be finite"):
        save_pretrained(model, tmp_path / "m")
    assert not list((tmp_path / "m").iterdir())


DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number_anywhere_is_found(dtype):
    for count in (1, 7, 64, 1000):
        x = torch.randn(count).to(dtype)
        x[0] = torch.finfo(dtype).max
        assert is_finite(x) and is_finite(x[:0]) and is_finite(-x)
        for at in range(0, count, 7):
            for value in VALUES.values():
                spoiled = x.clone()
                spoiled[at] = value
                assert not is_finite(spoiled)


def test_all_codes_of_fp8():
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
    finite = [is_finite(codes[i : i + 1]) for i in range(256)]
    assert finite == codes.float().isfinite().tolist() and sum(finite) == 254
