"""Wan2.1 transformers of diffusers and of the original release: loaded in every form, and their
relatives refused by name."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import CFG, assert_same, edit_json, make_wan, save_originals, stock_of

from engine import ModelConfig, ModelFileError, load_model
from engine.weights import open_model
from engine.weights.names import to_stock


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_originals(tmp_path_factory.mktemp("wan"))


@pytest.mark.parametrize("pipeline", [False, True])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_diffusers_wan(tmp_path, shard, pipeline):
    wan = make_wan()
    wan.save_pretrained(tmp_path / "transformer", max_shard_size=shard)
    model = load_model(tmp_path if pipeline else tmp_path / "transformer", kernels="reference")
    assert model.cfg == replace(CFG, vocab=256384)
    state, wan_state = to_stock(model.state_dict(), model.cfg), wan.state_dict()

    for name, twin in {
        "blocks.1.ffn_t.net.2.bias": "blocks.1.ffn.net.2.bias",
        "time_embedding_t.time_proj.weight": "condition_embedder.time_proj.weight",
        "time_embedding_v.time_embedder.linear_1.bias": (
            "condition_embedder.time_embedder.linear_1.bias"
        ),
        "scale_shift_table_t": "scale_shift_table",
        "scale_shift_table_v": "scale_shift_table",
    }.items():
        assert torch.equal(state[name], wan_state[twin]), name

    assert not state["text_head.linear.weight"].any() and not state["text_head.linear.bias"].any()
    assert state["text_head.norm_final.weight"].eq(1).all()
    embeddings = state["vocab_embed.weight"]
    assert abs(embeddings.std() - 0.02) < 1e-4 and abs(embeddings.mean()) < 1e-4

    again = stock_of(tmp_path)["vocab_embed.weight"]
    assert torch.equal(again, embeddings)


def test_wan_velocity_survives_the_conversion(tmp_path):
    """With its text rows hidden, the converted model is the Wan model."""
    wan = make_wan(heads=2, head_dim=24)
    wan.save_pretrained(tmp_path)
    model = load_model(tmp_path, kernels="reference")
    video, context, time = torch.randn(1, 16, 2, 4, 6), torch.randn(1, 7, 20), torch.tensor([321.0])
    tokens, lengths = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        want = wan(video, time, context, return_dict=False)[0]
        got = model(video, tokens, time, time, context, lengths).velocity
    assert (got - want).abs().max() < 2e-5 * want.abs().max()


def as_folder(folder):
    return folder


def as_sharded(folder):
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    os.remove(folder / "diffusion_pytorch_model.safetensors")
    files = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {name: files[i % 2] for i, name in enumerate(state)}
    for file in files:
        save_file({n: t for n, t in state.items() if weight_map[n] == file}, folder / file)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return folder


def as_file(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def as_pth(folder):
    torch.save(load_file(folder / "diffusion_pytorch_model.safetensors"), folder / "wan.pth")
    return folder / "wan.pth"


@pytest.mark.parametrize("form", [as_folder, as_sharded, as_file, as_pth])
def test_original_wan(tmp_path, original, form):
    folder = shutil.copytree(original / "original", tmp_path / "wan")
    path = form(folder)
    assert open_model(path, vocab=50)[0] == ModelConfig(1, 128, 2, 40, 20, 16, 50)
    assert_same(stock_of(path, vocab=50), stock_of(original / "wan", vocab=50))


def test_original_head_dim_comes_from_num_heads(tmp_path, original):
    folder = shutil.copytree(original / "original", tmp_path / "wan")
    edit_json(folder / "config.json", num_heads=4)
    assert open_model(folder, vocab=50)[0].head_dim == 32


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("img_emb.proj.0.weight", (4,), r"unexpected 1: img_emb\.proj\.0\.weight"),
        ("blocks.0.norm2.weight", (128,), r"unexpected 1: blocks\.0\.norm2\.weight"),
        ("blocks.0.cross_attn.k_img.weight", (4,), r"unexpected 1: .*k_img\.weight"),
        ("blocks.0.self_attn.norm_x.weight", (4,), r"unexpected 1: .*norm_x\.weight"),
        ("patch_embedding.weight", (128, 36, 1, 2, 2), r"image-to-video .*: 36 input channels"),
    ],
)
def test_other_wan_variants_are_refused(tmp_path, original, key, shape, message):
    folder = shutil.copytree(original / "original", tmp_path / "wan")
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {key: torch.ones(shape)}, file)
    with pytest.raises(ModelFileError, match=message):
        load_model(folder, kernels="reference")


def test_diffusers_image_to_video_is_refused(tmp_path, original):
    folder = shutil.copytree(original / "wan", tmp_path / "wan")
    file = folder / "diffusion_pytorch_model.safetensors"
    key = "condition_embedder.image_embedder.norm1.weight"
    save_file(load_file(file) | {key: torch.ones(4)}, file)
    with pytest.raises(ModelFileError, match="unexpected 1: condition_embedder.image_embedder"):
        load_model(folder, kernels="reference")
