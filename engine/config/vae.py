"""What a folder says of its VAE, and what the engine takes for given of one."""

from dataclasses import dataclass
from typing import ClassVar

from engine.config.fields import COUNT, NOT_NEGATIVE, SIZE, Range, check_fields
from engine.errors import UsageError

CHANNELS, CHUNK, SIDE = 16, 4, 8  # of a latent; its frames after the first, pixels of its sides


@dataclass(frozen=True)
class VAEConfig:
    """The fields of a folder's config.json that the VAE reads, by diffusers' names.

    Errors: UsageError for a VAE of another kind.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("base_dim", "decoder_base_dim"), Range(1, 2**16)),
        "z_dim": SIZE,
        **dict.fromkeys(("dim_mult", "num_res_blocks"), Range(1, 64)),
        **dict.fromkeys(("in_channels", "out_channels"), SIZE),
        "patch_size": Range(1, SIDE),
        "latents_mean": Range(-1000, 1000),
        "latents_std": Range(1e-6, 1000),
        **dict.fromkeys(("scale_factor_spatial", "scale_factor_temporal"), COUNT),
        "attn_scales": NOT_NEGATIVE,
    }
    CHOICES: ClassVar = {"_class_name": ("AutoencoderKLWan",)}

    base_dim: int
    z_dim: int
    dim_mult: list[int]
    num_res_blocks: int
    temperal_downsample: list[bool]
    latents_mean: list[float]
    latents_std: list[float]
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    decoder_base_dim: int | None = None
    scale_factor_spatial: int = SIDE
    scale_factor_temporal: int = CHUNK
    is_residual: bool = False
    attn_scales: list[float] | None = None
    _class_name: str = "AutoencoderKLWan"

    def __post_init__(self):
        check_fields(self, "vae")
        levels, halvings = len(self.dim_mult), len(self.temperal_downsample)
        frames = 2 ** sum(self.temperal_downsample)
        scales = self.scale_factor_temporal, self.scale_factor_spatial
        widths = self.z_dim, len(self.latents_mean), len(self.latents_std)
        pixels = 3 * self.patch**2

        checks = {
            "is_residual": not self.is_residual,
            f"attn_scales {self.attn_scales}": not self.attn_scales,
            f"{levels} of dim_mult with patch_size {self.patch}": 2**levels * self.patch
            == 2 * SIDE,
            f"{halvings} of temperal_downsample": frames == CHUNK and halvings == levels - 1,
            f"scale_factor_temporal and scale_factor_spatial {scales}": scales == (CHUNK, SIDE),
            f"z_dim, latents_mean and latents_std of {widths} channels": set(widths) == {CHANNELS},
            f"in_channels {self.in_channels}": self.in_channels == pixels,
            f"out_channels {self.out_channels}": self.out_channels == pixels,
        }
        wrong = [got for got, holds in checks.items() if not holds]
        if wrong:
            raise UsageError(
                "vae: it must be an AutoencoderKLWan without is_residual and attn_scales, whose "
                f"latents are {CHANNELS} channels of {CHUNK} frames and {SIDE} x {SIDE} pixels; "
                f"got {wrong[0]}. Use the VAE of Wan 2.1."
            )

    @property
    def patch(self) -> int:
        """P."""
        return self.patch_size or 1
