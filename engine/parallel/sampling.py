"""Sampling on several ranks: what a rank has of a run, and how their results become one.

Every rank holds all latents and tokens and moves them, which is cheap. The network, which is not,
runs on a share: in the dimension sp on a box of the latents and a slice of the text, see
`engine.parallel.sequence`; in cfg on the prompts (rank 0) or on their nulls (rank 1). Velocities
and text features are joined before they decide anything, so that all ranks go on from the same
bits. Without guidance, as in v2t, both ranks of cfg compute the same.
"""

from dataclasses import replace
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from engine.errors import UsageError
from engine.parallel.sequence import all_gather_single
from engine.sample import WholeRun

TENSORS = ("latents", "tokens", "context", "null_context")  # of a request
SETTINGS = ("guidance", "text_lengths", "temperature", "commit", "refresh_every")
RUNS = count()  # of this process; the world's store keeps what was agreed on under a name for good


class Share(WholeRun):
    """A rank's share of a run.

    part: a `SequencePart` or None.
    pair: the group of cfg or None.
    """

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

    def same(self, request):
        """An `engine.sample.Request` with rank 0's tensors on every rank, so that encoders that
        round differently cannot make ranks diverge. Errors: UsageError where shapes or settings
        differ, or where a cache would be cut over several ranks."""
        tensors = {name: getattr(request, name) for name in TENSORS}
        settings = {name: getattr(request, name) for name in SETTINGS}
        settings |= {"evaluations": len(request.schedule), "seeds": list(request.seeds)}
        shapes = [None if t is None else list(t.shape) for t in tensors.values()]
        self.world.check_same(f"sampling run {next(RUNS)}", {"shapes": shapes} | settings)

        given = {name: t for name, t in tensors.items() if t is not None}
        found = {name: t.to(self.world.device).clone() for name, t in given.items()}
        for tensor in found.values():
            dist.broadcast(tensor, 0)
        if request.refresh_every > 1 and self.sequence is not None:
            raise UsageError(
                "sample: refresh_every must be 1 where several ranks share a sample's rows; "
                f"got {request.refresh_every}. Use video_cache exact, or sp 1."
            )
        return replace(request, **found)

    def share(self, model, request) -> Share:
        """This rank's share of a request."""
        part = None
        if self.sequence is not None:
            part = self.sequence.part(request.latents.shape, request.tokens.shape[1], model)
        return Share(part, self.pair, request.guided, self.world.device)
