import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import ModelConfig, ModelFileError, UniViGU, UsageError, load_model, save_pretrained
from engine.weights import convert, open_model
from engine.weights.names import from_stock, to_stock

GOLDEN = Path(__file__).parents[1] / "golden"
CFG = ModelConfig(heads=2, head_dim=12, layers=2, ffn_dim=40, text_dim=20, freq_dim=16, vocab=30)
VARIANTS = {
    "discrete": CFG,
    "mask": replace(CFG, mask_source=True),
    "embedding": replace(CFG, text_flow="embedding"),
    "square-embedding": replace(CFG, text_flow="embedding", vocab=24),
    "blind-video": replace(CFG, video_sees_text=False),
}

# diffusers piece -> piece of the Wan2.1 release; written independently of engine/names.py.
TOP = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "patch_embedding": "patch_embedding",
}
IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}


def original_name(name):
    if name == "scale_shift_table":
        return "head.modulation"
    if name.endswith(".scale_shift_table"):
        return name.replace("scale_shift_table", "modulation")
    stem, _, kind = name.rpartition(".")
    if stem.startswith("blocks."):
        blocks, number, rest = stem.split(".", 2)
        return f"{blocks}.{number}.{IN_BLOCK[rest]}.{kind}"
    return f"{TOP[stem]}.{kind}"


def make_model(cfg=CFG, dtype=torch.float32):
    model = UniViGU(cfg, dtype=dtype, kernels="reference")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def make_wan(heads=2, head_dim=12):
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        text_dim=20,
        freq_dim=16,
        ffn_dim=40,
        num_layers=2,
        cross_attn_norm=True,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def stock_of(path, **options):
    """What a file means, under stock names, through the same inventory that load_model uses."""
    _, entries = open_model(Path(path), **options)
    return {name: entry.read() for name, entry in entries.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name
        assert value.dtype == b[name].dtype, name


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
@pytest.mark.parametrize("cfg", VARIANTS.values(), ids=VARIANTS)
def test_our_folder_round_trip(tmp_path, cfg, max_shard_bytes):
    model = make_model(cfg)
    save_pretrained(model, tmp_path / "a" / "b", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "a" / "b", kernels="reference")
    assert loaded.cfg == cfg
    assert_same(dict(loaded.named_parameters()), dict(model.named_parameters()))
    assert all(p.requires_grad and p.is_contiguous() for p in loaded.parameters())


def test_loaded_model_computes_what_the_saved_one_did(tmp_path):
    model = make_model()
    save_pretrained(model, tmp_path)
    loaded = load_model(tmp_path, kernels="reference")
    arguments = (
        torch.randn(1, 16, 1, 4, 4),
        torch.randint(30, (1, 3)),
        torch.tensor([500.0]),
        torch.tensor([250.0]),
        torch.randn(1, 5, 20),
    )
    with torch.no_grad():
        want, got = model(*arguments), loaded(*arguments)
    assert torch.equal(got.velocity, want.velocity) and torch.equal(got.logits, want.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_load_casts_to_the_dtypes_of_a_new_model(tmp_path, dtype):
    save_pretrained(make_model(), tmp_path)
    like = UniViGU(CFG, dtype=dtype, kernels="reference").state_dict()
    got = load_model(tmp_path, dtype=dtype, kernels="reference").state_dict()
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in like.items()}


def test_loaded_model_is_bound_for_its_device_and_request(tmp_path):
    save_pretrained(make_model(), tmp_path)
    for request in ("reference", "auto"):
        want = UniViGU(CFG, kernels=request).ops
        model = load_model(tmp_path, kernels=request)
        bound = [m.ops for m in model.modules() if hasattr(m, "ops")]
        assert len(bound) > CFG.layers and all(ops == want for ops in bound)


@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        ("univigu_small", ModelConfig(4, 24, 2, 160, 32, 64, 97)),
        ("univigu_masked", ModelConfig(2, 32, 2, 128, 48, 256, 60, mask_source=True)),
    ],
)
def test_official_files_load_and_come_back_bitwise(tmp_path, name, cfg):
    source = GOLDEN / f"{name}.weights.safetensors"
    model = load_model(source, kernels="reference")
    assert model.cfg == cfg
    save_pretrained(model, tmp_path / "saved")
    convert(source, tmp_path / "converted")
    for folder in ("saved", "converted"):
        assert_same(load_file(tmp_path / folder / "model.safetensors"), load_file(source))
        assert load_model(tmp_path / folder, kernels="reference").cfg == cfg


