"""The VAE around the network, a diffusers `AutoencoderKLWan` in fp32: pixels to latents in the
model's latent space, and back.

Legend: B samples, N frames, H,W pixels, F,Y,X latents (F = (N-1)/4 + 1, Y = H/8, X = W/8).
"""

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import MissingPackage, ModelFileError


def load_vae(path: Path, device, tiling: bool):
    """`path`/vae, frozen. tiling: it works on 256 x 256 pixels at a time. Errors: ModelFileError,
    MissingPackage."""
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise MissingPackage(
            f"pipeline: diffusers must be installed; got {error}. Install the extra models."
        ) from error
    if not (path / "vae" / "config.json").is_file():
        raise ModelFileError(
            f"pipeline: {path} must hold vae/config.json; got none. Give a pipeline folder."
        )
    try:
        vae = AutoencoderKLWan.from_pretrained(
            path / "vae",
            torch_dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,  # else a note on stderr where accelerate is not installed
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelFileError(
            f"pipeline: {path / 'vae'} must hold an AutoencoderKLWan; got {error}."
        ) from None
    if tiling:
        vae.enable_tiling()
    return vae.to(device).eval().requires_grad_(False)


def latent_scale(vae, latent_space: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1,16,1,1,1] of the VAE's latents, where the model's latent space
    is "normalized"; else 0 and 1."""
    device = next(vae.parameters()).device
    normalized = latent_space == "normalized"
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shape = (1, -1, 1, 1, 1)
    return (
        torch.tensor(mean if normalized else 0.0, device=device).view(shape),
        torch.tensor(std if normalized else 1.0, device=device).view(shape),
    )


def encode(vae, frames: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B,N,H,W,3] -> latents fp32 [B,16,F,Y,X], the posterior's mode."""
    pixels = frames.to(mean.device).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return (vae.encode(pixels).latent_dist.mode() - mean) / std


def decode(vae, latents: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """latents [B,16,F,Y,X] -> pixels fp32 [B,3,N,H,W], about -1 to 1."""
    return vae.decode(latents.float() * std + mean).sample
