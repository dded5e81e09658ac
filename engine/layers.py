"""The layers of UniViGU, and what a step hands them. Attention is shared by video and text rows;
feed-forward layers and time embeddings are one per modality.

Legend: B samples, R rows, V video rows, T text rows, L = V+T, D width, H heads, K head_dim,
C context rows, Q kept rows. The residual stream x_BLD is fp32.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from univigu_kernels import Expert, Into, Norm, Ops, Rotary

EPS, TEXT_HEAD_EPS = 1e-6, 1e-5


def unbind(x: Tensor, dim: int) -> list[Tensor]:
    """torch.unbind; for recomputed blocks as split and squeeze: torch.compile can neither keep nor
    recompute the outputs of unbind, which a recomputed block reads."""
    if not torch.is_grad_enabled():
        return [*x.unbind(dim)]
    return [part.squeeze(dim) for part in x.split(1, dim)]


class Modulation(NamedTuple):
    """What the two times do to one layer; weight = 1 + scale."""

    attention: Norm
    attention_gate_B2D: Tensor
    ffn: Norm
    ffn_gate_B2D: Tensor


class Conditions(NamedTuple):
    """What the two times do to all layers R and to the heads, for B samples or B steps.

    layers_BR26D: shift, 1 + scale and gate of attention, then of the feed-forward layer, for video
    and for text. head_B22D: weight and shift of the heads' norms.
    """

    layers_BR26D: Tensor
    head_B22D: Tensor

    def at(self, step_1: Tensor) -> "Conditions":
        """Selects one step's conditions; `step_1` is a device tensor, so this never syncs."""
        return Conditions(*(table.index_select(0, step_1) for table in self))

    def norms(self) -> tuple[list[Modulation], Norm]:
        layers = []
        for m_B26D in unbind(self.layers_BR26D, 1):
            shift1, weight1, gate1, shift2, weight2, gate2 = unbind(m_B26D, 2)
            layers.append(Modulation(Norm(weight1, shift1), gate1, Norm(weight2, shift2), gate2))
        return layers, Norm(*unbind(self.head_B22D, 2), (EPS, TEXT_HEAD_EPS))


class ContextKV(NamedTuple):
    """Cross-attention K and V [B,C,H,K] of one layer; the last row counts `repeats` times. row_B1D:
    what every row of a sample gets where all keys are equal, as those of an empty prompt are."""

    k_BCHK: Tensor
    v_BCHK: Tensor
    repeats: int = 1
    row_B1D: Tensor | None = None

    def of(self, samples: int) -> "ContextKV":
        """The same of the first so many samples."""
        k_BCHK, v_BCHK, repeats, row_B1D = self
        row_B1D = None if row_B1D is None else row_B1D[:samples]
        return ContextKV(k_BCHK[:samples], v_BCHK[:samples], repeats, row_B1D)

    def tensors(self) -> list[Tensor]:
        return [x for x in (self.k_BCHK, self.v_BCHK, self.row_B1D) if x is not None]


class Cache(NamedTuple):
    """Self-attention K and V of one layer, kept between steps: [video ; text] rows."""

    k_BLHK: Tensor
    v_BLHK: Tensor

    def last(self, v_BRD: Tensor) -> Into:
        """Where the last R rows of k go, and those of v with it."""
        first = self.k_BLHK.shape[1] - v_BRD.shape[1]
        return Into(v_BRD, self.k_BLHK[:, first:], self.v_BLHK[:, first:])


class SequencePart(Protocol):
    """A rank's rows of a sequence that several ranks share: a box of the latent grid and a slice of
    the text. See `engine.parallel.sequence`."""

    rotary: Rotary

    def attend(self, joint_attention: Callable, keep: str, *qkv, **options) -> Tensor:
        """Joint attention of this rank's queries to the rows of all ranks."""


class Joint(NamedTuple):
    """What a layer knows about the joint sequence.

    video_rows: of its input. keep: "all", or the one modality whose rows go on from here; the other
    gives its K and V and ends. cached_rows: video rows whose K and V are in the cache alone. part:
    of the sequence, that the input is.
    """

    video_rows: int
    rotary: Rotary
    text_lengths_B: Tensor | None
    keep: str = "all"
    cached_rows: int = 0
    part: SequencePart | None = None

    @property
    def kept_video_rows(self) -> int:
        return 0 if self.keep == "text" else self.video_rows

    def kept(self, x_BL: Tensor) -> Tensor:
        rows = {
            "all": slice(None),
            "video": slice(self.video_rows),
            "text": slice(self.video_rows, None),
        }
        return x_BL[:, rows[self.keep]]


def sinusoid(time_B: Tensor, width: int) -> Tensor:
    """[cos ; sin] of time * 10000^(-j/half), j < half = width/2; computed in float64. [B] -> [B,
    width] float64."""
    half = width // 2
    powers = torch.arange(half, dtype=torch.float64, device=time_B.device) / -half
    angle = time_B.double()[:, None] * torch.pow(10000.0, powers)
    return torch.cat([angle.cos(), angle.sin()], -1)


def modulation_table(rows: int, dim: int, **wide) -> nn.Parameter:
    return nn.Parameter(nn.init.normal_(torch.empty(1, rows, dim, **wide), std=dim**-0.5))


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
        """Returns the embedding [B,D] and its projection [B,6D]."""
        temb = self.time_embedder(time_B)
        return temb, self.time_proj(F.silu(temb))


