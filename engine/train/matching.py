"""Distribution matching (Yin et al., arXiv 2311.18828 and 2405.14867): the clips that a student
makes must be as probable as its teacher finds them.

A student that only follows its teacher's runs makes what lies between the clips that it cannot tell
apart. Here it makes a clip by itself, which is noised. What the guided teacher would denoise it to,
less what a network would that knows the student's clips alone, is the direction in which clips
become more probable for the teacher than for the student; the clip is told to move along it. That
network, the score, begins as the teacher and is trained beside the student, on its clips.

The text rows are clean throughout: the prompt in t2v, else the teacher's caption.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import flow
from engine.config import TrainConfig
from engine.model import UniViGU
from engine.train.cast import Cast, Runs
from engine.train.objective import weighted

SMALLEST = 1e-3  # of the distance by which a direction is divided


def score_of(teacher: UniViGU, student: UniViGU, config: TrainConfig) -> UniViGU:
    """The network that will know the student's clips: the teacher, where the student is and in its
    dtype, as it is trained beside it. No text is read from it."""
    device = next(student.parameters()).device
    with torch.random.fork_rng():
        score = UniViGU(teacher.cfg, device, student.dtype, student.ops)
    score.load_state_dict(teacher.state_dict())
    score.text_head.requires_grad_(False)
    score.recompute = config.recompute
    return score


def velocity(network: UniViGU, x: Tensor, sigma_B: Tensor, tokens: Tensor, cast: Cast) -> Tensor:
    """The velocity of latents at noise levels sigma_B, with clean text rows."""
    context = network.cond_text_embedder(cast.context.to(network.dtype))
    conditions = network.conditions(*cast.times(sigma_B, 1.0))
    context = [context] * len(network.blocks)
    h_BLD = network.features(x, tokens, conditions, context, cast.lengths_B, keep="video")
    return network.velocity(h_BLD, x.shape).to(x.dtype)


def guided(teacher: UniViGU, x: Tensor, sigma_B: Tensor, tokens: Tensor, cast: Cast, scale: float):
    """The teacher's `velocity`, with guidance."""
    twice = Cast(*(part.repeat(2, *[1] * (part.ndim - 1)) for part in cast))
    twice = twice._replace(context=torch.cat([cast.context, cast.null_context]))
    given = x.repeat(2, 1, 1, 1, 1), sigma_B.repeat(2), tokens.repeat(2, 1)
    found, null = velocity(teacher, *given, twice).chunk(2)
    return null + scale * (found - null)


@torch.no_grad()
def direction(
    clip: Tensor, noised: Tensor, sigma_B: Tensor, wanted: Tensor, found: Tensor
) -> Tensor:
    """From what clips of the student's are to those that the teacher would rather see, by how far
    each clip is from what the teacher denoises it to (eq. 8 of the first paper).

    wanted, found: velocities at `noised`, of the teacher and of the score.
    """
    sigma = sigma_B.view(-1, 1, 1, 1, 1)
    far = (clip - (noised - sigma * wanted)).abs().mean((1, 2, 3, 4), keepdim=True)
    return sigma * (found - wanted) / far.clamp(min=SMALLEST)


class Matching(nn.Module):
    """score: is trained; the student's clips alone teach it."""

    def __init__(self, score: UniViGU, config: TrainConfig):
        super().__init__()
        self.score, self.config = score, config

    def forward(
        self, teacher: UniViGU, clip: Tensor, tokens: Tensor, cast: Cast, runs: Runs
    ) -> tuple[Tensor, Tensor]:
        """(half the square of the direction, whose gradient is the direction; squared error of the
        score's velocity), addends of means as those of `Distillation`. clip: with its gradient."""
        (sigma_B, other_B), (noise, other) = runs.sigma_B2.unbind(1), runs.noises.unbind(1)
        own, numbers = clip.detach(), clip[0].numel()
        with torch.no_grad():
            noised, _ = flow.corrupt_video(own, noise, sigma_B)
            wanted = guided(teacher, noised, sigma_B, tokens, cast, self.config.guidance_scale)
            found = velocity(self.score, noised, sigma_B, tokens, cast)
            goal = own + direction(own, noised, sigma_B, wanted, found)
        match = weighted(0.5 * (clip - goal).square(), runs.match_share_B, numbers)

        noised, flowing = flow.corrupt_video(own, other, other_B)
        found = velocity(self.score, noised, other_B, tokens, cast)
        missed = F.mse_loss(found, flowing, reduction="none")
        return match, weighted(missed, runs.video_share_B, numbers)
