"""The encoder of umT5, for inference: T5's, with relative positions of its own in every layer.

It is written out because importing transformers' model classes takes longer than a short run.

Shape suffixes: B prompts, L tokens, H heads, D width of a head, E width of the encoder.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import LAYERS, NOT_NEGATIVE, SIZE, Range, check_fields, read_fields
from engine.errors import UsageError, go_on

STORED = (  # (piece of a parameter's name here, piece in transformers' files)
    ("embedding.", "shared."),
    ("blocks.", "encoder.block."),
    ("attention_norm.", "layer.0.layer_norm."),
    ("attention.", "layer.0.SelfAttention."),
    ("bias.", "relative_attention_bias."),
    ("ffn_norm.", "layer.1.layer_norm."),
    ("ffn.", "layer.1.DenseReluDense."),
    ("final_norm.", "encoder.final_layer_norm."),
)


@dataclass(frozen=True)
class UMT5Config:
    """The fields of a folder's config.json that the encoder reads, by transformers' names.

    pad_token_id, eos_token_id: where they are said, those of the tokenizer too.

    Errors: UsageError.
    """

    SIZES: ClassVar = "vocab_size", "d_model", "d_kv", "d_ff", "num_heads"
    RANGES: ClassVar = {
        **dict.fromkeys(SIZES, SIZE),
        "num_layers": LAYERS,
        "relative_attention_num_buckets": Range(4, 2**16),
        "relative_attention_max_distance": SIZE,
        "layer_norm_epsilon": Range(0, 0.01, above=True),
        **dict.fromkeys(("pad_token_id", "eos_token_id"), NOT_NEGATIVE),
    }
    CHOICES: ClassVar = {
        "model_type": ("umt5",),
        "feed_forward_proj": ("gated-gelu",),
        "dense_act_fn": ("gelu_new",),
    }

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_heads: int
    num_layers: int
    model_type: str
    feed_forward_proj: str = "gated-gelu"
    dense_act_fn: str = "gelu_new"
    is_gated_act: bool = True
    is_decoder: bool = False
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self):
        check_fields(self, "text_encoder")
        if not self.is_gated_act or self.is_decoder:
            raise UsageError(
                "text_encoder: is_gated_act must be True and is_decoder False; got "
                f"{self.is_gated_act} and {self.is_decoder}. Use the text encoder of Wan."
            )
        nearest = self.relative_attention_num_buckets // 4
        if self.relative_attention_max_distance <= nearest:
            raise UsageError(
                "text_encoder: relative_attention_max_distance must be more than a quarter of "
                f"relative_attention_num_buckets; got {self.relative_attention_max_distance}."
            )


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding without numbers. nn.Embedding draws them, which on the meta device brings
    torch._dynamo in: as slow as loading all the rest."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width))


class RMSNorm(nn.Module):
    """Scales rows to root mean square `weight`; in fp32, rounded to the weight's dtype."""

    def __init__(self, cfg: UMT5Config):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(cfg.d_model)), cfg.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        variance = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)


class Attention(nn.Module):
    """Attention without a scale, whose scores have a learnt bias for each distance."""

    def __init__(self, cfg: UMT5Config):
        super().__init__()
        self.heads, inner = cfg.num_heads, cfg.num_heads * cfg.d_kv
        self.buckets = cfg.relative_attention_num_buckets
        self.farthest = cfg.relative_attention_max_distance
        self.q, self.k, self.v = (nn.Linear(cfg.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.d_model, bias=False)
        self.bias = table(self.buckets, self.heads)

    def forward(self, x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        q_BHLD, k_BHLD, v_BHLD = (
            part(x_BLE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        bias_HLL = self.bias(self.bucket_of(x_BLE.shape[1])).permute(2, 0, 1)

        scores_BHLL = q_BHLD @ k_BHLD.transpose(2, 3) + bias_HLL
        scores_BHLL = scores_BHLL.masked_fill(~mask_BL[:, None, None], -math.inf)
        return self.o((scores_BHLL.softmax(-1) @ v_BHLD).transpose(1, 2).flatten(2))

    def bucket_of(self, length: int) -> Tensor:
        """Buckets int64 [L,L] of key - query: half of them for later keys; in each half one for
        every short distance, and then logarithmically wider ones."""
        at = torch.arange(length, device=self.bias.weight.device)
        offset = at[None] - at[:, None]
        half, distance = self.buckets // 2, offset.abs()
        exact = half // 2
        far = torch.log(distance.float() / exact) / math.log(self.farthest / exact)
        far = (exact + (far * (half - exact)).long()).clamp(max=half - 1)
        return half * (offset > 0) + torch.where(distance < exact, distance, far)


class FeedForward(nn.Module):
    """A gated GELU. The product with `wo` runs in the dtype of its weight: fp32 in fp16."""

    def __init__(self, cfg: UMT5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(cfg.d_model, cfg.d_ff, bias=False) for _ in range(2))
        self.wo = nn.Linear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)
        return self.wo(h.to(self.wo.weight.dtype))


class Block(nn.Module):
    def __init__(self, cfg: UMT5Config):
        super().__init__()
        self.attention_norm, self.ffn_norm = RMSNorm(cfg), RMSNorm(cfg)
        self.attention, self.ffn = Attention(cfg), FeedForward(cfg)

    def forward(self, x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLE = x_BLE + self.attention(self.attention_norm(x_BLE), mask_BL)
        return x_BLE + self.ffn(self.ffn_norm(x_BLE))


class UMT5Encoder(nn.Module):
    """Token ids to features, with the numbers of transformers' `UMT5EncoderModel`.

    config: the fields of the folder's config.json. Errors: ModelFileError for another
        encoder.
    """

    def __init__(self, config: dict):
        super().__init__()
        self.config = cfg = read_fields(UMT5Config, config)
        self.embedding = table(cfg.vocab_size, cfg.d_model)
        self.blocks = nn.ModuleList([Block(cfg) for _ in range(cfg.num_layers)])
        self.final_norm = RMSNorm(cfg)

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, check: Callable[[], None] = go_on
    ) -> Tensor:
        """Features [B,L,E] of real tokens; those of padding mean nothing.

        input_ids: int64 [B,L].
        attention_mask: [B,L], nonzero for real tokens, of which every prompt has one.
        check: called before each layer; what it raises ends the encoding.
        """
        x_BLE, mask_BL = self.embedding(input_ids), attention_mask.bool()
        for block in self.blocks:
            check()
            x_BLE = block(x_BLE, mask_BL)
        return self.final_norm(x_BLE)

    def place(self, device: torch.device | str, dtype: torch.dtype) -> "UMT5Encoder":
        """Move the weights, each to its dtype in an encoder of `dtype`."""
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(device, dtype_of(name, dtype))
        return self


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter, where the encoder's is `dtype`. Inputs of the last product of a
    feed-forward exceed fp16, and so may its results."""
    wide = dtype == torch.float16 and name.endswith("ffn.wo.weight")
    return torch.float32 if wide else dtype


def keys_of(name: str) -> tuple[str, ...]:
    """The names in transformers' files of a parameter here."""
    for ours, theirs in STORED:
        name = name.replace(ours, theirs)
    tied = ("encoder.embed_tokens.weight",) if name == "shared.weight" else ()
    return name, *tied
