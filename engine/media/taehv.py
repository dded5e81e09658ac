"""TAEHV: a tiny decoder for the latents of Wan 2.1, far cheaper than the VAE's and coarser.

Its weights are `taew2_1` of github.com/madebyollin/taehv, and so are the parameters' names; only
the decoder is read. It takes latents as a diffusion model makes them, normalized, and gives four
frames for each, of which the first latent's three first are no frames of the clip.

Legend: B samples, N frames, C channels, H,W pixels, F,Y,X latents.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import go_on
from engine.media.autoencoder import Past

WIDTHS, TIMES = (256, 128, 64, 64), (1, 2, 2)  # of the levels; frames that a level makes of one
LATENT_FRAMES = 4


def conv3x3(inputs: int, outputs: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


class Squash(nn.Module):
    """Latents to -3 .. 3, smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that sees the frame before; before the first are zeros."""

    def __init__(self, channels: int):
        super().__init__()
        first, second, third = (conv3x3(n * channels, channels) for n in (2, 1, 1))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)

    def forward(self, x: Tensor, batch: int, past: Past) -> Tensor:
        """x: [BN,C,H,W], the N frames of a sample beside each other."""
        frames = x.unflatten(0, (batch, -1))
        before = past.get(self, torch.zeros_like(frames[:, :1]))
        past[self] = frames[:, -1:].clone()
        before = torch.cat([before, frames[:, :-1]], 1).flatten(0, 1)
        return F.relu(self.conv(torch.cat([x, before], 1)).add_(x))


class Grow(nn.Module):
    """Makes `times` frames of each."""

    def __init__(self, channels: int, times: int):
        super().__init__()
        self.times, self.conv = times, nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.times, -1)).flatten(0, 1)


class TinyDecoder(nn.Module):
    """`decode_chunks`, as of `WanVAE`. A call leaves nothing on the module. name: of its file."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name
        layers = [Squash(), conv3x3(16, WIDTHS[0]), nn.ReLU()]
        for width, narrower, times in zip(WIDTHS[:-1], WIDTHS[1:], TIMES, strict=True):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), Grow(width, times)]
            layers.append(conv3x3(width, narrower, bias=False))
        self.decoder = nn.Sequential(*layers, nn.ReLU(), conv3x3(WIDTHS[-1], 3))

    def decode_chunks(self, latents: Tensor, check: Callable[[], None] = go_on) -> Iterator[Tensor]:
        """Pixels [B,3,n,H,W] from -1 to 1, one piece of each latent frame: n = 1 of the first, then
        4. Each is decoded when it is asked for.

        latents: [B,16,F,Y,X], normalized.
        check: called before each latent frame; what it raises ends the decoding.
        """
        batch, past, unseen = len(latents), {}, LATENT_FRAMES - 1
        for x in latents.unbind(2):
            check()
            for layer in self.decoder:
                x = layer(x, batch, past) if isinstance(layer, MemoryBlock) else layer(x)
            frames = x.unflatten(0, (batch, -1)).transpose(1, 2)
            yield frames[:, :, unseen:].clamp(0, 1) * 2 - 1
            unseen = 0
