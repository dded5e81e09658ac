"""The losses of uni-flow in either stage as one module: what FSDP shards, torch.compile compiles.

Every random number of step i comes from generators seeded by (seed, i) and, below it, by the
sample's place in the global batch: a resumed run repeats the uninterrupted one bit for bit, and
neither micro-batches nor ranks change what a sample meets. Legend: B samples, T text rows, D width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import flow
from engine.config import TrainConfig
from engine.model import UniViGU

IGNORE = -100


class Draws(NamedTuple):
    """The random numbers of some samples of one step. video_share_B, text_share_B: what a sample
    counts in the batch's mean; 0 where it gives no such loss."""

    noise: Tensor
    sigma_B: Tensor
    t_B: Tensor
    source: Tensor
    keep_BT: Tensor
    null_B: Tensor
    zeros_B: Tensor
    t2v_B: Tensor
    v2t_B: Tensor
    video_share_B: Tensor
    text_share_B: Tensor


def draw(
    batch: dict[str, Tensor], config: TrainConfig, model: UniViGU, step: int, first=0, total=None
) -> Draws:
    """Draws for the samples `first`, first + 1, ... of a global batch of `total` (None: these are
    all), on the CPU so that a seed means the same on every device."""
    cfg, latents = model.cfg, batch["latents"]
    count, T = batch["prompt_tokens"].shape
    B = total or count
    mine = slice(first, first + count)

    g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    sigma_B, t_B, null_B, zeros_B, corner_B = (torch.rand(B, generator=g) for _ in range(5))
    seeds = torch.randint(2**62, (B,), generator=g)[mine].tolist()
    v2t_B, t2v_B = corner_B > 1 - config.v2t_share, corner_B < config.t2v_share
    latest = 1 - 1e-3 if config.text_loss == "kl" else 1.0  # the KL's rate is infinite at t = 1

    small = {
        "sigma_B": flow.shifted(sigma_B, config.flow_shift).masked_fill(v2t_B, 0.0),
        "t_B": t_B * latest,
        "null_B": (null_B < config.dropout) | v2t_B,
        "zeros_B": (zeros_B < 0.5) | v2t_B,
        "t2v_B": t2v_B,
        "v2t_B": v2t_B,
        "video_share_B": ~v2t_B / (~v2t_B).sum().clamp(min=1),
        "text_share_B": ~t2v_B / (~t2v_B).sum().clamp(min=1),
    }

    # Each sample has a seed of its own, so that a rank draws its own large tensors alone.
    large: dict[str, list[Tensor]] = {"noise": [], "source": [], "keep_BT": []}
    for seed in seeds:
        g.manual_seed(seed)
        large["noise"].append(torch.randn(latents.shape[1:], generator=g))
        if cfg.text_flow == "embedding":
            large["source"].append(torch.randn(T, cfg.dim, generator=g))
        else:
            noise = torch.randint(cfg.vocab, (T,), generator=g)
            large["source"].append(torch.full((T,), cfg.vocab) if cfg.mask_source else noise)
        large["keep_BT"].append(torch.rand(T, generator=g))

    drawn = {k: v[mine] for k, v in small.items()} | {k: torch.stack(v) for k, v in large.items()}
    return Draws(**{name: moved(value, latents.device) for name, value in drawn.items()})


def moved(x: Tensor, device: torch.device) -> Tensor:
    """Copies without waiting for a GPU's queue; a copy from pageable memory would wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def part_of(batch: dict[str, Tensor], draws: tuple, part: slice) -> tuple[dict, tuple]:
    """Some samples of a batch, and their draws."""
    rows = {k: v if k == "null_context" else v[part] for k, v in batch.items()}
    return rows, draws._make(x[part] for x in draws)


def drop_condition(batch: dict[str, Tensor], draws: Draws) -> Tensor:
    """The prompt's context, or one of the two nulls: the encoded empty string, or zeros."""
    null = torch.where(draws.zeros_B[:, None, None], 0.0, batch["null_context"])
    return torch.where(draws.null_B[:, None, None], null, batch["context"])


