"""A launch on the CPU: the kernel compiled for Hopper as its launch would be, then run."""

import contextlib
import functools
import inspect
import itertools
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .arithmetic import settled
from .compiled import text_of
from .machine import Machine
from .memory import Descriptor, Global, Pointers
from .parse import Module, Parameter, read_module
from .steps import Block


@functools.lru_cache(maxsize=64)
def ready(text: str) -> tuple[Module, Block]:
    module = read_module(text)
    return module, Block(module.body)


class _Memories:
    """The storages of a launch's tensors, each once."""

    def __init__(self, values: Iterable, forbidden: Iterable[Tensor]):
        tensors = [getattr(value, "base", value) for value in values]
        tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
        self.found: dict[int, Global] = {}
        for tensor in tensors:
            place = tensor.untyped_storage().data_ptr()
            alike = [t for t in tensors if t.untyped_storage().data_ptr() == place]
            cell = min(t.dtype.itemsize for t in alike)
            self.found.setdefault(place, Global(tensor.untyped_storage(), cell))
        for tensor in forbidden:
            memory = self.of(tensor)
            places = torch.arange(memory.storage.nbytes() // tensor.dtype.itemsize)
            places = places.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            memory.forbidden[memory.cells(places.flatten(), tensor.dtype.itemsize)] = True

    def of(self, tensor: Tensor) -> Global:
        return self.found[tensor.untyped_storage().data_ptr()]


def bound(module: Module, memories: _Memories, given: Mapping, where) -> dict:
    """The function's parameters: a descriptor is followed by its sizes and its strides."""
    values = {}
    # Of a descriptor x: x, x.shape.0, ..., x.stride.0, ...; before Triton 3.8 all of them x.
    owners = itertools.groupby(module.parameters, lambda p: p.python.partition(".")[0])
    for name, group in owners:
        first, *rest = group
        values[first.value] = value = one(module, memories, first, given[name], where)
        if isinstance(value, Descriptor):
            numbers = [*value.shape, *value.strides]
            values.update(zip((p.value for p in rest), numbers, strict=True))
    return values


def one(module: Module, memories: _Memories, parameter: Parameter, value, where):
    type = parameter.type
    if isinstance(value, Tensor):
        if value.dtype != type.dtype:
            raise TypeError(f"{parameter.python}: compiled for {type.element}, got {value.dtype}")
        return Pointers(memories.of(value), value.dtype, value.storage_offset())
    if hasattr(value, "block_shape"):
        layout = module.layouts[type.encoding]
        swizzle = int(re.search(r"swizzlingByteWidth = (\d+)", layout)[1])
        return Descriptor(where, memories.of(value.base), value, swizzle)
    if type.dtype.is_floating_point:
        return torch.tensor(value, dtype=type.dtype)
    return settled(int(value), type)


class _Start:
    """The stand-in for an operation where an argument is at fault."""

    where = "the launch"

    def __str__(self) -> str:
        return self.where


@contextlib.contextmanager
def one_thread():
    """Tiles are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_text(
    text: str, grid: tuple[int, ...], args: Mapping, seed: int = 0, forbidden: Iterable[Tensor] = ()
) -> None:
    """Runs every program of a grid, writing into the tensors among `args`, which go by the names of
    the kernel's parameters. forbidden: views whose elements no program may load."""
    module, block = ready(text)
    memories = _Memories(args.values(), forbidden)
    values = bound(module, memories, args, _Start())
    grid = (*grid, 1, 1)[:3]
    programs = itertools.product(*(range(size) for size in reversed(grid)))
    with one_thread():
        for number, ids in enumerate(programs):
            Machine(block, module.warps, values, ids[::-1], grid, number).run(seed)


def run(
    kernel,
    grid: tuple[int, ...],
    args: tuple,
    options: Mapping,
    seed: int = 0,
    forbidden: Iterable[Tensor] = (),
) -> None:
    """kernel[grid](*args, **options), executed here."""
    text = text_of(kernel, grid, args, options)
    names = inspect.signature(kernel.fn).parameters
    run_text(text, grid, dict(zip(names, args, strict=False)), seed, forbidden)


def lines_of(text: str, name: str) -> list[int]:
    """Numbers of the lines with an operation of this name."""
    pattern = re.compile(rf'\s*(?:%[^=]*= )?"?{re.escape(name)}"?[ (]')
    return [i for i, line in enumerate(text.splitlines()) if pattern.match(line)]


def altered(text: str, name: str, nth: int, old: str = "", new: str = "") -> str:
    """The text with `old` replaced in the nth operation of a name; without `old`, without the
    operation."""
    lines = text.splitlines()
    at = lines_of(text, name)[nth]
    if old and old not in lines[at]:
        raise ValueError(f"{old!r} is not in {lines[at]!r}")
    lines[at] = lines[at].replace(old, new) if old else ""
    return "\n".join(lines)
