"""Wan 2.1's VAE, for inference: a causal video autoencoder with the parameters' names and the
numbers of diffusers' `AutoencoderKLWan`.

It is written out because importing diffusers for this one class takes longer than a short run, and
because that class keeps a call's state on itself: two threads that share one get wrong pictures.
Frames go through in chunks, the first alone and then four at a time: every causal convolution
leaves the end of its input in `past`, which belongs to one call, so chunks give what the whole clip
would.

Legend: B samples, C channels, N frames, H,W pixels, F,Y,X latents, P pixels of one patch side.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import SIDE, VAEConfig, read_fields
from engine.errors import go_on
from engine.media.tiles import (
    TILE,
    TILE_STRIDE,
    in_tiles,
    patchify,
    split_frames,
    unpatchify,
)
from univigu_kernels import PIXELS, Once, bind_op
from univigu_kernels.rms_norm_silu import rms_norm_silu_eager

Past = dict[nn.Module, Tensor]
# Of one small clip torch itself makes a matrix of every convolution's inputs, which takes 2 to 5
# times as long: 16 channels of 6 frames of 64 x 64 took 22.7 ms on one core, and 4.2 by oneDNN.
ONEDNN = torch.backends.mkldnn.is_available()
ONES = (1, 1, 1), (1, 1, 1)  # stride and dilation


class CausalConv3d(nn.Conv3d):
    """A convolution that sees its own frame and the two before it; before the first are zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        known = torch.cat([past[self], x], 2) if self in past else x
        past[self] = known[:, :, -2:].clone()
        before_first = 2 + x.shape[2] - known.shape[2]
        if before_first:
            known = F.pad(known, (0, 0, 0, 0, before_first, 0))
        direct = ONEDNN and self.kernel_size[1] > 1 and known.dtype == torch.float32
        if not direct or known.device.type != "cpu":
            return super().forward(known)
        return torch.mkldnn_convolution(known, self.weight, self.bias, self.padding, *ONES, 1)


class RMSNorm(nn.Module):
    """Scales the channels of images [B,C,H,W] to root mean square `gamma`."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * len(self.gamma) ** 0.5 * self.gamma


class NormSiLU(nn.Module):
    """An RMSNorm of the channels of videos [B,C,N,H,W], and the SiLU after it, by the kernel that
    `WanVAE.choose` chose."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.run = rms_norm_silu_eager

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.gamma.flatten())


class ResidualBlock(nn.Module):
    """Two causal convolutions beside a way around them."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.norm2 = NormSiLU(inputs), NormSiLU(outputs)
        self.conv1 = CausalConv3d(inputs, outputs, (3, 3, 3))
        self.conv2 = CausalConv3d(outputs, outputs, (3, 3, 3))
        self.conv_shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, past: Past) -> Tensor:
        h = self.conv1(self.norm1(x), past)
        h = self.norm2(h)
        return self.conv2(h, past).add_(self.conv_shortcut(x))


class AttentionBlock(nn.Module):
    """Attention of one head among the positions of each frame."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        images = to_images(x)
        qkv = self.to_qkv(self.norm(images)).flatten(2).transpose(1, 2).unsqueeze(1).contiguous()
        found = F.scaled_dot_product_attention(*qkv.chunk(3, -1))
        found = self.proj(found.squeeze(1).transpose(1, 2).reshape(images.shape))
        return to_video(found, len(x)) + x


class MidBlock(nn.Module):
    """A residual block, attention, a residual block."""

    def __init__(self, channels: int):
        super().__init__()
        self.attentions = nn.ModuleList([AttentionBlock(channels)])
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels) for _ in range(2)])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.attentions[0](self.resnets[0](x, past))
        return self.resnets[1](x, past)


class Downsample(nn.Module):
    """Halves height and width and, with `time`, the frames after the first."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        self.resample = nn.Sequential(pad, conv)
        if time:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = to_video(self.resample(to_images(x)), len(x))
        if not hasattr(self, "time_conv"):
            return x
        last, past[self] = past.get(self), x[:, :, -1:].clone()
        return x if last is None else self.time_conv(torch.cat([last, x], 2))


class Upsample(nn.Module):
    """Doubles height and width, halves the channels and, with `time`, doubles the frames after the
    first."""

    def __init__(self, channels: int, time: bool):
        super().__init__()
        double = nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
        self.resample = nn.Sequential(double, nn.Conv2d(channels, channels // 2, 3, padding=1))
        if time:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if hasattr(self, "time_conv"):
            if self in past:  # the first frame is one alone, and no later frame sees it here
                halves = self.time_conv(x, past).unflatten(1, (2, -1))
                x = torch.stack(halves.unbind(1), 3).flatten(2, 3)
            past[self] = x.new_empty(0)
        return to_video(self.resample(to_images(x)), len(x))


class Encoder(nn.Module):
    """Patches of one chunk [B,CPP,n,H/P,W/P] to moments [B,2Z,1,Y,X]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(config.in_channels, widths[0], (3, 3, 3))
        self.down_blocks = nn.ModuleList()

        for level, (width, wider) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            for n in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(wider if n else width, wider))
            if level < len(config.dim_mult) - 1:
                self.down_blocks.append(Downsample(wider, config.temperal_downsample[level]))

        self.mid_block = MidBlock(widths[-1])
        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, (3, 3, 3))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.conv_in(x, past)
        for block in self.down_blocks:
            x = block(x, past)
        x = self.mid_block(x, past)
        return self.conv_out(self.norm_out(x), past)


