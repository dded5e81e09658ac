"""What is damaged: a folder or file of every kind that the engine reads, and how it is read.

A subject's `load` returns a digest of all that the engine takes from it: numbers and settings. Two
equal digests are two equal loads, bit for bit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from checkpoint_runs import loaded, make_shard, save_two
from safetensors.torch import load_file, save_file
from video_files import moving
from weights_made import CFG as SMALL
from weights_made import make_model

from engine import Pipeline, load_model
from engine.checkpoint.state import _tensors
from engine.config import EMBEDDED
from engine.data import LatentSet, verify_shard
from engine.data.shard import RANKS, data_hash
from engine.files import check_hashes, write_manifest
from engine.media import read_video, write_video
from engine.weights import convert, save_pretrained
from engine.weights.adapters import read_adapter

CFG = replace(SMALL, vocab=40)  # as many words as the tokens of make_shard


@dataclass(frozen=True)
class Subject:
    """A kind of input.

    load: path -> digest.
    verified: the same with hashes checked; None where nothing holds hashes of it.
    earlier: what a damaged one may be read as; None: nothing but itself.
    files: patterns of the files that are damaged.
    """

    path: Path
    load: Callable[[Path], str]
    verified: Callable[[Path], str] | None = None
    earlier: Path | None = None
    files: tuple[str, ...] = ("*",)

    def victims(self, path: Path) -> list[Path]:
        """The files below `path` that may be damaged, sorted."""
        if path.is_file():
            return [path]
        found = {file for pattern in self.files for file in path.rglob(pattern) if file.is_file()}
        return sorted(found)


def digest(*parts) -> str:
    """A hash of tensors by name, and of anything that is JSON."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, dict) and all(isinstance(x, torch.Tensor) for x in part.values()):
            for name in sorted(part):
                x = part[name].detach().contiguous().reshape(-1)
                found.update(f"{name} {x.dtype} {list(part[name].shape)} ".encode())
                found.update(memoryview(x.view(torch.uint8).numpy()))
        else:
            found.update(json.dumps(part, sort_keys=True, default=str).encode())
    return found.hexdigest()


def of_model(path: Path, **options) -> str:
    model = load_model(path, **options)
    return digest(model.state_dict(), asdict(model.cfg))


def of_file(path: Path, name: str, **options) -> str:
    """A model in one file of a folder, beside its hashes."""
    return of_model(path / name, **options)


def of_pipeline(path: Path, **options) -> str:
    pipe = Pipeline.from_pretrained(path, "cpu", **options)
    parts = (pipe.model, pipe.vae, pipe.text.encoder)
    said = asdict(pipe.config), asdict(pipe.model.cfg), asdict(pipe.index), pipe.vae.config
    states = [part.state_dict() for part in parts]
    return digest(*states, said, pipe.text.encoder.config, pipe.tokenizer.to_str())


def of_checkpoint(path: Path) -> str:
    state = loaded(path)
    return digest(_tensors(state), state.step)


def of_shard(path: Path, verify: bool = False) -> str:
    if verify:
        verify_shard(path)
    shard = LatentSet(path)
    batches = [shard.batch(torch.tensor([i])) for i in range(len(shard))]
    return digest(*batches, len(shard), shard.made_with)


def of_adapter(path: Path, shapes: dict, verify: bool = False) -> str:
    if verify:
        check_hashes([path])
    adapter = read_adapter(path, shapes)
    parts = {}
    for name, delta in adapter.deltas.items():
        parts |= {f"{name}.{k}": getattr(delta, k) for k in ("down", "up", "diff")}
    factors = {name: delta.factor for name, delta in adapter.deltas.items()}
    return digest({name: x for name, x in parts.items() if x is not None}, factors)


def of_video(path: Path) -> str:
    video = read_video(path)
    return digest({"frames": torch.from_numpy(np.ascontiguousarray(video.frames))}, video.fps)


