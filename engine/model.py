"""UniViGU: one transformer over [video rows ; text rows]. Attention is shared; feed-forward layers,
time embeddings, final modulation, embeddings and heads are one per modality. Knows no backend:
operations come from `bind`.

Legend: B samples, V video rows, T text rows, L = V+T, R layers, D width, H heads, K head_dim,
C context rows, N vocabulary rows, F,Y,X latent frames, height, width. The residual stream x_BLD is
fp32 and packed once; it is never split or joined again.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import CHANNELS, ModelConfig
from engine.layers import (
    TEXT_HEAD_EPS,
    Block,
    Cache,
    Conditions,
    ContextEmbedder,
    ContextKV,
    Joint,
    SequencePart,
    TimeEmbedding,
    modulation_table,
)
from engine.recompute import POLICIES
from univigu_kernels import Ops, Rotary, bind, rotary_tables

PATCH = 1, 2, 2


class Output(NamedTuple):
    """velocity [B,16,F,Y,X] = eps - x0; logits [B,T,N] (discrete) or text_velocity [B,T,D]
    (embedding)."""

    velocity: Tensor
    logits: Tensor | None = None
    text_velocity: Tensor | None = None


@lru_cache(maxsize=16)
def _rotary(grid, text_rows, head_dim, device, dtype) -> Rotary:
    with torch.inference_mode(False), torch.no_grad():
        return rotary_tables(grid, text_rows, head_dim, device, dtype)


def rotary_of(grid: tuple[int, int, int], text_rows: int, model: "UniViGU", device) -> Rotary:
    """The tables of a grid of patches (F, Y, X) and of so many text rows."""
    return _rotary(grid, text_rows, model.cfg.head_dim, device, model.wide_dtype)


def forget_rotary() -> None:
    """Drops the tables that `rotary_of` keeps for the next call."""
    _rotary.cache_clear()


class VideoHead(nn.Module):
    def __init__(self, dim: int, **narrow):
        super().__init__()
        self.proj_out = nn.Linear(dim, CHANNELS * PATCH[1] * PATCH[2], **narrow)


class TextHead(nn.Module):
    """LayerNorm with a weight and no bias (eps 1e-5), then a linear that starts at zero. Called, it
    gives the linear's weights to `read(h, weight, bias)`: a loss needs no logits."""

    def __init__(self, dim: int, rows: int, narrow: dict, wide: dict):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, TEXT_HEAD_EPS, bias=False, **wide)
        self.linear = nn.Linear(dim, rows, **narrow)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, h_BTD: Tensor, read: Callable[..., Tensor]) -> Tensor:
        return read(h_BTD, self.linear.weight, self.linear.bias)


