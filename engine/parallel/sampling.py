"""Sampling on several ranks: what a rank has of a run, and how their results become one.

Every rank holds all latents and tokens and moves them, which is cheap. The network, which is not,
runs on a share: in the dimension sp on a box of the latents and a slice of the text, see
`engine.parallel.sequence`; in cfg on the prompts (rank 0) or on their nulls (rank 1). Velocities
and text features are joined before they decide anything, so that all ranks go on alike, bit for
bit. Without guidance, as in v2t, both ranks of cfg compute the same.
"""

from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UsageError
from engine.parallel.sequence import all_gather_single
from engine.share import Whole

RUNS = count()  # of this process; the world's store keeps what was agreed on under a name for good


class Share(Whole):
    """A rank's. part: a `SequencePart` or None; pair: the group of cfg or None."""

    def __init__(self, part, pair: dist.ProcessGroup | None, guided: bool, device: torch.device):
        self.part, self.pair, self.device = part, pair, device
        self.splits = guided and pair is not None
        if part is not None:
            self.box, self.text = part.box, part.text

    def contexts(self, context_BCE: Tensor) -> Tensor:
        return context_BCE.chunk(2)[dist.get_rank(self.pair)] if self.splits else context_BCE

    def join_video(self, velocities: Tensor) -> Tensor:
        if self.part is not None:
            velocities = self.part.join_video(velocities)
        if not self.splits:
            return velocities
        both = velocities.new_empty(2 * len(velocities), *velocities.shape[1:])
        all_gather_single(both, velocities.contiguous(), self.pair)
        return both

    def join_text(self, h_BTD: Tensor) -> Tensor:
        if self.part is not None:
            h_BTD = self.part.join_text(h_BTD)
        if self.splits:
            h_BTD = h_BTD.contiguous()
            dist.broadcast(h_BTD, group=self.pair, group_src=0)
        return h_BTD

    def least(self, number: int) -> int:
        found = torch.tensor(number, device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MIN)
        return found.item()


class Ranks:
    """All ranks of an `engine.parallel.World`, each with a whole copy of the model, as one sampler.
    Errors: UsageError."""

    def __init__(self, world, model):
        if world.data_size > 1:
            raise UsageError(
                "sample: dp_replicate and dp_shard must be 1, for all ranks make the same samples; "
                f"got {world.data_size} shares of the data. Use sp or cfg, or fewer processes."
            )
        self.world, self.sequence = world, world.sequence(model.cfg.heads)
        self.pair = world.mesh.get_group("cfg") if world.config.cfg > 1 else None

    def inputs(self, tensors: list[Tensor | None], **settings) -> list[Tensor | None]:
        """Rank 0's on all of them, whatever a device made of the same prompt or video. Errors:
        UsageError where shapes or settings differ, or where a cache would lie on several ranks."""
        shapes = [None if t is None else list(t.shape) for t in tensors]
        self.world.agree(f"sampling run {next(RUNS)}", {"shapes": shapes} | settings)
        found = [None if t is None else t.to(self.world.device).clone() for t in tensors]
        for tensor in found:
            if tensor is not None:
                dist.broadcast(tensor, 0)
        if settings["refresh_every"] > 1 and self.sequence is not None:
            raise UsageError(
                "sample: refresh_every must be 1 where a sample's rows lie on several ranks; "
                f"got {settings['refresh_every']}. Use video_cache exact, or sp 1."
            )
        return found

    def share(self, model, latents: Tensor, tokens: Tensor, guided: bool) -> Share:
        part = None
        if self.sequence is not None:
            part = self.sequence.part(latents.shape, tokens.shape[1], model)
        return Share(part, self.pair, guided, self.world.device)