DIFFUSERS = {  # our name of a piece -> diffusers'
    "cond_text_embedder": "condition_embedder.text_embedder",
    "time_embedding_v.": "condition_embedder.",
    "video_head.": "",
    "scale_shift_table_v": "scale_shift_table",
}
TEXT_BRANCH = (
    "time_embedding_t",
    "scale_shift_table_t",
    "text_head",
    "vocab_embed",
    "rotary_emb_text",
)
WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 20,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "cross_attn_norm": True,
}


def diffusers_folder(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A Wan transformer as diffusers writes it, in two shards."""
    found = {}
    for name, tensor in tensors.items():
        if "ffn_t." in name or name.startswith(TEXT_BRANCH):
            continue
        for ours, theirs in DIFFUSERS.items():
            name = name.replace(ours, theirs)
        found[name] = tensor

    path.mkdir()
    (path / "config.json").write_text(json.dumps(WAN, indent=2))
    stem, places = "diffusion_pytorch_model", {}
    for half in (0, 1):
        file = f"{stem}-0000{half + 1}-of-00002.safetensors"
        part = dict(list(found.items())[half::2])
        save_file(part, path / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": places}
    (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def make_adapter(folder: Path, shapes: dict) -> None:
    """A PEFT folder with a product for each attention matrix."""
    g, found = torch.Generator().manual_seed(1), {}
    for name, shape in shapes.items():
        stem = name.removesuffix(".weight")
        if ".attn" in name and name.endswith(".weight") and len(shape) == 2:
            key = f"base_model.model.{stem}"
            found[f"{key}.lora_A.weight"] = torch.randn(4, shape[1], generator=g)
            found[f"{key}.lora_B.weight"] = torch.randn(shape[0], 4, generator=g)
    folder.mkdir()
    save_file(found, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def make(root: Path) -> dict[str, Subject]:
    """Writes all subjects below `root`."""
    torch.manual_seed(0)
    model = make_model(CFG)
    save_pretrained(model, root / "ours")
    save_pretrained(model, root / "sharded", max_shard_bytes=40_000)
    convert(root / "ours", root / "fp8", precision="fp8")
    stock = load_file(root / "ours" / "model.safetensors")
    for name in ("safetensors", "torch"):
        (root / name).mkdir()
    shutil.copy(root / "ours" / "model.safetensors", root / "safetensors" / "m.safetensors")
    torch.save({"model": stock}, root / "torch" / "m.pth")
    diffusers_folder(root / "diffusers", stock)
    shutil.copytree(EMBEDDED, root / "pipeline")
    shard = root / "shard.safetensors"
    save_two(root / "checkpoint", make_shard(shard))
    shutil.copytree(root / "checkpoint", root / "earlier")
    shutil.rmtree(root / "earlier" / "step-00000002")

    tensors = load_file(shard)
    held = ((n, tensors[n].dtype, tuple(tensors[n].shape), [tensors[n]]) for n in RANKS)
    latents, info = root / "latents.safetensors", json.dumps({"sha256": data_hash(held)})
    save_file(tensors, latents, {"info": info})
    shapes = {name: tuple(tensor.shape) for name, tensor in stock.items()}
    make_adapter(root / "adapter", shapes)
    write_video(root / "video.mp4", moving(), 8)

    def hashed(name: str, load: Callable, **options) -> Subject:
        if not (root / name / "sha256.json").exists():
            write_manifest(root / name)
        return Subject(root / name, load, partial(load, verify=True), **options)

    return {
        "our folder": hashed("ours", of_model),
        "our folder in shards": hashed("sharded", of_model),
        "fp8 folder": hashed("fp8", of_model),
        "diffusers folder": hashed("diffusers", of_model),
        "safetensors file": hashed("safetensors", partial(of_file, name="m.safetensors")),
        "torch file": hashed("torch", partial(of_file, name="m.pth")),
        "pipeline folder": hashed("pipeline", of_pipeline),
        "JSON of a pipeline": hashed("pipeline", of_pipeline, files=("*.json",)),
        "training checkpoint": Subject(
            root / "checkpoint", of_checkpoint, earlier=root / "earlier"
        ),
        "latent shard": Subject(latents, of_shard, partial(of_shard, verify=True)),
        "adapter": hashed("adapter", partial(of_adapter, shapes=shapes)),
        "video": Subject(root / "video.mp4", of_video),
    }
