"""Kernels compiled before they are launched, in processes beside each other.

A model that runs on meta tensors within `rehearsal` notes what it would launch. What of that is not
in Triton's cache is compiled by children, `python -m univigu_kernels.ahead`, which take launches as
lines of JSON and fill the same cache, so the launches themselves find them. No child opens a GPU:
Triton compiles for a capability, and its cache knows no other difference between cards.
"""

import copy
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from queue import SimpleQueue

import torch
from torch import Tensor, nn

from . import _child
from ._card import card_of
from ._triton import (
    INTERPRETED,
    Launch,
    descriptor,
    is_descriptor,
    rehearsal,
    triton,
    triton_missing,
)
from .registry import FOR_TEXT, OPS, Ops


def name_of(launch: Launch) -> str:
    return launch.kernel.fn.__name__.lstrip("_")


def specialised(value) -> str:
    """What of an argument Triton compiles in: a tensor's dtype and whether it begins at a multiple
    of 16 bytes, a descriptor's dtype and box, an integer's 1, multiple of 16 and width."""
    if is_descriptor(value):
        return f"{value.base.dtype} {value.block_shape}"
    if isinstance(value, Tensor):
        return f"{value.dtype}{'' if value.data_ptr() % 16 == 0 else ' off'}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value == 1} {value % 16 == 0} {-(2**31) <= value < 2**31}"
    return "float" if isinstance(value, float) else str(value)


def key_of(launch: Launch) -> tuple[str, ...]:
    """Launches of one key are one compiled kernel."""
    options = (f"{name}={value}" for name, value in sorted(launch.options.items()))
    return name_of(launch), *options, *map(specialised, launch.args)


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """The first launch of each compiled kernel."""
    return list({key_of(launch): launch for launch in reversed(launches)}.values())[::-1]


class _Driver:
    """A GPU that is not there: all that Triton asks of one to compile for it."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton keeps what it knows of a device under this number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def target(capability: int) -> Iterator[None]:
    """Within it Triton compiles for a GPU of `capability` (80, 90, 100), with or without one."""
    triton.runtime.driver.set_active(_Driver(capability))
    try:
        yield
    finally:
        triton.runtime.driver.set_active(None)  # the machine's own again, when it is next asked for


def compiled(launch: Launch):
    """The kernel as its launch would compile it on Triton's current device, from the cache or for
    it."""
    return launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)


class _Answer(Exception):
    """What a probe of the cache found."""


def _is_kept(launch: Launch) -> bool:
    """Whether Triton's cache has the kernel: Triton computes its key, and the first look at the
    cache ends the call."""
    knobs = triton.knobs.cache

    class Probe(knobs.manager_class or triton.runtime.cache.FileCacheManager):
        def get_group(self, filename):
            raise _Answer(filename in (super().get_group(filename) or {}))

    with knobs.scope():
        knobs.manager_class = Probe
        try:
            compiled(launch)
        except _Answer as answer:
            return answer.args[0]
    return True  # this process has it in memory


def missing(launches: Sequence[Launch]) -> list[Launch]:
    """The kernels of these launches, each once, that neither this process nor Triton's cache on
    disk holds for Triton's current device."""
    return [launch for launch in distinct(launches) if not _is_kept(launch)]


def _written(launch: Launch, capability: int) -> str:
    """A launch as a line for a child. Tensors become their dtype and whether they are aligned,
    descriptors their dtype and box."""

    def plain(value):
        if is_descriptor(value):
            return {"dtype": str(value.base.dtype).removeprefix("torch."), "box": value.block_shape}
        if isinstance(value, Tensor):
            return {"dtype": str(value.dtype).removeprefix("torch."), "off": value.data_ptr() % 16}
        return value

    function = launch.kernel.fn
    return json.dumps(
        {
            "capability": capability,
            "module": function.__module__,
            "kernel": function.__name__,
            "args": [plain(value) for value in launch.args],
            "options": dict(launch.options),
            "launcher": torch.cuda.is_available(),
        }
    )


def _read(given: dict) -> Launch:
    """The launch that `_written` wrote."""

    def rich(value):
        if not isinstance(value, dict):
            return value
        dtype, empty = getattr(torch, value["dtype"]), {"dtype": torch.uint8, "device": "meta"}
        if box := value.get("box"):
            strides = [16] * (len(box) - 1) + [1]
            return descriptor(torch.empty(box, dtype=dtype, device="meta"), box, strides, box)
        return torch.empty(64, **empty)[value["off"] : value["off"] + 32].view(dtype)

    kernel = getattr(importlib.import_module(given["module"]), given["kernel"])
    return Launch(kernel, (1,), [*map(rich, given["args"])], given["options"])


