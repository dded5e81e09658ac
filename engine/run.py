"""A sampling run: its steps one after another, never far ahead of the device, and what they gave.

Legend: B samples, T text rows, D width of the model.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from engine import flow
from engine.errors import NonFinite, UsageError
from engine.model import UniViGU
from engine.sample import Kind, Request, Step, WholeRun


class Mark(Protocol):
    """A place in a device's queue, such as a recorded `torch.cuda.Event`."""

    def synchronize(self) -> None:
        """Waits until the device has come to it."""


def cuda_mark(device: torch.device) -> Mark:
    """A mark behind what a CUDA device was given so far. Whoever waits for it sleeps."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


class Pace:
    """Keeps the host at most one step ahead of a device that works behind it.

    mark: makes a `Mark` behind what the device was given so far.
    """

    def __init__(self, mark: Callable[[], Mark]):
        self.mark = mark
        self.last: Mark | None = None

    def queued(self) -> None:
        """Comes after a step was queued; waits until the device is done with the one before it."""
        before, self.last = self.last, self.mark()
        if before is not None:
            before.synchronize()


class Run:
    """One sampling run. `steps()` advances it; between two steps `latents` and `tokens` may be read
    or replaced, and `done` says how many evaluations the device has finished.

    graphs: an `engine.graphs.Graphs` that captures the steps; texts of different lengths run
        eagerly, for attention libraries need the lengths on the host.
    ranks: the `engine.parallel.Ranks` that make this run together, each with the same request;
        their steps run eagerly, for no capture with collectives in it was ever tried.

    Errors: UsageError.
    """

    def __init__(self, model: UniViGU, request: Request, graphs=None, ranks=None):
        schedule, every = request.schedule, request.refresh_every
        if every > 1 and schedule.coefficients is not None:
            raise UsageError(f"sample: refresh_every must be 1 where the video moves; got {every}.")

        request = (request if ranks is None else ranks.same(request)).without_padding()
        share = WholeRun() if ranks is None else ranks.share(model, request)
        self.schedule, self.kinds, self.done = schedule, request.kinds, 0

        with torch.no_grad():
            step = Step(model, request, share)
        self.graphs = graphs if request.text_lengths is None and ranks is None else None
        self.step = step if self.graphs is None else self.graphs.adopt(step)
        self.step.allocate()

        # A CPU has finished a step by the time that the call for it returns.
        device = self.step.device
        self.pace = Pace(partial(cuda_mark, device)) if device.type == "cuda" else None

    @property
    def latents(self) -> Tensor:
        return self.step.video.x.clone()

    @latents.setter
    def latents(self, value: Tensor) -> None:
        self.step.video.x.copy_(value)

    @property
    def tokens(self) -> Tensor:
        return self.step.tokens.clone()

    @tokens.setter
    def tokens(self, value: Tensor) -> None:
        self.step.tokens.copy_(value)

    @property
    def committed(self) -> Tensor:
        """Bool [B,T]: tokens that stay, with commit="confidence"; else none."""
        return self.step.committed.clone()

    @torch.no_grad()
    def steps(self) -> Iterator[int]:
        """Runs the loop, yielding the index of each evaluation once it is queued.

        The host stays at most one evaluation ahead of a GPU: when index i is yielded, those before
        it are done and it alone may still be running, so a caller who stops there stops the device
        too. What is read from `latents` is what evaluation i leaves, for the device keeps the
        order. The last is yielded when it is done; on a CPU every one is.

        Errors: NonFinite; on a GPU it is raised after the last evaluation, for only then does the
        host read what the device found.
        """
        for i, kind in enumerate(self.kinds):
            if self.graphs is None:
                self.step(kind)
            else:
                self.graphs.run(self.step, kind)

            if self.pace is not None:
                self.pace.queued()
            finished = self.pace is None or i == len(self.kinds) - 1
            if finished:
                self._check()  # waits for the device
            self.done = i + finished
            yield i

        if self.schedule.last_argmax:
            self.step.last_argmax()

    @torch.no_grad()
    def cache_change(self) -> float:
        """By how much the video's K and V that are in the cache differ from those that the last
        evaluation would give for the final tokens: the norm of the difference over the norm."""
        step, kept = self.step, self.step.caches
        if kept is None:
            return 0.0
        step.caches = step.new_caches()
        step.index.fill_(step.evaluations - 1)
        step.features(Kind(False, True), step.video.x, step.tokens)
        fresh, step.caches = step.caches, kept
        V = step.video.x[0, 0].numel() // 4
        pairs = [
            (old[:, :V].float(), new[:, :V].float())
            for layers in zip(kept, fresh, strict=True)
            for old, new in zip(*layers, strict=True)
        ]
        change = sum((old - new).square().sum() for old, new in pairs)
        return (change / sum(new.square().sum() for _, new in pairs)).sqrt().item()

    def _check(self) -> None:
        """Evaluates a step that was not finite once more, to name the first such block."""
        step = self.step
        failed = step.failed.item()
        if failed == step.evaluations:
            return

        blocks = step.model.blocks
        bad: list[int] = []
        hooks = [
            block.register_forward_hook(
                lambda _, __, out, n=n: None if out[0].isfinite().all() else bad.append(n)
            )
            for n, block in enumerate(blocks)
        ]

        try:
            step.index.fill_(failed)
            kind = self.kinds[failed]._replace(cached=False)
            step.features(kind, step.seen_latents, step.seen_tokens)
        finally:
            for hook in hooks:
                hook.remove()

        fine = step.seen_latents.isfinite().all()
        first = step.share.least(min(bad, default=len(blocks)))
        where = "the heads" if first == len(blocks) else f"block {first}"
        where = where if fine else "the input latents"
        raise NonFinite(
            f"sample: the model's output must be finite; "
            f"got NaN or Inf in step {failed}, first in {where}. "
            f"Try kernels=reference or dtype float32."
        )


def cache_drift(exact: Tensor, found: Tensor, kv_change: float) -> list[dict[str, float]]:
    """Per sample, the share of equal text rows [B,T] or, of vectors [B,T,D], their mean cosine; and
    `Run.cache_change` of the batch."""
    if exact.is_floating_point():
        agreement = torch.cosine_similarity(exact.float(), found.float(), -1).mean(-1)
    else:
        agreement = (exact == found).float().mean(-1)
    return [{"text_agreement": a, "kv_change": kv_change} for a in agreement.tolist()]


def decode_tokens(model: UniViGU, tokens: Tensor) -> Tensor:
    """Text rows -> token ids [B,T]: themselves, or the nearest rows of the embedding matrix."""
    if model.cfg.text_flow == "embedding":
        return flow.nearest_tokens(model.vocab_embed.weight, tokens)
    return tokens
