"""LoRA files of every published spelling for a small Wan transformer. Names are written down here
independently of engine/weights: a stem is diffusers' name of a module."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "ffn_dim": 40}
SHAPE |= {"text_dim": 20, "freq_dim": 16, "cross_attn_norm": True}
ORIGINAL = {
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_": "",
    "norm2": "norm3",
    "net.0.proj": "0",
    "net.2": "2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "proj_out": "head.head",
}
IN_BLOCK = [f"attn{i}.to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out.0")]
IN_BLOCK += ["ffn.net.0.proj", "ffn.net.2"]
BLOCKS = [f"blocks.{i}.{stem}" for i in range(2) for stem in IN_BLOCK]


def make_wan(seed: int = 0):
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(**SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model


def original(stem: str) -> str:
    for diffusers, wan in ORIGINAL.items():
        stem = stem.replace(diffusers, wan)
    return stem


def factors(wan, stems=BLOCKS, rank: int = 4, seed: int = 1) -> dict[str, tuple]:
    """stem -> (down [rank, inputs], up [outputs, rank])."""
    g, found = torch.Generator().manual_seed(seed), {}
    for stem in stems:
        N, *M = wan.get_parameter(f"{stem}.weight").shape
        down, up = torch.randn(rank, *M, generator=g), torch.randn(N, rank, generator=g)
        found[stem] = 0.3 * down, 0.3 * (up if len(M) == 1 else up[:, :, None, None, None])
    return found


def keys(stem: str, prefix: str, down: str, up: str, flat: bool, wan_names: bool) -> list[str]:
    stem = original(stem) if wan_names else stem
    stem = prefix + (stem.replace(".", "_") if flat else stem)
    return [f"{stem}.{down}.weight", f"{stem}.{up}.weight", f"{stem}.alpha"]


KOHYA = "lora_down", "lora_up", True, True
PEFT = "lora_A", "lora_B", False, False
WAN = "lora_A", "lora_B", False, True
SPELLINGS = {  # prefix, ends, underscores, names of the Wan2.1 release
    "kohya": ("lora_unet_", *KOHYA),
    "kohya-fun": ("lora_unet__", *KOHYA),
    "lycoris": ("lycoris_", *KOHYA),
    "comfyui": ("diffusion_model.", *WAN),
    "comfyui-long": ("model.diffusion_model.", *WAN),
    "lightx2v": ("diffusion_model.", "lora_down", "lora_up", False, True),
    "diffsynth": ("pipe.dit.", "lora_A.default", "lora_B.default", False, True),
    "bare": ("", "lora_A.default", "lora_B.default", False, True),
    "diffusers": ("transformer.", *PEFT),
    "peft": ("base_model.model.", *PEFT),
    "peft-in-diffusers": ("base_model.model.transformer.", *PEFT),
    "flat-diffusers": ("lora_unet_", "lora_down", "lora_up", True, False),
}


def tensors(pairs: dict[str, tuple], spelling: str, alpha: float | None = None) -> dict:
    found = {}
    for stem, pair in pairs.items():
        names = keys(stem, *SPELLINGS[spelling])
        found |= dict(zip(names, pair, strict=False))
        if alpha is not None:
            found[names[2]] = torch.tensor(alpha)
    return {name: tensor.clone() for name, tensor in found.items()}


def diffs(wan, prefix: str = "diffusion_model.", seed: int = 2) -> dict[str, torch.Tensor]:
    """What repacks of Wan hold beside products: norms, biases, modulation, the patch embedding."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name, parameter in wan.named_parameters():
        stem, _, kind = name.rpartition(".")
        value = 0.1 * torch.randn(parameter.shape, generator=g)
        if kind == "scale_shift_table":
            found[f"{prefix}{stem or 'head'}.diff_m"] = value
        elif "norm" in stem or "patch" in stem or stem == "proj_out" or kind == "bias":
            end = "diff" if kind == "weight" else "diff_b"
            found[f"{prefix}{original(stem)}.{end}"] = value
    return found


def write(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"format": "pt"} | (metadata or {}))
    return path


def write_peft(path: Path, tensors: dict, **config) -> Path:
    """A folder as PEFT's save_pretrained leaves it."""
    write(path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4} | config
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
