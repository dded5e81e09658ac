"""What a model is: its architecture, and the presets."""

from dataclasses import dataclass
from typing import ClassVar

from engine.config.fields import LAYERS, SIZE, check_fields
from engine.errors import UsageError


@dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Uni-ViGU. Latent channels (16), patch (1, 2, 2) and eps are the same in all
    of them.

    heads: of attention.
    head_dim: channels of a head; the width D is heads * head_dim.
    layers: blocks.
    ffn_dim: hidden width of the feed-forward layers.
    text_dim: width of the text encoder's rows.
    freq_dim: sinusoids of the time embedding.
    vocab: tokens of the text stream without the mask id.
    mask_source: the text starts from mask ids, which add one row (index `vocab`) to both ends.
    video_sees_text: False hides text keys from video queries, which makes the cached v2t exact.
    text_flow: "discrete" (token ids in, logits out) or "embedding" (vectors in, text velocity out).

    Errors: UsageError.
    """

    RANGES: ClassVar = {
        **dict.fromkeys(("heads", "head_dim", "ffn_dim", "text_dim", "freq_dim", "vocab"), SIZE),
        "layers": LAYERS,
    }
    CHOICES: ClassVar = {"text_flow": ("discrete", "embedding")}

    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    freq_dim: int
    vocab: int
    mask_source: bool = False
    video_sees_text: bool = True
    text_flow: str = "discrete"

    def __post_init__(self):
        check_fields(self, "model")
        if self.head_dim % 2 or self.freq_dim % 2:
            got = f"head_dim {self.head_dim}, freq_dim {self.freq_dim}"
            raise UsageError(f"model: head_dim and freq_dim must be even; got {got}.")
        if self.text_flow == "embedding" and self.mask_source:
            raise UsageError(
                "model: mask_source must be False with text_flow=embedding; its source is Gaussian."
            )

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def case(self) -> dict[str, int]:
        """Width, heads, head_dim and hidden width, by the letters that `univigu_kernels.bind`
        takes; rows come from what is to be run."""
        return {"D": self.dim, "H": self.heads, "K": self.head_dim, "F": self.ffn_dim}

    @property
    def vocab_rows(self) -> int:
        return self.vocab + self.mask_source

    @classmethod
    def preset(cls, name: str) -> "ModelConfig":
        if name not in PRESETS:
            raise UsageError(f"model: preset must be one of {', '.join(PRESETS)}; got {name!r}.")
        return PRESETS[name]


PRESETS = {
    "tiny": ModelConfig(
        heads=3, head_dim=64, layers=4, ffn_dim=512, text_dim=64, freq_dim=64, vocab=37
    ),
    "tiny-embedding": ModelConfig(
        heads=2,
        head_dim=40,
        layers=4,
        ffn_dim=192,
        text_dim=64,
        freq_dim=64,
        vocab=37,
        text_flow="embedding",
    ),
    "wan2.1-1.3b": ModelConfig(
        heads=12, head_dim=128, layers=30, ffn_dim=8960, text_dim=4096, freq_dim=256, vocab=256384
    ),
    "wan2.1-14b": ModelConfig(
        heads=40, head_dim=128, layers=40, ffn_dim=13824, text_dim=4096, freq_dim=256, vocab=256384
    ),
}
