"""What stage distill draws for a batch, and what of a batch no step of a run changes.

Legend: B samples, T text rows, K steps of the student.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine import flow
from engine.config import TrainConfig
from engine.model import UniViGU
from engine.train.objective import draw, moved

LEVELS = 0.02, 0.98  # noise levels, before the shift, at which distributions are compared


class Runs(NamedTuple):
    """Where some samples' runs start. seeds_B: of the draws of the teacher's tokens; keep_BKT: for
    each step of the student, what hides its tokens. sigma_B2, noises: noise levels and noise
    [B,2,...] of `engine.train.matching`, [B,0,...] without it; match_share_B: what a sample counts
    there. The others are as in `engine.train.objective.Draws`."""

    noise: Tensor
    source: Tensor
    seeds_B: Tensor
    keep_BKT: Tensor
    sigma_B2: Tensor
    noises: Tensor
    match_share_B: Tensor
    t2v_B: Tensor
    v2t_B: Tensor
    video_share_B: Tensor
    text_share_B: Tensor


def draw_runs(
    batch: dict[str, Tensor], config: TrainConfig, model: UniViGU, step: int, first=0, total=None
) -> Runs:
    """Draws for the samples of a global batch as `engine.train.objective.draw` does. Training steps
    take the numbers of `config.student_steps` in turn. In the warm-up nothing is matched, for the
    score knows nothing of the student yet."""
    drawn, (B, T) = draw(batch, config, model, step, first, total), batch["prompt_tokens"].shape
    steps = config.student_steps[step % len(config.student_steps)]
    pair = 2 if config.matching else 0

    g = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    seeds_B = torch.randint(2**62, (total or B,), generator=g)[first : first + B]
    keep, levels, noises = [], [], []
    for seed in seeds_B.tolist():
        keep.append(torch.rand(steps, T, generator=g.manual_seed(seed)))
        levels.append(torch.rand(pair, generator=g))
        noises.append(torch.randn(pair, *drawn.noise.shape[1:], generator=g))

    u_B2 = LEVELS[0] + (LEVELS[1] - LEVELS[0]) * torch.stack(levels)
    own = {"seeds_B": seeds_B, "keep_BKT": torch.stack(keep), "noises": torch.stack(noises)}
    own |= {"sigma_B2": flow.shifted(u_B2, config.flow_shift)}
    own = {name: moved(x, drawn.noise.device) for name, x in own.items()}
    own |= {"match_share_B": drawn.video_share_B * (step >= config.warmup)}
    return Runs(**own, **{n: getattr(drawn, n) for n in Runs._fields if n not in own})


class Cast(NamedTuple):
    """What no step of a run changes, by sample."""

    context: Tensor
    null_context: Tensor
    lengths_B: Tensor
    t2v_B: Tensor
    v2t_B: Tensor

    def times(self, sigma: float | Tensor, t: float) -> tuple[Tensor, Tensor]:
        """The network's times of video and text, each [B]: of what moves, by its noise, one level
        or [B], and its flow time; of what does not, 0."""
        zero_B = torch.zeros_like(self.t2v_B, dtype=torch.float32)
        video_B = torch.where(self.v2t_B, zero_B, flow.TIMES * sigma)
        return video_B, torch.where(self.t2v_B, zero_B, text_time(t))

    def moved(self, latents: Tensor, before: Tensor) -> Tensor:
        """Latents, of which v2t's stay as they were."""
        return torch.where(self.v2t_B[:, None, None, None, None], before, latents)

    def said(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Tokens, of which t2v's stay as they were."""
        return torch.where(self.t2v_B[:, None], before, tokens)


def cast_of(batch: dict[str, Tensor], runs: Runs) -> Cast:
    context = batch["context"] * ~runs.v2t_B[:, None, None]
    nulls = batch["null_context"].expand_as(context)
    lengths_B = torch.where(runs.t2v_B, batch["prompt_lengths"], runs.source.shape[1])
    return Cast(context, nulls, lengths_B, runs.t2v_B, runs.v2t_B)


def text_time(t: float) -> float:
    """`flow.text_time` of a number."""
    return float(round(flow.TIMES * (1 - t)))
