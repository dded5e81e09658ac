"""What a run costs in arithmetic, from its configuration and sizes alone: FLOPs of a forward pass
by part and of a training step, and what devices can do.

2 FLOPs per multiply-add; softmax, norms, rotary tables, activations and the optimizer are ignored,
embeddings are lookups. Padded text rows count as rows. No tensor library is imported here.

Legend: B samples, V video rows, T text rows, L = V+T, C context rows, D width, F hidden width,
R layers, N vocabulary rows.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

from engine.config import ModelConfig
from engine.errors import UsageError
from engine.planning import memory

PATCH = 64  # numbers of a video row: 16 channels x 1 x 2 x 2


class Flops(NamedTuple):
    """The floating-point operations of one pass, by part.

    context: the prompt's embedder.
    context_kv: every layer's K and V of it, which inference makes once per prompt.
    projections: q, k, v and out of the joint rows, q and out of cross-attention.
    """

    patches: int
    times: int
    context: int
    context_kv: int
    self_projections: int
    joint_attention: int
    cross_projections: int
    cross_attention: int
    video_ffn: int
    text_ffn: int
    video_head: int
    text_head: int

    @property
    def total(self) -> int:
        return sum(self)


LAYERS = (
    "context_kv",
    "self_projections",
    "cross_projections",
    "video_ffn",
    "text_ffn",
    "joint_attention",
    "cross_attention",
)
RECOMPUTED = {"none": (), "attention": LAYERS[:-2], "block": LAYERS}  # see `engine.recompute`


def forward_flops(
    cfg: ModelConfig, *, video_rows: int, text_rows: int, context_rows: int = 512, samples: int = 1
) -> Flops:
    """Counts what `UniViGU.forward` does: every row of `samples`, with both heads.

    Per row 2 * inputs * outputs of every matrix, and 4D for every pair of a query and a key that it
    sees; without video_sees_text a video row sees no text.
    """
    B, V, T, C, R = samples, video_rows, text_rows, context_rows, cfg.layers
    D, F, L = cfg.dim, cfg.ffn_dim, V + T
    head_rows = D if cfg.text_flow == "embedding" else cfg.vocab_rows
    seen = L if cfg.video_sees_text else V

    return Flops(
        patches=2 * B * V * PATCH * D,
        times=4 * B * (cfg.freq_dim * D + 7 * D * D),
        context=2 * B * C * (cfg.text_dim * D + D * D),
        context_kv=4 * R * B * C * D * D,
        self_projections=8 * R * B * L * D * D,
        joint_attention=4 * R * B * (V * seen + T * L) * D,
        cross_projections=4 * R * B * L * D * D,
        cross_attention=4 * R * B * L * C * D,
        video_ffn=4 * R * B * V * D * F,
        text_ffn=4 * R * B * T * D * F,
        video_head=2 * B * V * PATCH * D,
        text_head=2 * B * T * D * head_rows,
    )


def train_flops(
    cfg: ModelConfig, *, recompute: str = "none", frozen: Collection[str] = (), **sizes: int
) -> int:
    """Forward, backward and what `recompute` does again; sizes: as of `forward_flops`. MFU by its
    usual definition takes "none" even where the run recomputes: work done twice is no progress.

    Backward is twice forward, the gradients of a product's two operands; but of what enters the
    network (latents, prompt, times) none is needed, and of the weights of `frozen` parts (fields of
    `Flops`) none is wanted. Attention's backward counts four products: fused kernels compute the
    scores again, which torch's counter adds for SDPA on CUDA (2.5 times forward). Logits
    that a chunked loss computes again do not count twice either.

    Errors: UsageError for an unknown policy or part.
    """
    _check("recompute", [recompute], RECOMPUTED)
    _check("frozen", frozen, [part for part in Flops._fields if "attention" not in part])
    forward = forward_flops(cfg, **sizes)
    inputs = (  # the share of each network's first matrix
        forward.patches
        + forward.context * cfg.text_dim // (cfg.text_dim + cfg.dim)
        + forward.times * cfg.freq_dim // (cfg.freq_dim + 7 * cfg.dim)
    )
    unwanted = sum(getattr(forward, part) for part in frozen)
    again = sum(getattr(forward, part) for part in RECOMPUTED[recompute])
    return 3 * forward.total - inputs - unwanted + again


def _check(what: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise UsageError(f"cost: {what} must be one of {', '.join(known)}; got {name!r}.")


def parameters(cfg: ModelConfig) -> int:
    """The exact number of parameters of the whole model."""
    count = memory.parameters(cfg)
    return count.narrow + count.experts + count.wide


# Dense bf16 and fp16 tensor cores by NVIDIA's data sheets, and what torch.cuda.get_device_name says
# of the boards they hold for. H100 NVL, H200 NVL, GH200, GB200 and MIG slices are other figures.
PEAKS = (
    (r"A100-SXM4-\d+GB|A100-PCIE-\d+GB|A100 80GB PCIe", 312e12),
    (r"H100 \d+GB HBM3|H100 SXM5?", 989.4e12),
    (r"H100 PCIe", 756e12),
    (r"H200|H200 SXM", 989.4e12),
    (r"B200", 2250e12),
)


def peak_flops(device_name: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s of the board; None where it, or the figure for the dtype (torch's, or its name), is
    not in the table: a share of an unknown peak is not to be stated."""
    if str(dtype).removeprefix("torch.") not in ("bfloat16", "float16"):
        return None
    board = device_name.removeprefix("NVIDIA ")
    return next((peak for names, peak in PEAKS if re.fullmatch(names, board)), None)
