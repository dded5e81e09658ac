import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from weights_made import CFG, GOLDEN, assert_same, make_model

from engine import ModelConfig, ModelFileError, UniViGU, UsageError, load_model, save_pretrained
from engine.weights import convert
from engine.weights.names import from_stock, to_stock

VARIANTS = {
    "discrete": CFG,
    "mask": replace(CFG, mask_source=True),
    "embedding": replace(CFG, text_flow="embedding"),
    "square-embedding": replace(CFG, text_flow="embedding", vocab=24),
    "blind-video": replace(CFG, video_sees_text=False),
}


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
