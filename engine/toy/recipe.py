"""How the embedded model's VAE and text encoder were made from the synthetic set. Library models,
our data and loop."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from engine.errors import require
from engine.files.hashes import write_manifest
from engine.files.writing import replacing
from engine.toy.scenes import (
    FPS,
    FRAMES,
    MOTIONS,
    SIZE,
    STARTS,
    TRAVEL,
    draw_scenes,
    render,
    words,
)

VAE = {
    "base_dim": 16,
    "z_dim": 16,
    "dim_mult": [1, 2, 3],
    "num_res_blocks": 1,
    "attn_scales": [],
    "temperal_downsample": [True, True],
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
}
PIPELINE = {
    "latent_space": "normalized",
    "context_rows": 16,
    "text_rows": 16,
    "num_frames": FRAMES,
    "height": SIZE,
    "width": SIZE,
    "fps": FPS,
}
LATENT_NOISE = 0.05  # standard deviation of the posterior that the decoder is trained with


def clips(count: int, seed: int) -> Tensor:
    """Rendered scenes, fp32 [count, 3, FRAMES, 64, 64] in [-1, 1]."""
    frames = torch.from_numpy(render(draw_scenes(count, seed, held_out=False, jitter=True)))
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))


def crops(count: int, seed: int) -> Tensor:
    """32 x 32 windows that hold the shapes of `clips` at mid-time: a quarter of the pixels, with
    all the outline."""
    rng = np.random.default_rng(seed)
    out = torch.empty(count, 3, FRAMES, 32, 32)
    scenes = draw_scenes(count, seed, held_out=False, jitter=True)
    for target, scene, clip in zip(out, scenes, clips(count, seed), strict=True):
        centre = np.add(STARTS[scene.start], np.multiply(MOTIONS[scene.motion], TRAVEL / 2))
        x, y = (centre - 16 + rng.uniform(-8, 8, 2)).clip(0, SIZE - 32).astype(int)
        target.copy_(clip[:, :, y : y + 32, x : x + 32])
    return out


def train_vae(path: Path, steps: int = 2300, batch: int = 8, lr: float = 1.5e-3, seed: int = 0):
    """Trains a small `AutoencoderKLWan` and saves it in fp16 with its latents' mean and deviation.

    The last tenth of the steps sees whole clips instead of `crops`. Kaiming initialisation decides:
    in 80 steps on one batch torch's own reaches 17 dB, this one 22 dB. The posterior's width is
    held at `LATENT_NOISE`. About 12 minutes on 2 cores.
    """
    torch.manual_seed(seed)
    vae = require("diffusers", "bench").AutoencoderKLWan(**VAE)
    for module in vae.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)

    optimizer = torch.optim.AdamW(vae.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine(i, steps, warmup=50))
    bar = tqdm(range(steps), desc="vae", mininterval=5)
    for step in bar:
        drawn = seed * 1_000_003 + step
        x = crops(batch, drawn) if step < 0.9 * steps else clips(batch // 2, drawn)
        posterior = vae.encode(x).latent_dist
        latents = posterior.mean + LATENT_NOISE * torch.randn_like(posterior.mean)
        decoded = vae.decode(latents).sample
        width = (posterior.logvar - 2 * math.log(LATENT_NOISE)).square().mean()
        error = F.mse_loss(decoded, x)
        loss = error + 0.1 * F.l1_loss(decoded, x) + 1e-4 * (posterior.mean.square().mean() + width)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{-10 * math.log10(error.item() / 4):.1f} dB")
    vae.eval()
    with torch.no_grad():
        z = torch.cat([vae.encode(c).latent_dist.mode() for c in clips(512, seed + 1).split(32)])
    vae.register_to_config(
        latents_mean=[round(v, 4) for v in z.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 4) for v in z.std((0, 2, 3, 4)).tolist()],
    )
    vae.half().save_pretrained(path / "vae")
    with replacing(path / "pipeline.json") as partial:
        partial.write_text(json.dumps(PIPELINE, indent=2) + "\n")
    for folder in (path / "vae", path):
        write_manifest(folder)


def train_text_encoder(
    path: Path, steps: int = 1500, batch: int = 64, lr: float = 2e-3, seed: int = 0
):
    """Trains a small `UMT5EncoderModel` on prompts and captions of the set and saves it with its
    word tokenizer, fp16.

    Objective: recover every word where 30% are hidden by <unk>, through the tied embedding. About a
    minute.
    """
    transformers = require("transformers", "bench")
    from engine.media import build_word_tokenizer, save_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_word_tokenizer(words())
    tokenizer.enable_padding()
    config = transformers.UMT5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=64,
        d_kv=16,
        num_heads=4,
        d_ff=128,
        num_layers=2,
        dropout_rate=0.0,
    )
    encoder = transformers.UMT5EncoderModel(config)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: cosine(i, steps, warmup=50))
    bar = tqdm(range(steps), desc="text encoder", mininterval=5)
    for step in bar:
        scenes = draw_scenes(batch, seed * 1_000_003 + step, held_out=False)
        texts = [s.prompt for s in scenes[: batch // 2]] + [s.caption for s in scenes[batch // 2 :]]
        found = tokenizer.encode_batch(texts)
        ids = torch.tensor([text.ids for text in found])
        mask = torch.tensor([text.attention_mask for text in found]).bool()
        hidden = torch.rand(ids.shape) < 0.3
        masked = ids.masked_fill(hidden, tokenizer.token_to_id("<unk>"))
        features = encoder(masked, attention_mask=mask).last_hidden_state
        logits = features @ encoder.shared.weight.T / 8
        loss = F.cross_entropy(logits[mask], ids[mask])
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    encoder.half().save_pretrained(path / "text_encoder")
    save_tokenizer(tokenizer, path / "tokenizer")
    for folder in (path / "text_encoder", path / "tokenizer"):
        write_manifest(folder)