def text_rows(model: UniViGU, batch: dict[str, Tensor], draws: Draws, config: TrainConfig):
    """(rows given to the network, targets, times): noised target text, or the clean prompt at the
    t2v corner.

    Discrete: token ids [B,T] and clean ids with IGNORE where no loss is due. Embedding: vectors and
    velocities [B,T,D]. Rows after EOS are targets too: a caption's length is unknown when it is
    sampled, so the pads are part of it.
    """
    clean = batch["prompt_tokens"] if config.stage == "recall" else batch["caption_tokens"]
    corner = draws.t2v_B[:, None]
    t_B = torch.where(draws.t2v_B, 1.0, draws.t_B)
    if model.cfg.text_flow == "discrete":
        noised = flow.corrupt_tokens(
            clean, draws.source, draws.t_B, config.text_exponent, draws.keep_BT
        )
        rows = torch.where(corner, batch["prompt_tokens"], noised)
        return rows, clean.masked_fill(corner, IGNORE), flow.text_time(t_B)
    ids = torch.where(corner, batch["prompt_tokens"], clean)
    vectors = flow.unit_vectors(model.vocab_embed(ids))
    t = t_B[:, None, None]
    return (
        (1 - t) * draws.source + t * vectors,
        vectors.detach() - draws.source,
        flow.text_time(t_B),
    )


def text_loss(model: UniViGU, rows, targets, t_B: Tensor, config: TrainConfig) -> Callable:
    """Per token [B,T], of (h, the head's weight and bias); meaningless at the t2v corner."""
    if model.cfg.text_flow == "embedding":
        return lambda h, weight, bias: F.mse_loss(
            F.linear(h, weight, bias).float(), targets, reduction="none"
        ).mean(-1)
    if config.text_loss == "kl":
        kl = partial(
            flow.generalized_kl,
            clean_BT=targets.clamp(min=0),
            noised_BT=rows,
            t_B=t_B,
            exponent=config.text_exponent,
        )
        return lambda h, weight, bias: kl(F.linear(h, weight, bias))
    vocab_loss = model.ops.vocab_loss
    return lambda h, weight, bias: vocab_loss(h, weight, bias, targets, IGNORE)


def weighted(loss: Tensor, share_B: Tensor, of: int) -> Tensor:
    """sum_b share_b * mean loss_b, each mean over `of` elements; loss [B, ...] holds a rank's of
    them. A sample of share 0 may hold NaN."""
    per_sample = loss.flatten(1).sum(1) / of
    return torch.where(share_B > 0, per_sample * share_B, 0.0).sum()


class Objective(nn.Module):
    """sequence: the `engine.parallel.sequence.Sequence` whose ranks share every sample, or None."""

    def __init__(self, model: UniViGU, config: TrainConfig, sequence=None):
        super().__init__()
        self.model, self.config, self.sequence = model, config, sequence

    @property
    def networks(self) -> dict[str, UniViGU]:
        """Those that are trained, by what begins the names of their parameters."""
        return {"": self.model}

    def forward(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
        """(video loss, text loss): this rank's addends of means over the global batch, each over
        its own counted tokens, so that neither the length of a caption nor that of a video sets the
        balance (the paper's lambda_v = 1)."""
        model, config = self.model, self.config
        x, velocity = flow.corrupt_video(batch["latents"], draws.noise, draws.sigma_B)
        rows, targets, t_text = text_rows(model, batch, draws, config)
        lengths = torch.where(draws.t2v_B, batch["prompt_lengths"], rows.shape[1])

        # Counted before the cut: a rank of a sequence group holds a part of each sample.
        video_numbers, text_numbers = x[0].numel(), rows.shape[1]
        part = None
        if self.sequence is not None:
            part = self.sequence.part(x.shape, rows.shape[1], model)
            x, velocity = (x[part.box] for x in (x, velocity))
            rows, targets = (x[:, part.text] for x in (rows, targets))

        context = model.cond_text_embedder(drop_condition(batch, draws).to(model.dtype))
        context = [context] * len(model.blocks)
        conditions = model.conditions(flow.TIMES * draws.sigma_B, t_text)
        h_BLD = model.features(x, rows, conditions, context, lengths, part=part)

        video = F.mse_loss(model.velocity(h_BLD, x.shape).float(), velocity, reduction="none")
        per_token = text_loss(model, rows, targets, draws.t_B, config)
        text = model.text_head(
            h_BLD[:, h_BLD.shape[1] - rows.shape[1] :],
            lambda *head: weighted(per_token(*head), draws.text_share_B, text_numbers),
        )
        return weighted(video, draws.video_share_B, video_numbers), text