class UpBlock(nn.Module):
    """Residual blocks, and an `Upsample` after them.

    count: of residual blocks.
    time: of the `Upsample`; None: there is none.
    """

    def __init__(self, inputs: int, outputs: int, count: int, time: bool | None):
        super().__init__()
        blocks = [ResidualBlock(outputs if n else inputs, outputs) for n in range(count)]
        self.resnets = nn.ModuleList(blocks)
        self.upsamplers = nn.ModuleList([] if time is None else [Upsample(outputs, time)])

    def forward(self, x: Tensor, past: Past) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x, past)
        return x


class Decoder(nn.Module):
    """One latent frame [B,Z,1,Y,X] to patches [B,CPP,n,H/P,W/P]: n = 1 of the first, then 4."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        base = config.decoder_base_dim or config.base_dim
        widths = [base * m for m in (config.dim_mult[-1], *config.dim_mult[::-1])]
        times = [*config.temperal_downsample[::-1], None]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], (3, 3, 3))
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()

        for level, (width, narrower) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            inputs = width // 2 if level else width  # the upsampling before halved them
            block = UpBlock(inputs, narrower, config.num_res_blocks + 1, times[level])
            self.up_blocks.append(block)

        self.norm_out = NormSiLU(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], config.out_channels, (3, 3, 3))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = self.mid_block(self.conv_in(x, past), past)
        for block in self.up_blocks:
            x = block(x, past)
        return self.conv_out(self.norm_out(x), past)


class WanVAE(nn.Module):
    """`encode` and `decode` between pixels and latents, whole or by chunks.

    A call leaves nothing on the module, so several threads may share one.

    config: the fields of the folder's config.json. Errors: ModelFileError for a VAE of another
        kind.
    use_tiling: larger pictures go through in tiles of 256 x 256 pixels, blended where they meet.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config, self.use_tiling = read_fields(VAEConfig, config), False
        channels = self.config.z_dim

        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)
        self.quant_conv = nn.Conv3d(2 * channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv3d(channels, channels, 1)

    @property
    def device(self) -> torch.device:
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    def choose(self, kernels: str = "auto", once: Once | None = None) -> None:
        """Takes the kernels for the device that it is in; without it, plain PyTorch. That stays in
        bf16: the reference, which else would run on most devices, computes in fp32 and takes more
        memory than bf16 saves (9 frames of 480 x 832: 4.7 GB against 3.6).

        kernels, once: as in `univigu_kernels.bind`.
        """
        if self.dtype != torch.float32:
            return
        case = {"C": self.config.decoder_base_dim or self.config.base_dim}
        run = bind_op("rms_norm_silu", kernels, self.device, self.dtype, PIXELS, case, once)
        for norm in (module for module in self.modules() if isinstance(module, NormSiLU)):
            norm.run = run

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B,Z,F,Y,X], the posterior's mean. Errors: UsageError.

        pixels: [B,3,N,H,W] from -1 to 1, of 4k+1 frames.
        """
        return self.encode_chunks(split_frames(pixels))

    def encode_chunks(self, chunks: Iterable[Tensor], check: Callable[[], None] = go_on) -> Tensor:
        """As `encode`, of pixels [B,3,n,H,W] in turn: the first frame alone, then four at a time.

        Each chunk is encoded before the next is asked for, but with tiling, which takes all first.

        check: called before each chunk, of each tile; what it raises ends the encoding.
        """
        patches = (patchify(chunk, self.config.patch) for chunk in chunks)
        if not self.use_tiling:
            return self._latents(patches, check)

        whole = torch.cat([*patches], 2)
        if max(whole.shape[-2:]) * self.config.patch <= TILE:
            return self._latents(split_frames(whole), check)

        def latents(tile: Tensor) -> Tensor:
            return self._latents(split_frames(tile), check)

        return in_tiles(whole, latents, TILE, TILE_STRIDE)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B,Z,F,Y,X] -> pixels [B,3,N,H,W] from -1 to 1."""
        return torch.cat([*self.decode_chunks(latents)], 2)

    def decode_chunks(self, latents: Tensor, check: Callable[[], None] = go_on) -> Iterator[Tensor]:
        """`decode`, in pieces [B,3,n,H,W], one of each latent frame: n = 1 of the first, then 4.

        Each is decoded when it is asked for. With tiling all tiles come before the first piece: a
        tile at a time holds one tile's past, where a frame at a time would hold those of all tiles.

        latents: [B,Z,F,Y,X].
        check: called before each latent frame, of each tile; what it raises ends the decoding.
        """
        if self.use_tiling and max(latents.shape[-2:]) > TILE // SIDE:

            def whole(tile: Tensor) -> Tensor:
                return torch.cat([*self._patches(tile, check)], 2)

            patches = split_frames(in_tiles(latents, whole, TILE // SIDE, TILE_STRIDE // SIDE))
        else:
            patches = self._patches(latents, check)
        for chunk in patches:
            yield unpatchify(chunk, self.config.patch).clamp(-1, 1)

    def _latents(self, chunks: Iterable[Tensor], check: Callable[[], None]) -> Tensor:
        past: Past = {}
        moments = []
        for chunk in chunks:
            check()
            moments.append(self.encoder(chunk, past))
        return self.quant_conv(torch.cat(moments, 2)).chunk(2, 1)[0]

    def _patches(self, latents: Tensor, check: Callable[[], None]) -> Iterator[Tensor]:
        past: Past = {}
        for frame in self.post_quant_conv(latents).split(1, 2):
            check()
            yield self.decoder(frame, past)


def to_images(x: Tensor) -> Tensor:
    """[B,C,N,H,W] -> [BN,C,H,W]."""
    return x.transpose(1, 2).flatten(0, 1)


def to_video(x: Tensor, batch: int) -> Tensor:
    """[BN,C,H,W] -> [B,C,N,H,W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
