"""What comes before steps on a GPU: kernels compiled ahead; CUDA graphs of a step, their capture,
replay and release. The model does not know.

A run of new shapes is rehearsed on meta tensors, and what it would launch that was never compiled
is compiled in parallel. A `sample.Step` reads and writes tensors that stay where they are, and
takes nothing from the host, so that one capture serves every evaluation of its kind and every later
run of the same shapes: `adopt` moves a run's numbers into the tensors that were captured.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine import schedule
from engine.config import CLIPS, ModelConfig, PipelineConfig, SamplingConfig, checked
from engine.model import UniViGU
from engine.sample import Kind, Request, Step, WholeRun, collapse


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
        """Gives graphs, static tensors and pool back; the next run captures again. Returns bytes of
        the pool that stay reserved: those of tensors that a caller still holds. On an H200 36 MiB
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


class Ahead:
    """Compiles the kernels of sampling runs before their first step, each shape once. device: where
    the runs will be; on anything but a CUDA device nothing is compiled and nothing imported."""

    def __init__(self, model: UniViGU, device: torch.device | None = None):
        self.model, self.device = model, device or model.vocab_embed.weight.device
        self.seen: set[tuple] = set()

    def __call__(self, request: Request, progress: bool = True) -> int:
        """The number of kernels that were compiled for runs like this. Of latents and tokens the
        shapes alone count, of contexts which rows are equal."""
        if self.device.type != "cuda":
            return 0

        context, null, plan = request.context, request.null_context, request.schedule
        kept, repeats = collapse(context if null is None else torch.cat([context, null]), 64)
        shapes = request.latents.shape, request.tokens.shape, kept.shape
        lengths = request.text_lengths and tuple(request.text_lengths)
        key = (
            (*shapes, repeats, null is None, len(request.seeds), lengths),
            (request.guidance, request.temperature, request.commit, request.refresh_every),
            (len(plan), *plan.video_moves, *plan.text_moves, plan.last_argmax),
        )
        if key in self.seen:
            return 0
        from univigu_kernels import ahead

        count = ahead.prepare(lambda: rehearse(self.model, request), self.device, progress)
        self.seen.add(key)
        return count


@torch.no_grad()
def rehearse(model: UniViGU, request: Request) -> None:
    """Every kind of evaluation of such a run once, and all that comes before and after, on meta
    tensors; contexts keep their numbers, on which shapes depend."""
    from univigu_kernels import ahead

    null = request.null_context
    request = replace(
        request,
        latents=request.latents.to("meta"),
        tokens=request.tokens.to("meta"),
        context=request.context.cpu(),
        null_context=None if null is None else null.cpu(),
    ).without_padding()
    step = Step(ahead.on_meta(model, model.ops), request, WholeRun())
    step.allocate()
    for kind in dict.fromkeys(request.kinds):
        step(kind)
    if request.schedule.last_argmax:
        step.last_argmax()


def warm_up(
    ahead: Ahead,
    config: PipelineConfig,
    mode: str = "t2v",
    batch: int = 1,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    text_rows: int | None = None,
    guidance_scale: float | None = None,
    video_cache: str | int = "exact",
    prompt_tokens: tuple[int, ...] = (20, 32),
    num_inference_steps: int | None = None,
    solver: str | None = None,
    sampler: str = "exact",
    text_steps: int | None = None,
    temperature: float = 1.0,
    commit: str = "jump",
    progress: bool = True,
    sigmas: Sequence[float] | None = None,
    timesteps: Sequence[float] | None = None,
    records: Sequence[tuple[str, SamplingConfig]] = (),
) -> int:
    """See `Pipeline.warm_up`. records: as of `schedule.settle`."""
    asked = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "timesteps": timesteps}
    asked |= {"guidance_scale": guidance_scale, "solver": solver, "sampler": sampler}
    asked |= {"text_steps": text_steps, "temperature": temperature, "commit": commit}
    cfg, still = ahead.model.cfg, mode == "v2t"
    rows = config.text_rows if text_rows is None else text_rows
    plan, scale = _settled(cfg, mode, rows, asked, records)

    checked("warm_up: batch", batch, int, CLIPS, None)
    shape, count = config.shape(num_frames, height, width), 0
    refresh = schedule.refresh_every(video_cache, len(plan)) if still else 1

    # In t2v alone the prompt's length decides a shape: its tokens are the text stream.
    for length in prompt_tokens if mode == "t2v" else prompt_tokens[:1]:
        context, null = torch.zeros(2, batch, config.context_rows, cfg.text_dim)
        null[:, 0] = 1
        context[:, : 0 if still else length] = 1
        text = (batch, min(length, rows) if mode == "t2v" else rows)
        tokens = torch.empty(text, dtype=torch.int64, device="meta")
        if cfg.text_flow == "embedding":
            tokens = torch.empty(*text, cfg.dim, device="meta")

        given = torch.empty(batch, *shape, device="meta"), tokens, context
        guidance = (null, scale) if scale > 1 else (None, 1.0)
        how = None, range(batch), temperature, commit, refresh
        count += ahead(Request(plan, *given, *guidance, *how), progress)
    return count


def _settled(
    cfg: ModelConfig,
    mode: str,
    text_rows: int,
    asked: dict,
    records: Sequence[tuple[str, SamplingConfig]],
) -> tuple[schedule.Schedule, float]:
    """The schedule and the guidance of settings as `schedule.settle` takes them, all checked."""
    asked |= {"mode": mode, "flow_shift": None}
    if mode == "v2t":
        steps, _ = schedule.caption_steps(asked["num_inference_steps"], records)
        asked |= {"num_inference_steps": steps, "guidance_scale": 1.0, "solver": "euler"}
        records = ()

    settings = schedule.settle(asked, records)
    choices = schedule.choices(settings)
    schedule.check_run(cfg, mode, schedule.MODES, text_rows, *choices)
    return schedule.settled(settings), settings["guidance_scale"]
