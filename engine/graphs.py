"""CUDA graphs of a sampling step: capture, replay and release. The model does not know.

A `sample.Step` reads and writes tensors that stay where they are, and takes nothing from the host,
so that one capture serves every evaluation of its kind and every later run of the same shapes:
`adopt` moves a run's numbers into the tensors that were captured.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from engine.sample import Kind, Step


class Report(NamedTuple):
    """One capture: seconds that it took, bytes that the shared pool grew by."""

    kind: Kind
    seconds: float
    bytes: int


def capture(function: Callable[[], None], state: list[Tensor], pool) -> Callable[[], None]:
    """Captures `function` on CUDA and returns the replay. It runs once before, to compile kernels;
    `state` is put back after that."""
    before = [tensor.clone() for tensor in state]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    _drop_workspaces()
    with torch.cuda.graph(graph, pool=pool):
        function()
    _drop_workspaces()
    return graph.replay


def _drop_workspaces() -> None:
    """Frees what cuBLAS keeps for each stream, up to 32 MiB, until its next product. Kept from one
    capture to the next, a graph would read memory of another pool, also after that was released;
    and the pool of the first would never be given back whole."""
    vars(torch._C)["_cuda_clearCublasWorkspaces"]()  # of builds with CUDA alone


class Graphs:
    """Captured steps, at most `limit` sets of static tensors, the least recently used goes first.

    All share one memory pool: they never run at the same time. `capture` is the function above, or
    any with its signature.
    """

    def __init__(self, limit: int = 4, capture: Callable = capture):
        self.limit, self.capture = limit, capture
        self.steps: OrderedDict[tuple, Step] = OrderedDict()
        self.replays: dict[int, dict[Kind, Callable[[], None]]] = {}  # by id of an adopted step
        self.reports: list[Report] = []
        self._pool = None

    def adopt(self, step: Step) -> Step:
        """A step of the same shapes that was captured before, with the numbers of `step`; or `step`
        itself, from now on static."""
        key = step.key()
        if key in self.steps:
            self.steps.move_to_end(key)
            self.steps[key].load(step)
            return self.steps[key]
        while len(self.steps) >= self.limit:
            self._drop(next(iter(self.steps)))
        self.steps[key], self.replays[id(step)] = step, {}
        return step

    def run(self, step: Step, kind: Kind) -> None:
        """Replays one evaluation of an adopted step; captures it first where it is new."""
        replays = self.replays.get(id(step))
        if replays is None:
            raise ValueError(
                "graphs: step must be one that adopt returned and that was not released since; "
                "got another. Call adopt again."
            )
        if kind not in replays:
            start, before = time.perf_counter(), _reserved(step)
            if self._pool is None and step.device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            replays[kind] = self.capture(lambda: step(kind), step.state(), self._pool)
            elapsed = time.perf_counter() - start
            self.reports.append(Report(kind, elapsed, _reserved(step) - before))
        replays[kind]()

    def _drop(self, key: tuple) -> None:
        del self.replays[id(self.steps.pop(key))]

    def release(self) -> int:
        """Gives graphs, static tensors and pool back; the next run captures again. -> bytes of the
        pool that stay reserved: those of tensors that a caller still holds. On an H200 36 MiB
        stayed in bf16 and 71 in fp32 while cuBLAS's workspaces were in it; without them it has not
        run yet."""
        self.steps.clear()
        self.replays.clear()
        self.reports.clear()
        pool, self._pool = self._pool, None
        if pool is None:
            return 0
        torch.cuda.empty_cache()
        segments = torch.cuda.memory_snapshot()
        return sum(x["total_size"] for x in segments if tuple(x["segment_pool_id"]) == tuple(pool))


def _reserved(step: Step) -> int:
    return torch.cuda.memory_reserved(step.device) if step.device.type == "cuda" else 0