class Linear(nn.Linear):
    """A projection on the backend that was bound."""

    def __init__(self, ops: Ops, inputs: int, outputs: int, **factory):
        super().__init__(inputs, outputs, **factory)
        self.ops = ops

    def forward(self, x: Tensor, text_rows: bool = False) -> Tensor:
        """text_rows: whether the rows are the text's alone, which are few."""
        linear = self.ops.text_row_linear if text_rows else self.ops.linear
        return linear(x, self.weight, self.bias)


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

    def forward(self, h_BLD: Tensor, joint: Joint, cache: Cache | None = None) -> Tensor:
        """Attends from the rows that `joint` keeps to all rows, those of a cache included."""
        qkv_BLD = self.to_qkv(h_BLD, joint.video_rows == 0)
        q_BLD, k_BLD, v_BLD = qkv_BLD.unflatten(-1, (3, -1)).unbind(2)
        norms = self.norm_q.weight, self.norm_k.weight, self.heads, joint.rotary, EPS
        into = None if cache is None else cache.last(v_BLD)
        q_BLHK, k_BLHK = self.ops.qknorm_rope(q_BLD, k_BLD, *norms, into)
        v_BLHK = v_BLD.unflatten(-1, (self.heads, -1))
        if cache is not None:
            k_BLHK, v_BLHK = cache

        lengths = joint.text_lengths_B
        attend = self.ops.joint_attention
        if joint.kept_video_rows == 0:
            attend = self.ops.text_query_attention
        attend = attend if joint.part is None else partial(joint.part.attend, attend, joint.keep)

        o_BQHK = attend(
            joint.kept(q_BLHK),
            k_BLHK,
            v_BLHK,
            joint.video_rows + joint.cached_rows,
            None if lengths is None else lengths[: len(h_BLD)],
            self.video_sees_text,
            video_queries=joint.kept_video_rows,
        )
        return self.to_out(o_BQHK.flatten(2), joint.kept_video_rows == 0)


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

    def keys_values(self, context_BCD: Tensor, repeats: int) -> ContextKV:
        k_BCD, v_BCD = self.to_kv(context_BCD).unflatten(-1, (2, -1)).unbind(2)
        v_BCHK = v_BCD.unflatten(-1, (self.heads, -1))
        row_B1D = self.to_out(v_BCD) if repeats > 1 and v_BCD.shape[1] == 1 else None
        return ContextKV(self._norm(self.norm_k, k_BCD), v_BCHK, repeats, row_B1D)

    def forward(self, h_BLD: Tensor, context: ContextKV | Tensor) -> Tensor:
        """The context may be of several times as many samples: each h serves all its contexts."""
        if isinstance(context, Tensor):
            context = self.keys_values(context, 1)
        q_BLHK = self._norm(self.norm_q, self.to_q(h_BLD))
        q_BLHK = copies(q_BLHK, len(context.k_BCHK))
        return self.to_out(self.ops.cross_attention(q_BLHK, *context[:3]).flatten(2))


def copies(x_BL: Tensor, samples: int) -> Tensor:
    """x for each of as many samples; itself where it has them."""
    return x_BL if len(x_BL) == samples else torch.cat([x_BL] * (samples // len(x_BL)))


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
    """ffn_input: dtype of the feed-forward layers' input. route, text_route: the operations that
    run them, for all rows and for the text's alone. `engine.fp8` sets others."""

    def __init__(self, cfg: ModelConfig, ops: Ops, narrow: dict, wide: dict):
        super().__init__()
        self.ops, self.ffn_input = ops, narrow["dtype"]
        self.route, self.text_route = ops.routed_ffn, ops.text_row_ffn
        self.scale_shift_table = modulation_table(6, cfg.dim, **wide)
        self.attn1 = SelfAttention(cfg, ops, narrow, wide)
        self.attn2 = CrossAttention(cfg, ops, narrow, wide)
        self.norm2 = nn.LayerNorm(cfg.dim, EPS, **wide)
        self.ffn, self.ffn_t = FeedForward(cfg, narrow), FeedForward(cfg, narrow)

    def forward(self, x_BLD, h_BLD, m: Modulation, context, joint: Joint, opens: Norm, cache=None):
        """x: residual stream; h: x normed and modulated for attention. Returns the kept rows of x
        and h = what `opens` makes of them."""
        ops, rows, dtype = self.ops, joint.kept_video_rows, h_BLD.dtype
        a_BLD, x_BLD = self.attn1(h_BLD, joint, cache), joint.kept(x_BLD)
        constant = context.row_B1D if isinstance(context, ContextKV) else None

        if constant is not None:  # both attentions close at once
            x_BLD, a_BLD = (copies(t, len(constant)) for t in (x_BLD, a_BLD))
            gated = x_BLD, a_BLD, m.attention_gate_B2D, m.ffn, rows, self.ffn_input
            x_BLD, h_BLD = ops.residual_adaln(*gated, constant)
        else:
            affine = Norm(self.norm2.weight[None, None], self.norm2.bias[None, None])
            gated = x_BLD, a_BLD, m.attention_gate_B2D, affine, rows, dtype
            x_BLD, h_BLD = ops.residual_adaln(*gated)
            a_BLD = self.attn2(h_BLD, context)
            x_BLD = copies(x_BLD, len(a_BLD))  # until here a prompt and its null were one
            x_BLD, h_BLD = ops.residual_adaln(x_BLD, a_BLD, None, m.ffn, rows, self.ffn_input)

        route = self.route if rows else self.text_route
        f_BLD = route(h_BLD, self.ffn.expert, self.ffn_t.expert, rows)
        return ops.residual_adaln(x_BLD, f_BLD, m.ffn_gate_B2D, opens, rows, dtype)
