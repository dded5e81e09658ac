"""UniViGU: one transformer over [video rows ; text rows]. Attention is shared; feed-forward layers,
time embeddings, final modulation, embeddings and heads are one per modality. Knows no backend:
operations come from `bind`.

Legend: B samples, V video rows, T text rows, L = V+T, D width, H heads, K head_dim, C context rows,
N vocabulary rows, F,Y,X latent frames, height, width. The residual stream x_BLD is fp32 and packed
once; it is never split or joined again.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from univigu_kernels import Expert, Ops, Rotary, bind, rotary_tables

CHANNELS, PATCH = 16, (1, 2, 2)
EPS, TEXT_HEAD_EPS = 1e-6, 1e-5


class Norm(NamedTuple):
    """A LayerNorm to come: LN(x) * weight + shift, one row per modality."""

    weight_B2D: Tensor
    shift_B2D: Tensor
    eps: tuple[float, float] = (EPS, EPS)


class Modulation(NamedTuple):
    """What the two times do to one layer; weight = 1 + scale."""

    attention: Norm
    attention_gate_B2D: Tensor
    ffn: Norm
    ffn_gate_B2D: Tensor


class Joint(NamedTuple):
    """What every layer knows about the joint sequence."""

    video_rows: int
    rotary: Rotary
    text_lengths_B: Tensor | None


class Output(NamedTuple):
    """velocity [B,16,F,Y,X] = eps - x0; logits [B,T,N] (discrete) or text_velocity [B,T,D]
    (embedding)."""

    velocity: Tensor
    logits: Tensor | None = None
    text_velocity: Tensor | None = None


def sinusoid(time_B: Tensor, width: int) -> Tensor:
    """[cos ; sin] of time * 10000^(-j/half), j < half = width/2; computed in float64. [B] -> [B,
    width] float64."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float64, device=time_B.device) / -half
    angle = time_B.double()[:, None] * torch.pow(10000.0, powers)
    return torch.cat([angle.cos(), angle.sin()], -1)


def modulation_table(rows: int, dim: int, **wide) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim, **wide), std=dim**-0.5))


@lru_cache(maxsize=16)
def _rotary(grid, text_rows, head_dim, device, dtype) -> Rotary:
    with torch.inference_mode(False), torch.no_grad():
        return rotary_tables(grid, text_rows, head_dim, device, dtype)


class TimeEmbedder(nn.Module):
    def __init__(self, freq_dim: int, dim: int, **factory):
        super().__init__()
        self.linear_1, self.linear_2 = (
            nn.Linear(freq_dim, dim, **factory),
            nn.Linear(dim, dim, **factory),
        )

    def forward(self, time_B: Tensor) -> Tensor:
        waves = sinusoid(time_B, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class TimeEmbedding(nn.Module):
    """Time in [0, 1000] -> (temb [B,D] for the head, e [B,6,D] for the layers). fp32 throughout."""

    def __init__(self, freq_dim: int, dim: int, **factory):
        super().__init__()
        self.time_embedder = TimeEmbedder(freq_dim, dim, **factory)
        self.time_proj = nn.Linear(dim, 6 * dim, **factory)

    def forward(self, time_B: Tensor) -> tuple[Tensor, Tensor]:
        temb = self.time_embedder(time_B)
        return temb, self.time_proj(F.silu(temb)).unflatten(1, (6, -1))


class Linear(nn.Linear):
    """A projection on the backend that was bound."""

    def __init__(self, ops: Ops, inputs: int, outputs: int, **factory):
        super().__init__(inputs, outputs, **factory)
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight, self.bias)


class ContextEmbedder(nn.Module):
    def __init__(self, ops: Ops, text_dim: int, dim: int, **factory):
        super().__init__()
        self.linear_1, self.linear_2 = (
            Linear(ops, text_dim, dim, **factory),
            Linear(ops, dim, dim, **factory),
        )

    def forward(self, context_BCE: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(context_BCE), approximate="tanh"))


class SelfAttention(nn.Module):
    """Joint attention; q/k RMSNorm spans all heads; 3D rotary on video rows, 1D on text rows."""

    def __init__(self, cfg: ModelConfig, ops: Ops, narrow: dict, wide: dict):
        super().__init__()
        self.ops, self.heads, self.video_sees_text = ops, cfg.heads, cfg.video_sees_text
        self.to_qkv = Linear(ops, cfg.dim, 3 * cfg.dim, **narrow)
        self.norm_q, self.norm_k = (
            nn.RMSNorm(cfg.dim, EPS, **wide),
            nn.RMSNorm(cfg.dim, EPS, **wide),
        )
        self.to_out = Linear(ops, cfg.dim, cfg.dim, **narrow)

    def forward(self, h_BLD: Tensor, joint: Joint) -> Tensor:
        q_BLD, k_BLD, v_BLD = self.to_qkv(h_BLD).unflatten(-1, (3, -1)).unbind(2)
        norms = self.norm_q.weight, self.norm_k.weight
        q_BLHK, k_BLHK = self.ops.qknorm_rope(q_BLD, k_BLD, *norms, self.heads, joint.rotary, EPS)
        v_BLHK = v_BLD.unflatten(-1, (self.heads, -1))
        rows, lengths = joint.video_rows, joint.text_lengths_B
        o_BLHK = self.ops.joint_attention(
            q_BLHK, k_BLHK, v_BLHK, rows, lengths, self.video_sees_text
        )
        return self.to_out(o_BLHK.flatten(2))


