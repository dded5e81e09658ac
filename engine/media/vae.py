"""The VAE around the network: pixels to latents in the model's latent space, and back.

Legend: B samples, N frames, H,W pixels, F,Y,X latents (F = (N-1)/4 + 1, Y = H/8, X = W/8).
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.errors import ModelFileError, go_on
from engine.media.autoencoder import WanVAE
from engine.media.load_part import load_part
from univigu_kernels import Once


def load_vae(
    path: Path,
    device,
    dtype: torch.dtype,
    tiling: bool,
    kernels: str = "auto",
    once: Once | None = None,
) -> WanVAE:
    """`path`/vae in `dtype`, frozen.

    tiling: it works on 256 x 256 pixels at a time.
    kernels, once: as in `univigu_kernels.bind`.

    Errors: ModelFileError.
    """
    if not (path / "vae" / "config.json").is_file():
        raise ModelFileError(
            f"pipeline: {path} must hold vae/config.json; got none. Give a pipeline folder."
        )
    vae = load_part(WanVAE, path / "vae", device, lambda name: dtype)
    vae.use_tiling = tiling
    vae.choose(kernels, once)
    return vae


def latent_scale(vae: WanVAE, latent_space: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [1,16,1,1,1] of the VAE's latents, where the model's latent space
    is "normalized"; else 0 and 1."""
    normalized = latent_space == "normalized"
    mean, std = vae.config.latents_mean, vae.config.latents_std
    shape = (1, -1, 1, 1, 1)
    return (
        torch.tensor(mean if normalized else 0.0, device=vae.device).view(shape),
        torch.tensor(std if normalized else 1.0, device=vae.device).view(shape),
    )


def encode(
    vae: WanVAE,
    chunks: Iterable[Tensor],
    mean: Tensor,
    std: Tensor,
    check: Callable[[], None] = go_on,
) -> Tensor:
    """Frames uint8 [B,3,n,H,W] in turn -> latents fp32 [B,16,F,Y,X], the posterior's mode. Frames
    become floats a chunk at a time. chunks, check: as of `WanVAE.encode_chunks`."""
    pixels = ((chunk.to(mean.device).float() / 127.5 - 1).to(vae.dtype) for chunk in chunks)
    return (vae.encode_chunks(pixels, check).float() - mean) / std


def decode_chunks(
    vae: WanVAE,
    latents: Tensor,
    mean: Tensor,
    std: Tensor,
    check: Callable[[], None] = go_on,
) -> Iterator[Tensor]:
    """Latents [B,16,F,Y,X] -> pixels fp32 [B,3,n,H,W] from -1 to 1, a chunk at a time: as
    `WanVAE.decode_chunks`."""
    latents = (latents.float() * std + mean).to(vae.dtype)
    return (chunk.float() for chunk in vae.decode_chunks(latents, check))
