"""Kernels of a training step, compiled in parallel before the first one of each size."""

from dataclasses import replace

import torch
from torch import Tensor

from engine.train.objective import Draws
from engine.train.step import TrainState, backward, draws_of


class Ahead:
    """On a CUDA device, in a single process and without a teacher, which is on no meta device; else
    nothing is compiled and nothing imported."""

    def __init__(self, state: TrainState, progress: bool = True):
        self.state, self.progress, self.seen = state, progress, set()

    def __call__(self, batch: dict[str, Tensor]) -> int:
        """Compiles what a step on a batch of these shapes launches; returns how many kernels that
        were."""
        device, key = self.state.skipped.device, tuple(x.shape for x in batch.values())
        alone = self.state.world is None and not self.state.teacher
        if device.type != "cuda" or not alone or key in self.seen:
            return 0
        from univigu_kernels import ahead

        count = ahead.prepare(lambda: rehearse(self.state, batch), device, self.progress)
        self.seen.add(key)
        return count


def rehearse(state: TrainState, batch: dict[str, Tensor]) -> None:
    """The forward and backward passes of a step on meta tensors; optimizers launch nothing of
    ours."""
    from univigu_kernels import ahead

    objective = ahead.on_meta(state.objective, state.model.ops)
    draws = Draws(*(x.to("meta") for x in draws_of(state, batch)))
    skipped = torch.zeros((), device="meta")
    twin = replace(state, objective=objective, skipped=skipped)
    backward(twin, {name: x.to("meta") for name, x in batch.items()}, draws)
