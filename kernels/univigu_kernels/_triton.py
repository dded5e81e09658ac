"""The one place that asks whether Triton is there (CPU installs of PyTorch come without it), and
the one way in which its kernels are launched."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ._card import Card, lacks_nvidia, rehearsing


@functools.cache
def triton_version() -> str | None:
    """Version of the importable Triton, or None. A Triton that is installed but broken raises."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("triton").__version__


def triton_missing() -> str | None:
    """Why no Triton backend can be offered, or None when Triton is there."""
    if triton_version() is None:
        return "needs the package triton, which is not installed"
    return None


class _Absent:
    """Lets kernels be defined, not run, where there is no Triton or no Gluon."""

    @staticmethod
    def jit(function: Callable | None = None, **options) -> Callable:
        return function or (lambda decorated: decorated)

    @staticmethod
    def constexpr(value):
        return value


if triton_missing() is None:
    triton = importlib.import_module("triton")
    tl = importlib.import_module("triton.language")
    libdevice = importlib.import_module("triton.language.extra.libdevice")
    INTERPRETED = triton.knobs.runtime.interpret  # jit reads it too, when a kernel is defined
else:
    triton = tl = libdevice = _Absent()
    INTERPRETED = False

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Gluon(NamedTuple):
    """What Hopper kernels take of Gluon, Triton's dialect in which a program itself places data and
    waits. It is experimental and its names move: 3.6 has async_copy_global_to_shared, 3.8 also
    async_load, and in 3.9 the older name raises."""

    gluon: object = _Absent
    language: object = _Absent
    hopper: object = None
    load: Callable | None = None
    store: Callable | None = None
    descriptor: type | None = None
    missing: str | None = None  # why there are no such kernels


def _find_gluon() -> Gluon:
    if missing := triton_missing():
        return Gluon(missing=missing)
    name = "triton.experimental.gluon"
    try:
        gluon, language = (importlib.import_module(name + part) for part in ("", ".language"))
        hopper = importlib.import_module(f"{name}.language.nvidia.hopper")
        descriptor = importlib.import_module(f"{name}.nvidia.hopper").TensorDescriptor
        new, tma = hasattr(hopper.tma, "async_load"), hopper.tma
        load = tma.async_load if new else tma.async_copy_global_to_shared
        store = tma.async_store if new else tma.async_copy_shared_to_global
    except (ImportError, AttributeError) as error:
        return Gluon(missing=f"needs another Gluon than that of Triton {triton_version()}: {error}")
    return Gluon(gluon, language, hopper, load, store, descriptor)


GLUON = _find_gluon()
gluon, gl, hopper = GLUON[:3]
tma_load, tma_store = GLUON.load, GLUON.store


def descriptor(x: Tensor, shape: Sequence[int], strides: Sequence[int], box: Sequence[int]):
    """Boxes of x's memory for TMA, swizzled as wgmma reads them. It is made on the host and goes to
    the kernel by value, so a captured launch keeps its own. Needs 16-bit numbers, and x and every
    stride but the last, 1, at multiples of 16 bytes."""
    dtype = getattr(gl, str(x.dtype).removeprefix("torch."))
    layout = gl.NVMMASharedLayout.get_default_for([*box], dtype)
    return GLUON.descriptor(x, [*shape], [*strides], [*box], layout)


def is_descriptor(value) -> bool:
    return GLUON.descriptor is not None and isinstance(value, GLUON.descriptor)


def supports_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a Triton backend lacks on `device` in `dtype`, or None. The interpreter's bfloat16 is
    wrong."""
    if missing := triton_missing():
        return missing
    if device.type == "cpu" and INTERPRETED:
        return None if dtype in DTYPES[:2] else "needs float32 or float16 in the interpreter"
    if device.type != "cuda":
        return "needs a CUDA device, or TRITON_INTERPRET=1 for its interpreter"
    if reason := lacks_nvidia(device):
        return reason
    return None if dtype in DTYPES else "needs float32, float16 or bfloat16"


class Launch(NamedTuple):
    """A kernel launch that was rehearsed: see `rehearsal`."""

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    options: Mapping


class _Entered(TorchDispatchMode):
    """Within it our operators run the function that launches even on meta tensors, for which their
    fakes tell shapes alone."""

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return op(*args, **(kwargs or {}))


def operator(name: str, function: Callable, writes: Sequence[str] = ()):
    """torch.library.custom_op for a function that changes no argument but those named in `writes`;
    see `rehearsal`."""
    made = torch.library.custom_op(name, function, mutates_args=tuple(writes))
    made.register_torch_dispatch(
        _Entered, lambda mode, op, types, args, kwargs: function(*args, **kwargs)
    )
    return made


_noted: list[Launch] | None = None
_running = True
_watcher: Callable[[str], None] | None = None
_forced: dict[str, Mapping] = {}


@contextlib.contextmanager
def _noting(run: bool) -> Iterator[list[Launch]]:
    global _noted, _running
    before, (_noted, _running) = (_noted, _running), ([], run)
    try:
        yield _noted
    finally:
        _noted, _running = before


def recording() -> contextlib.AbstractContextManager[list[Launch]]:
    """Launches inside are noted and run. Their tensors are held: for tests."""
    return _noting(run=True)


@contextlib.contextmanager
def rehearsal(card: Card) -> Iterator[list[Launch]]:
    """Launches inside are noted, not run: meta tensors at real shapes, given to a model or to an
    operation, tell what `card` would compile, without it: one of CARDS, or `card_of` a device."""
    with rehearsing(card), _noting(run=False) as launches, _Entered():
        yield launches


@contextlib.contextmanager
def watched(tell: Callable[[str], None]) -> Iterator[None]:
    """Before a launch inside, `tell` gets "compiling", and "running" when its kernel is ready: a
    limit on a kernel's time is not for its compiler."""
    global _watcher
    _watcher = tell
    try:
        yield
    finally:
        _watcher = None


@contextlib.contextmanager
def forced(kernel: str, **options: int) -> Iterator[None]:
    """Replaces the launch options that `configuration` chooses for one kernel, for tests."""
    _forced[kernel] = options
    try:
        yield
    finally:
        del _forced[kernel]


def configuration(kernel: str, chosen: Mapping[str, int]) -> dict[str, int]:
    """The options of a kernel's launch: those chosen for the shape, or those that a test forces."""
    return {**chosen, **_forced.get(kernel, {})}


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """kernel[grid](*args, **options) on the device of the first tensor; an empty grid is no
    launch."""
    if _noted is not None and 0 not in grid:
        _noted.append(Launch(kernel, grid, args, options))
    if 0 in grid or not _running:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if _watcher is not None:
            _watcher("compiling")
            kernel.warmup(*args, grid=grid, **options)
            _watcher("running")
        kernel[grid](*args, **options)