def test_official_pth_with_wrapper_prefixes(tmp_path):
    stock = load_file(GOLDEN / "univigu_small.weights.safetensors")
    wrapped = {
        "_fsdp_wrapped_module."
        + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._orig_mod."): tensor
        for name, tensor in stock.items()
    }
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"model": wrapped, "optimizer": optimizer, "step": 3}, tmp_path / "m.pth")
    model = load_model(tmp_path / "m.pth", kernels="reference")
    assert_same(to_stock(model.state_dict(), model.cfg), stock)


def test_stacks_hold_the_parts_in_order():
    stock = load_file(GOLDEN / "univigu_small.weights.safetensors")
    cfg = ModelConfig(4, 24, 2, 160, 32, 64, 97)
    ours = from_stock(stock, cfg)
    self_attention, cross = "blocks.1.attn1.to_", "blocks.1.attn2.to_"
    parts = [stock[f"{self_attention}{x}.weight"] for x in "qkv"]
    assert torch.equal(ours[f"{self_attention}qkv.weight"], torch.cat(parts))
    parts = [stock[f"{cross}{x}.bias"] for x in "kv"]
    assert torch.equal(ours[f"{cross}kv.bias"], torch.cat(parts))
    assert torch.equal(ours["blocks.1.ffn_t.up.weight"], stock["blocks.1.ffn_t.net.0.proj.weight"])
    assert_same(to_stock(ours, cfg), stock)
    model = load_model(GOLDEN / "univigu_small.weights.safetensors", kernels="reference")
    assert_same(model.state_dict(), ours)


def test_from_stock_names_what_is_missing_or_not_of_this_config():
    cfg = ModelConfig(4, 24, 2, 160, 32, 64, 97)
    stock = load_file(GOLDEN / "univigu_small.weights.safetensors")
    with pytest.raises(ModelFileError, match="inv_freq"):
        from_stock(stock, CFG)
    del stock["blocks.0.attn1.to_k.bias"]
    with pytest.raises(ModelFileError, match=r"got no blocks\.0\.attn1\.to_k\.bias"):
        from_stock(stock, cfg)


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


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Folder with one Wan model: wan/ (diffusers), and original/ (release names and config)."""
    root = tmp_path_factory.mktemp("wan")
    wan = make_wan(heads=1, head_dim=128)
    wan.save_pretrained(root / "wan")
    state = {original_name(name): t.contiguous() for name, t in wan.state_dict().items()}
    (root / "original").mkdir()
    save_file(state, root / "original" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 128, "eps": 1e-6, "ffn_dim": 40, "freq_dim": 16}
    config |= {"in_dim": 16, "model_type": "t2v", "num_heads": 1, "num_layers": 2, "text_len": 512}
    (root / "original" / "config.json").write_text(json.dumps(config))
    return root


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


def test_convert_keeps_dtypes_or_casts_what_the_model_computes_in(tmp_path):
    stock = {
        name: tensor.bfloat16()
        for name, tensor in load_file(GOLDEN / "univigu_small.weights.safetensors").items()
    }
    del stock["rotary_emb_text.inv_freq"]
    config = json.dumps({"heads": 4, "head_dim": 24})
    save_file(stock, tmp_path / "m.safetensors", {"config": config})

    convert(tmp_path / "m.safetensors", tmp_path / "kept")
    kept = load_file(tmp_path / "kept" / "model.safetensors")
    assert kept.pop("rotary_emb_text.inv_freq").shape == (12,)
    assert_same(kept, stock)

    convert(tmp_path / "m.safetensors", tmp_path / "half", dtype=torch.float16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert half["blocks.0.attn1.to_q.weight"].dtype == torch.float16
    assert half["blocks.0.attn1.norm_q.weight"].dtype == torch.float32

    save_pretrained(make_model(), tmp_path / "saved", dtype=torch.bfloat16)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved["text_head.linear.weight"].dtype == torch.bfloat16
    assert saved["scale_shift_table_v"].dtype == torch.float32


def test_our_lone_file_carries_its_config(tmp_path):
    cfg = replace(CFG, mask_source=True, video_sees_text=False)
    save_pretrained(make_model(cfg), tmp_path)
    os.remove(tmp_path / "config.json")
    assert load_model(tmp_path / "model.safetensors", kernels="reference").cfg == cfg


def test_convert_in_place(tmp_path):
    model = make_model()
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    convert(tmp_path, tmp_path)
    assert_same(load_model(tmp_path, kernels="reference").state_dict(), model.state_dict())


def test_arguments():
    path = GOLDEN / "univigu_small.weights.safetensors"
    with pytest.raises(UsageError, match="dtype must be"):
        load_model(path, dtype=torch.int8)
    with pytest.raises(UsageError, match="max_shard_bytes"):
        save_pretrained(make_model(), "nowhere", max_shard_bytes=0)


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


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