def _build_launcher(kernel) -> None:
    """Triton 3.6 has gcc make the C function that launches, one per signature; 3.7 has one for
    all."""
    nvidia = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def work() -> None:
    """A child's life: a launch in, what went wrong out ("" if nothing), until there are no more."""
    for line in sys.stdin:
        try:
            given, error = json.loads(line), ""
            with target(given["capability"]):
                kernel = compiled(_read(given))
            if given["launcher"]:
                _build_launcher(kernel)
        except Exception as raised:  # told to the parent, which names the kernel and ends the run
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps(error), flush=True)


class _Child:
    """A process that compiles one launch after the other."""

    def __init__(self):
        self.said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        variables = {"TRITON_CACHE_DIR": triton.knobs.cache.dir}
        self.process = _child.start(__name__, variables, text=True, **pipes)

    def compile(self, line: str) -> str:
        """What went wrong, or ""."""
        try:
            print(line, file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return json.loads(answer)
        code = self.process.wait()
        self.said.seek(0)
        return f"the compiling process ended with code {code}: {self.said.read().strip()[-2000:]}"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.said):
            stream.close()


def compile_ahead(
    launches: Sequence[Launch], capability: int, jobs: int | None = None, progress: bool = True
) -> None:
    """Compiles the kernels of these launches for a GPU of `capability` (80, 90, 100) into Triton's
    cache, in `jobs` processes (None: one for each core). Errors: RuntimeError names the kernel that
    did not compile, or whose process died, and says why."""
    from tqdm import tqdm

    kernels, failed, stop = distinct(launches), [], threading.Event()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(jobs or cores, len(kernels))
    todo: SimpleQueue[Launch | None] = SimpleQueue()
    for launch in [*kernels, *[None] * count]:
        todo.put(launch)

    def serve() -> None:
        child = _Child()
        try:
            while (launch := todo.get()) is not None and not stop.is_set():
                if error := child.compile(_written(launch, capability)):
                    failed.append((name_of(launch), error))
                    stop.set()
                bar.update()
        finally:
            child.close()

    with (
        tqdm(total=len(kernels), desc="compiling kernels", disable=not progress) as bar,
        ThreadPoolExecutor(max(1, count)) as pool,
    ):
        try:
            for served in [pool.submit(serve) for _ in range(count)]:
                served.result()
        finally:
            stop.set()
    for name, error in failed:
        raise RuntimeError(
            f"compile_ahead: {name} must compile for sm_{capability}; got {error}. "
            "Request another backend of its operation, and report this."
        )


# Backends that may refuse tensors without numbers, and launch nothing of Triton.
OPAQUE = ("flash_attn", "cudnn", "xformers", "sdpa", "torch", "eager", "cuda", "cpu")


def _launching(ops: Ops) -> Ops:
    """The same choice for meta tensors: what launches nothing of ours gives way to references."""
    chosen = {choice.op: choice.backend for choice in ops.table}

    def call(op: str, backend: str) -> Callable:
        calls = {b.name: b.call for b in OPS[op].backends}
        return calls["reference" if backend in OPAQUE else backend]

    calls = {op: call(op, chosen[op]) for op in OPS}
    for name, (op, kind) in FOR_TEXT.items():
        calls[name] = call(op, chosen.get(f"{op}, {kind}", chosen[op]))
    return replace(ops, **calls)


def on_meta(module: nn.Module, ops: Ops) -> nn.Module:
    """A copy without numbers, on the meta device, that launches what `module` with `ops` would."""
    memo = {id(ops): _launching(ops)}
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def prepare(rehearse: Callable[[], object], device: torch.device, progress: bool = True) -> int:
    """Compiles ahead what `rehearse` would launch on the CUDA device and is missing there.
    -> how many kernels that were. Errors: as `compile_ahead`."""
    if INTERPRETED or triton_missing():
        return 0
    card = card_of(device)
    with rehearsal(card) as launches:
        rehearse()
    with torch.cuda.device(device):
        todo = missing(launches)
    if todo:
        compile_ahead(todo, card.capability, progress=progress)
    return len(todo)


if __name__ == "__main__":
    work()