class CrossAttention(nn.Module):
    """Attention of every row to the prompt's context. K/V depend on the prompt alone: see
    `keys_values`."""

    def __init__(self, cfg: ModelConfig, ops: Ops, narrow: dict, wide: dict):
        super().__init__()
        self.ops, self.heads = ops, cfg.heads
        self.to_q, self.to_kv = (
            Linear(ops, cfg.dim, cfg.dim, **narrow),
            Linear(ops, cfg.dim, 2 * cfg.dim, **narrow),
        )
        self.norm_q, self.norm_k = (
            nn.RMSNorm(cfg.dim, EPS, **wide),
            nn.RMSNorm(cfg.dim, EPS, **wide),
        )
        self.to_out = Linear(ops, cfg.dim, cfg.dim, **narrow)

    def _norm(self, norm: nn.RMSNorm, x_BRD: Tensor) -> Tensor:
        return self.ops.rms_norm(x_BRD, norm.weight, EPS).unflatten(-1, (self.heads, -1))

    def keys_values(self, context_BCD: Tensor) -> tuple[Tensor, Tensor]:
        k_BCD, v_BCD = self.to_kv(context_BCD).unflatten(-1, (2, -1)).unbind(2)
        return self._norm(self.norm_k, k_BCD), v_BCD.unflatten(-1, (self.heads, -1))

    def forward(self, h_BLD: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        q_BLHK = self._norm(self.norm_q, self.to_q(h_BLD))
        return self.to_out(self.ops.cross_attention(q_BLHK, *keys_values).flatten(2))


class FeedForward(nn.Module):
    """The parameters of one modality's expert; `routed_ffn` runs both."""

    def __init__(self, cfg: ModelConfig, narrow: dict):
        super().__init__()
        self.up, self.down = (
            nn.Linear(cfg.dim, cfg.ffn_dim, **narrow),
            nn.Linear(cfg.ffn_dim, cfg.dim, **narrow),
        )

    @property
    def expert(self) -> Expert:
        return Expert(self.up.weight, self.up.bias, self.down.weight, self.down.bias)


class Block(nn.Module):
    def __init__(self, cfg: ModelConfig, ops: Ops, narrow: dict, wide: dict):
        super().__init__()
        self.ops = ops
        self.scale_shift_table = modulation_table(6, cfg.dim, **wide)
        self.attn1 = SelfAttention(cfg, ops, narrow, wide)
        self.attn2 = CrossAttention(cfg, ops, narrow, wide)
        self.norm2 = nn.LayerNorm(cfg.dim, EPS, **wide)
        self.ffn, self.ffn_t = FeedForward(cfg, narrow), FeedForward(cfg, narrow)

    def modulation(self, e_B26D: Tensor) -> Modulation:
        """One table for both modalities; only the time vectors differ."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.scale_shift_table[:, None] + e_B26D
        ).unbind(2)
        return Modulation(Norm(1 + scale1, shift1), gate1, Norm(1 + scale2, shift2), gate2)

    def forward(self, x_BLD, h_BLD, m: Modulation, keys_values, joint: Joint, opens: Norm):
        """x: residual stream; h: x normed and modulated for attention. Returns x and h = what
        `opens` makes of x."""
        ops, rows, dtype = self.ops, joint.video_rows, h_BLD.dtype
        a_BLD = self.attn1(h_BLD, joint)
        affine = Norm(self.norm2.weight[None, None], self.norm2.bias[None, None])
        x_BLD, h_BLD = ops.residual_adaln(
            x_BLD, a_BLD, m.attention_gate_B2D, *affine[:2], rows, affine.eps, dtype
        )
        a_BLD = self.attn2(h_BLD, keys_values)
        x_BLD, h_BLD = ops.residual_adaln(x_BLD, a_BLD, None, *m.ffn[:2], rows, m.ffn.eps, dtype)
        f_BLD = ops.routed_ffn(h_BLD, self.ffn.expert, self.ffn_t.expert, rows)
        return ops.residual_adaln(x_BLD, f_BLD, m.ffn_gate_B2D, *opens[:2], rows, opens.eps, dtype)


class VideoHead(nn.Module):
    def __init__(self, dim: int, **narrow):
        super().__init__()
        self.proj_out = nn.Linear(dim, CHANNELS * PATCH[1] * PATCH[2], **narrow)


class TextHead(nn.Module):
    """LayerNorm with a weight and no bias (eps 1e-5), then a linear that starts at zero."""

    def __init__(self, dim: int, rows: int, narrow: dict, wide: dict):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, TEXT_HEAD_EPS, bias=False, **wide)
        self.linear = nn.Linear(dim, rows, **narrow)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)


class UniViGU(nn.Module):
    """The model with random weights. dtype: matmuls and attention; norms, modulation, time path and
    the residual stream are fp32 (fp64 when dtype is fp64). kernels: a request to
    `univigu_kernels.bind`, or what it returned."""

    def __init__(
        self, cfg: ModelConfig, device="cpu", dtype=torch.float32, kernels: str | Ops = "auto"
    ):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.wide_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.ops = ops = bind(kernels, device, dtype) if isinstance(kernels, str) else kernels
        narrow, wide = (
            {"device": device, "dtype": dtype},
            {"device": device, "dtype": self.wide_dtype},
        )
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

    def embed(self, video: Tensor, tokens: Tensor) -> Tensor:
        """Latents and tokens (ids, or vectors of the embedding flow) -> the packed residual stream
        x_BLD."""
        B, C, frames, height, width = video.shape
        patches = video.to(self.dtype).view(B, C, frames, height // 2, 2, width // 2, 2)
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).reshape(B, -1, C * 4)
        video_BVD = F.linear(
            patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        )
        text_BTD = tokens if tokens.is_floating_point() else self.vocab_embed(tokens)
        return torch.cat([video_BVD.to(self.wide_dtype), text_BTD.to(self.wide_dtype)], 1)

    def encode_context(self, context_BCE: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every layer's cross-attention (K, V) [B,C,H,K] for a prompt [B,C,text_dim]: once per
        prompt, not per step."""
        context_BCD = self.cond_text_embedder(context_BCE.to(self.dtype))
        return [block.attn2.keys_values(context_BCD) for block in self.blocks]

    def final_norm(self, temb_v: Tensor, temb_t: Tensor) -> Norm:
        """The heads' two norms as one: the text head's weight is folded into its scale."""
        shift_v, scale_v = (self.scale_shift_table_v + temb_v[:, None]).unbind(1)
        shift_t, scale_t = (self.scale_shift_table_t + temb_t[:, None]).unbind(1)
        weight = torch.stack([1 + scale_v, self.text_head.norm_final.weight * (1 + scale_t)], 1)
        return Norm(weight, torch.stack([shift_v, shift_t], 1), (EPS, TEXT_HEAD_EPS))

    def features(self, video, tokens, t_video, t_text, context, text_lengths=None) -> Tensor:
        """What the two heads read, h_BLD. Arguments as in `forward`; context may also be
        `encode_context`'s list."""
        rotary = self._check(video, tokens, t_video, t_text)
        joint = Joint(video[0, 0].numel() // 4, rotary, text_lengths)
        keys_values = self.encode_context(context) if isinstance(context, Tensor) else context
        (temb_v, e_v), (temb_t, e_t) = self.time_embedding_v(t_video), self.time_embedding_t(t_text)
        mods = [block.modulation(torch.stack([e_v, e_t], 1)) for block in self.blocks]
        opens = [m.attention for m in mods[1:]] + [self.final_norm(temb_v, temb_t)]
        x_BLD = self.embed(video, tokens)
        h_BLD = self.ops.adaln(
            x_BLD, *mods[0].attention[:2], joint.video_rows, out_dtype=self.dtype
        )
        for block, m, kv, norm in zip(self.blocks, mods, keys_values, opens, strict=True):
            x_BLD, h_BLD = block(x_BLD, h_BLD, m, kv, joint, norm)
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
        h_BLD = self.features(video, tokens, t_video, t_text, context, text_lengths)
        text = self.text_head.linear(h_BLD[:, h_BLD.shape[1] - tokens.shape[1] :])
        velocity = self.velocity(h_BLD, video.shape)
        if self.cfg.text_flow == "embedding":
            return Output(velocity, text_velocity=text)
        return Output(velocity, logits=text)

    def _check(self, video, tokens, t_video, t_text) -> Rotary:
        """Shapes that the network can take, and the rotary tables for them."""
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
        for name, time in (("t_video", t_video), ("t_text", t_text)):
            if time.shape != video.shape[:1]:
                raise ValueError(f"model: {name} must be [B]; got {tuple(time.shape)}.")
        frames, height, width = video.shape[2:]
        grid = frames, height // 2, width // 2
        return _rotary(grid, tokens.shape[1], self.cfg.head_dim, video.device, self.wide_dtype)
