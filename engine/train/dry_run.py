"""A training run without arithmetic: what it needs of each rank's memory, and its FLOPs.

The real step runs on fake tensors, which have shapes and no numbers, in a process group of any size
that sends nothing; every storage that torch allocates is counted while it lives. Predictions: what
blocks keep is what the kernels of this machine's CPU keep; workspaces of libraries, the CUDA
context (about 0.5 GB), NCCL's buffers and fragmentation come on top.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from engine.config import MeshConfig, ModelConfig, TrainConfig
from engine.errors import UsageError
from engine.model import UniViGU, forget_rotary
from engine.parallel import World
from engine.planning import train_flops
from engine.recompute import POLICIES
from engine.train.cast import Runs
from engine.train.distill import grid_of, step_flops
from engine.train.objective import Draws
from engine.train.step import TrainState, advance


class Allocations(TorchDispatchMode):
    """A context that counts bytes of the storages that operations made: live now, and at most since
    `peak` was set."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.sizes: dict[int, int] = {}

    def _set(self, key: int, size: int) -> None:
        self.live += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.live)

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **(kwargs or {}))
        for x in tree_iter(found):
            # A DTensor says that it has the bytes of all ranks; what it holds was counted.
            if not isinstance(x, Tensor) or isinstance(x, DTensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self._set(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self._drop, storage._cdata)
        return found

    def __enter__(self):
        """FSDP frees what it gathered by resizing storages, which is no operation."""
        self.resize = resize = torch.UntypedStorage.resize_

        def counted(storage, size):
            resize(storage, size)
            if storage._cdata in self.sizes:
                self._set(storage._cdata, size)

        torch.UntypedStorage.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error):
        torch.UntypedStorage.resize_ = self.resize
        return super().__exit__(*error)


class Footprint(NamedTuple):
    """Bytes of one rank. state: parameters, masters, average and moments; peak: at most in a
    step."""

    state: int
    peak: int


@contextmanager
def pretended(config: MeshConfig, processes: int) -> Iterator[World]:
    """Rank 0 of a world whose other ranks do not exist. Errors: UsageError."""
    shape = config.shape(processes)
    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        yield World(MeshConfig(*shape), torch.device("cpu"), FakeStore(), 0, processes)
    finally:
        dist.destroy_process_group()


def no_draws(
    cfg: ModelConfig, config: TrainConfig, B: int, latents: tuple[int, int, int], T: int
) -> Draws | Runs:
    """Zeros in the shapes of a step's random numbers."""
    floats, ids = torch.zeros(B), torch.zeros(B, T, dtype=torch.int64)
    flags, noise = torch.zeros(B, dtype=torch.bool), torch.zeros(B, 16, *latents)
    if config.stage == "distill":
        hidden = torch.zeros(B, max(config.student_steps), T)
        pair = 2 if config.matching else 0
        more = torch.zeros(B, pair), torch.zeros(B, pair, 16, *latents), floats
        return Runs(noise, ids, ids[:, 0], hidden, *more, flags, flags, floats, floats)
    words = torch.zeros(B, T, cfg.dim) if cfg.text_flow == "embedding" else ids
    hidden = torch.zeros(B, T)
    return Draws(noise, floats, floats, words, hidden, *[flags] * 4, floats, floats)


def footprint(
    cfg: ModelConfig,
    config: TrainConfig,
    dtype: torch.dtype,
    latents: tuple[int, int, int],
    text_rows: int,
    context_rows: int,
    world: World | None = None,
    teacher: ModelConfig | None = None,
) -> Footprint:
    """Measures the bytes of the second step on latents (F, Y, X), when moments exist; of stage
    distill with most steps of the student.

    world: a `pretended` one. teacher: stage distill's, whose weights count as state.

    It replaces a method of torch while it runs, so it is not thread-safe.
    """
    ranks = 1 if world is None else world.data_size
    if config.batch_size % ranks:
        raise UsageError(
            f"train: --batch-size must be a multiple of the {ranks} ranks with samples of their "
            f"own; got {config.batch_size}. Change it, or the mesh."
        )
    B, T = config.batch_size // ranks, text_rows

    forget_rotary()  # real tables do not mix with fake ones, nor the other way round
    if teacher is not None:
        grid_of(config.teacher_steps, config.flow_shift)  # kept, for fake tensors have no numbers
    try:
        with FakeTensorMode(), Allocations() as memory:
            draws, ids = no_draws(cfg, config, B, latents, T), torch.zeros(B, T, dtype=torch.int64)
            guide = None if teacher is None else UniViGU(teacher, dtype=dtype)
            batch = {
                "latents": draws.noise,
                "prompt_tokens": ids,
                "prompt_lengths": ids[:, 0],
                "caption_tokens": ids,
                "context": torch.zeros(B, context_rows, cfg.text_dim),
                "null_context": torch.zeros(context_rows, cfg.text_dim),
            }

            state = TrainState.create(UniViGU(cfg, dtype=dtype), config, world, teacher=guide)
            advance(state, batch, draws)
            resident = memory.peak = memory.live
            advance(state, batch, draws)
            return Footprint(resident, memory.peak)
    finally:
        forget_rotary()


def report(
    cfg: ModelConfig,
    config: TrainConfig,
    dtype: torch.dtype,
    size: tuple,
    mesh: MeshConfig,
    processes: int,
    teacher: ModelConfig | None = None,
) -> str:
    """A table by policy of `engine.recompute`.

    size: a key of `LatentSet.buckets`. teacher: stage distill's."""
    (_, *latents), (text_rows,), (context_rows, _) = size
    rows = {"video_rows": prod(latents) // 4, "text_rows": text_rows}
    shape = mesh.shape(processes)
    layout = ", ".join(f"{k} {v}" for k, v in zip(mesh.AXES[:3], shape[:3], strict=True))

    lines = [
        f"Predicted, not measured: rank 0 of {processes} ({layout}); a batch of "
        f"{config.batch_size}, {sum(rows.values())} rows each, {str(dtype)[6:]}.",
        f"{'--recompute':<12} {'state':>9} {'peak':>9} {'TFLOP a step':>13}",
    ]

    with pretended(mesh, processes) if processes > 1 else nullcontext() as world:
        for policy in POLICIES:
            asked = replace(config, recompute=policy)
            given = tuple(latents), text_rows, context_rows, world, teacher
            found = footprint(cfg, asked, dtype, *given)
            sizes = rows | {"samples": config.batch_size, "context_rows": context_rows}
            if teacher is None:
                flops = train_flops(cfg, recompute=policy, **sizes)
            else:  # the mean of the steps that take turns
                turns = range(len(config.student_steps))
                each = [
                    step_flops(cfg, teacher, config, i, recompute=policy, **sizes) for i in turns
                ]
                flops = sum(each) / len(each)
            lines.append(
                f"{policy:<12} {found.state / 1e9:6.1f} GB {found.peak / 1e9:6.1f} GB "
                f"{flops / processes / 1e12:13.1f}"
            )
    return "\n".join(lines)