class UniViGU(nn.Module):
    """The model with random weights.

    cfg: its architecture.
    device: where the parameters are.
    dtype: of matmuls and attention; norms, modulation, time path and the residual stream are fp32
        (fp64 when dtype is fp64).
    kernels: a request to `univigu_kernels.bind`, or what it returned.
    recompute: what the backward pass computes again, see `engine.recompute`.
    """

    def __init__(
        self, cfg: ModelConfig, device="cpu", dtype=torch.float32, kernels: str | Ops = "auto"
    ):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.recompute = "none"
        self.wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.ops = ops = bind(kernels, device, dtype) if isinstance(kernels, str) else kernels
        narrow = {"device": device, "dtype": dtype}
        wide = {"device": device, "dtype": self.wide_dtype}

        self.patch_embedding = nn.Conv3d(CHANNELS, cfg.dim, PATCH, PATCH, **narrow)
        self.vocab_embed = nn.Embedding(cfg.vocab_rows, cfg.dim, **narrow)
        self.cond_text_embedder = ContextEmbedder(ops, cfg.text_dim, cfg.dim, **narrow)
        self.time_embedding_v = TimeEmbedding(cfg.freq_dim, cfg.dim, **wide)
        self.time_embedding_t = TimeEmbedding(cfg.freq_dim, cfg.dim, **wide)

        self.blocks = nn.ModuleList(Block(cfg, ops, narrow, wide) for _ in range(cfg.layers))

        self.scale_shift_table_v = modulation_table(2, cfg.dim, **wide)
        self.scale_shift_table_t = modulation_table(2, cfg.dim, **wide)
        self.video_head = VideoHead(cfg.dim, **narrow)
        text_rows = cfg.dim if cfg.text_flow == "embedding" else cfg.vocab_rows
        self.text_head = TextHead(cfg.dim, text_rows, narrow, wide)

    def hide_text_from_video(self) -> None:
        """Switches to video_sees_text=False. A model that was trained to see needs more training:
        the embedded model was as good again after 3000 steps."""
        self.cfg = replace(self.cfg, video_sees_text=False)
        for block in self.blocks:
            block.attn1.video_sees_text = False

    def embed(self, video: Tensor, tokens: Tensor) -> Tensor:
        """Latents and tokens (ids, or vectors of the embedding flow) -> the packed residual stream
        x_BLD."""
        B, C, frames, height, width = video.shape
        patches = video.to(self.dtype).view(B, C, frames, height // 2, 2, width // 2, 2)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, C * 4)
        video_BVD = F.linear(
            patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        )
        return torch.cat([video_BVD.to(self.wide_dtype), self.embed_text(tokens)], 1)

    def embed_text(self, tokens: Tensor) -> Tensor:
        text_BTD = tokens if tokens.is_floating_point() else self.vocab_embed(tokens)
        return text_BTD.to(self.wide_dtype)

    def encode_context(self, context_BCE: Tensor, repeats: int = 1) -> list[ContextKV]:
        """Every layer's cross-attention K and V for a prompt [B,C,text_dim], whose last row counts
        `repeats` times: once per prompt, not per step."""
        context_BCD = self.cond_text_embedder(context_BCE.to(self.dtype))
        return [block.attn2.keys_values(context_BCD, repeats) for block in self.blocks]

    def conditions(self, t_video: Tensor, t_text: Tensor) -> Conditions:
        """t_video, t_text [B] in [0, 1000], of samples or of the steps of a schedule. A layer has
        one table for both modalities; only the time vectors differ."""
        (temb_v, e_v), (temb_t, e_t) = self.time_embedding_v(t_video), self.time_embedding_t(t_text)
        tables_R16D = torch.stack([block.scale_shift_table for block in self.blocks])
        e_B26D = torch.stack([e_v, e_t], 1).unflatten(2, (6, -1))
        layers_BR26D = tables_R16D + e_B26D[:, None]
        layers_BR26D[..., 1::3, :] += 1  # the scales; an index list would wait for the device
        shift_v, scale_v = (self.scale_shift_table_v + temb_v[:, None]).unbind(1)
        shift_t, scale_t = (self.scale_shift_table_t + temb_t[:, None]).unbind(1)
        # The heads' two norms as one: the text head's weight is folded into its scale.
        weight = torch.stack([1 + scale_v, self.text_head.norm_final.weight * (1 + scale_t)], 1)
        head_B22D = torch.stack([weight, torch.stack([shift_v, shift_t], 1)], 2)
        return Conditions(layers_BR26D, head_B22D)

    def features(
        self,
        video,
        tokens,
        conditions: Conditions,
        context: list[ContextKV] | list[Tensor],
        text_lengths=None,
        keep="all",
        caches: list[Cache] | None = None,
        part: SequencePart | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """What the two heads read, h_BLD, of the rows to `keep`: "all", "video" or "text".

        The context may be of several times as many samples as the rest (guidance); h is then, too.
        A layer makes its K and V itself where it gets `cond_text_embedder`'s rows instead.
        caches: where to put every layer's K and V. part: of the sequence, that video and tokens
        are; the others are on other ranks. rotary: `rotary_for` these shapes, where the caller
        keeps it.
        """
        self._check(video, tokens)
        if part is not None:
            rotary = part.rotary
        elif rotary is None:
            rotary = self.rotary_for(video, tokens.shape[1])
        joint = Joint(video[0, 0].numel() // 4, rotary, text_lengths, part=part)
        return self._layers(self.embed(video, tokens), conditions, context, joint, keep, caches)

    def text_features(
        self,
        tokens,
        conditions: Conditions,
        context,
        caches: list[Cache],
        text_lengths=None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """What the text head reads, h_BTD, computed for text rows alone: the video's K and V are
        those that `features` left in the caches. Exact where video does not see text. rotary: as in
        `features`, for no video."""
        text_rows = tokens.shape[1]
        cached_rows = caches[0].k_BLHK.shape[1] - text_rows
        if rotary is None:
            rotary = rotary_of((0, 1, 1), text_rows, self, tokens.device)
        joint = Joint(0, rotary, text_lengths, cached_rows=cached_rows)
        return self._layers(self.embed_text(tokens), conditions, context, joint, "all", caches)

    def _layers(self, x_BLD, conditions, context, joint: Joint, keep: str, caches) -> Tensor:
        mods, head = conditions.norms()
        h_BLD = self.ops.adaln(x_BLD, mods[0].attention, joint.video_rows, out_dtype=self.dtype)
        opens = [m.attention for m in mods[1:]] + [head]
        caches = [None] * len(mods) if caches is None else caches
        last, run = joint._replace(keep=keep), POLICIES[self.recompute]
        for block, *layer in zip(self.blocks, mods, context, opens, caches, strict=True):
            m, kv, norm, cache = layer
            who = last if block is self.blocks[-1] else joint
            x_BLD, h_BLD = run(block, x_BLD, h_BLD, m, kv, who, norm, cache)
        return h_BLD

    def velocity(self, h_BLD: Tensor, shape: torch.Size) -> Tensor:
        """Video head and unpatchify: the 64 channels are (1, 2, 2, 16), channel fastest. -> `shape`
        [B,16,F,Y,X]."""
        B, C, frames, height, width = shape
        out = self.video_head.proj_out(h_BLD[:, : frames * height * width // 4])
        out = out.view(B, frames, height // 2, width // 2, 2, 2, C).permute(0, 6, 1, 2, 4, 3, 5)
        return out.reshape(shape)

    def forward(self, video, tokens, t_video, t_text, context, text_lengths=None) -> Output:
        """One evaluation of the joint flow.

        video [B,16,F,Y,X] noised latents (Y, X even); tokens [B,T] int64 ids, or [B,T,D] vectors
        (embedding flow); t_video, t_text [B] in [0, 1000], 1000 = noise; context [B,C,text_dim];
        text_lengths [B] int: real text rows of each sample, the rest is neither attended to nor
        defined; None = all T.
        """
        for name, time in (("t_video", t_video), ("t_text", t_text)):
            if time.shape != video.shape[:1]:
                raise ValueError(f"model: {name} must be [B]; got {tuple(time.shape)}.")
        conditions, context = self.conditions(t_video, t_text), self.encode_context(context)
        h_BLD = self.features(video, tokens, conditions, context, text_lengths)
        text = self.text_head.linear(h_BLD[:, h_BLD.shape[1] - tokens.shape[1] :])
        velocity = self.velocity(h_BLD, video.shape)
        if self.cfg.text_flow == "embedding":
            return Output(velocity, text_velocity=text)
        return Output(velocity, logits=text)

    def rotary_for(self, video: Tensor, text_rows: int) -> Rotary:
        """The tables of latents [B,16,F,Y,X] and of so many text rows."""
        frames, height, width = video.shape[2:]
        return rotary_of((frames, height // 2, width // 2), text_rows, self, video.device)

    def _check(self, video, tokens) -> None:
        """Shapes that the network can take."""
        if (
            video.ndim != 5
            or video.shape[1] != CHANNELS
            or video.shape[3] % 2
            or video.shape[4] % 2
        ):
            raise ValueError(
                f"model: video must be [B, 16, F, even, even]; got {tuple(video.shape)}."
            )
        expected = 3 if self.cfg.text_flow == "embedding" else 2
        if tokens.ndim != expected or tokens.shape[0] != video.shape[0]:
            raise ValueError(
                f"model: tokens must have {expected} axes, B first; got {tuple(tokens.shape)}."
            )
