"""Small models in the layouts in which they are published, and what a file of one means."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine import ModelConfig, UniViGU
from engine.weights import open_model

GOLDEN = Path(__file__).parents[1] / "golden"
CFG = ModelConfig(heads=2, head_dim=12, layers=2, ffn_dim=40, text_dim=20, freq_dim=16, vocab=30)
# diffusers piece -> piece of the Wan2.1 release; written independently of engine/weights/names.py.
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


def edit_json(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def save_originals(root):
    """One Wan model under root: wan/ (diffusers), and original/ (release names and config)."""
    wan = make_wan(heads=1, head_dim=128)
    wan.save_pretrained(root / "wan")
    state = {original_name(name): t.contiguous() for name, t in wan.state_dict().items()}
    (root / "original").mkdir()
    save_file(state, root / "original" / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "WanModel", "dim": 128, "eps": 1e-6, "ffn_dim": 40, "freq_dim": 16}
    config |= {"in_dim": 16, "model_type": "t2v", "num_heads": 1, "num_layers": 2, "text_len": 512}
    (root / "original" / "config.json").write_text(json.dumps(config))
    return root


WAN_VAE = {  # the fields of its config.json that the engine reads
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.0] * 16,
    "latents_std": [1.0] * 16,
}
