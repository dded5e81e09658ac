"""Global and shared memory: where values lie, who touched them, and what may touch them next.

Shared memory is tracked by element, within one program. Global memory is tracked by element over
all programs of a launch. Not modelled: buffers that share their place because one is used no more,
bank conflicts, the order of threads within a partition.
"""

import functools

import torch
from torch import Tensor

from .clocks import Access, Clock, MBarrier
from .fault import Fault

NEVER = 0  # the number of no access


class Global:
    """One storage of the launch's tensors."""

    def __init__(self, storage, cell: int):
        self.storage, self.cell = storage, cell  # cell: bytes of what is tracked as one
        cells = storage.nbytes() // cell
        self.written = torch.zeros(cells, dtype=torch.int32)  # numbers of accesses
        self.first_read = torch.zeros(cells, dtype=torch.int32)
        self.last_read = torch.zeros(cells, dtype=torch.int32)
        self.forbidden = torch.zeros(cells, dtype=torch.bool)
        self.accesses: list[Access | None] = [None]

    def elements(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype).set_(self.storage)

    def cells(self, places: Tensor, itemsize: int) -> Tensor:
        """Places of elements -> places of cells."""
        ratio = itemsize // self.cell
        if ratio == 1:
            return places
        return (places[:, None] * ratio + torch.arange(ratio)).flatten()

    def check(self, places: Tensor, dtype: torch.dtype, operation) -> None:
        if places.numel() == 0:
            return
        low, high = int(places.min()), int(places.max())
        if low < 0 or (high + 1) * dtype.itemsize > self.storage.nbytes():
            raise Fault("bounds", operation, f"elements {low} to {high} leave the tensor's storage")

    def note(self, access: Access) -> int:
        if self.accesses[-1] != access:
            self.accesses.append(access)
        return len(self.accesses) - 1

    def meet(self, marks: Tensor, clock: Clock, access: Access, verb: str, other: str) -> None:
        """Every access that is marked must happen before `access`."""
        if not marks.any():
            return
        for number in marks.unique().tolist():
            before = self.accesses[number]
            if number == NEVER or before.program == access.program and before.precedes(clock):
                continue
            whose = "another program's " if before.program != access.program else ""
            message = f"{verb} what {whose}{before.operation} {other}, unordered"
            raise Fault("race", access.operation, message)

    def read(self, places: Tensor, dtype: torch.dtype, clock: Clock, access: Access) -> Tensor:
        self.check(places, dtype, access.operation)
        cells = self.cells(places, dtype.itemsize)
        if self.forbidden[cells].any():
            raise Fault("bounds", access.operation, "loads an element that it may not")
        self.meet(self.written[cells], clock, access, "reads", "wrote")
        number = self.note(access)
        first = self.first_read[cells]
        self.first_read[cells] = torch.where(first == NEVER, number, first)
        self.last_read[cells] = number
        return self.elements(dtype)[places]

    def write(self, places: Tensor, values: Tensor, clock: Clock, access: Access) -> None:
        self.check(places, values.dtype, access.operation)
        cells = self.cells(places, values.dtype.itemsize)
        self.meet(self.written[cells], clock, access, "writes", "wrote")
        self.meet(self.first_read[cells], clock, access, "writes", "read")
        self.meet(self.last_read[cells], clock, access, "writes", "read")
        if cells.unique().numel() < cells.numel():
            raise Fault("race", access.operation, "writes one element twice")
        self.written[cells] = self.note(access)
        self.elements(values.dtype)[places] = values


class Pointers:
    """A pointer, or a tensor of them: places in one storage."""

    def __init__(self, memory: Global, dtype: torch.dtype, places):
        self.memory, self.dtype, self.places = memory, dtype, places  # places: int or int64 tensor

    def at(self, places) -> "Pointers":
        return Pointers(self.memory, self.dtype, places)


class Descriptor:
    """A tensor and a box, as TMA knows them."""

    def __init__(self, operation, memory: Global, given, swizzle: int):
        self.memory = memory
        self.base, self.dtype = given.base, given.base.dtype
        self.shape, self.strides = list(given.shape), list(given.strides)
        self.box = list(given.block_shape)
        size = self.dtype.itemsize
        inner = self.box[-1] * size

        def need(holds: bool, message: str) -> None:
            if not holds:
                raise Fault("descriptor", operation, message)

        need(given.padding == "zero", f"padding {given.padding!r} is not modelled")
        need(len(self.box) == len(self.shape) == len(self.strides) <= 5, "ranks differ, or above 5")
        need(self.base.data_ptr() % 16 == 0, "the base is not a multiple of 16 bytes")
        need(self.strides[-1] == 1, "the last stride is not 1")
        steps = [s * size for s in self.strides[:-1]]
        need(all(0 < s < 2**40 and s % 16 == 0 for s in steps), f"strides of {steps} bytes")
        need(all(0 < s < 2**32 for s in self.shape), f"sizes {self.shape}")
        need(all(s <= 256 for s in self.box[:-1]), f"a box of {self.box}")
        need(inner % 16 == 0 and inner >= swizzle, f"{inner} bytes a row, swizzled by {swizzle}")
        need(swizzle > 0 or self.box[-1] <= 256, f"a box of {self.box}")

    def bytes(self) -> int:
        return torch.Size(self.box).numel() * self.dtype.itemsize

    def places(self, corner: list[int]) -> tuple[Tensor, Tensor]:
        """Finds the box at `corner`: its places in the storage, and which are inside the tensor.
        Sums wrap at 64 bits, as addresses do: a box may count on it."""
        places, inside = torch.tensor(self.base.storage_offset()), torch.tensor(True)
        for at, box, size, stride in zip(corner, self.box, self.shape, self.strides, strict=True):
            index = torch.arange(at, at + box)
            places = places[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < size)
        return places, inside

    def load(self, corner: list[int], clock: Clock, access: Access) -> Tensor:
        places, inside = self.places(corner)
        values = torch.zeros(self.box, dtype=self.dtype)
        values[inside] = self.memory.read(places[inside], self.dtype, clock, access)
        return values

    def store(self, corner: list[int], values: Tensor, clock: Clock, access: Access) -> None:
        places, inside = self.places(corner)
        self.memory.write(places[inside], values[inside], clock, access)


@functools.cache
def span(offset: int, shape: tuple, strides: tuple, size: int) -> tuple[int, int, frozenset]:
    """Bytes of a view: first, end, and all of them where they are not everything between."""
    places = torch.tensor(offset)
    for n, stride in zip(shape, strides, strict=True):
        places = places[..., None] + torch.arange(n) * stride
    first, end = int(places.min()), int(places.max()) + 1
    if end - first == places.numel():
        return first * size, end * size, frozenset()
    each = (places.flatten()[:, None] * size + torch.arange(size)).flatten()
    return first * size, end * size, frozenset(each.tolist())


@functools.cache
def overlap(a: tuple, b: tuple) -> bool:
    if a[1] <= b[0] or b[1] <= a[0]:
        return False
    if not a[2] and not b[2]:
        return True
    return not (a[2] or set(range(*a[:2]))).isdisjoint(b[2] or range(*b[:2]))


@functools.cache
def covers(a: tuple, b: tuple) -> bool:
    if a[0] > b[0] or b[1] > a[1]:
        return False
    return not a[2] or a[2].issuperset(b[2] or range(*b[:2]))


class Shared:
    """One allocation of a program, and who touched which of its views."""

    def __init__(self, operation, size: int):
        self.operation, self.alive = operation, True
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self.filled = torch.zeros(size, dtype=torch.bool)
        self.writes: dict[tuple, Access] = {}
        self.reads: dict[tuple, dict[object, Access]] = {}
        self.barriers: dict[tuple, MBarrier] = {}


class View:
    """A memdesc: a part of an allocation, as a tensor that shares its bytes."""

    def __init__(self, shared: Shared, tensor: Tensor):
        self.shared, self.tensor = shared, tensor
        size = tensor.element_size()
        self.span = span(tensor.storage_offset(), tensor.shape, tensor.stride(), size)

    def on(self, tensor: Tensor) -> "View":
        return View(self.shared, tensor)

    def place(self) -> slice | list[int]:
        """The place of its bytes in the allocation."""
        first, end, apart = self.span
        return sorted(apart) if apart else slice(first, end)

    def meet(self, before: Access, clock: Clock, access: Access, verb: str, other: str) -> None:
        if not before.precedes(clock):
            message = f"{verb} the buffer of {self.shared.operation.where} that {before.operation}"
            raise Fault("race", access.operation, f"{message} {other}, unordered")
        if other == "wrote" and not access.generic and not before.published(clock):
            raise Fault("fence", access.operation, f"no proxy fence after {before.operation}")

    def after_writes(self, clock: Clock, access: Access, verb: str) -> None:
        if not self.shared.alive:
            raise Fault("bounds", access.operation, "the buffer was given back")
        for span, before in self.shared.writes.items():
            if overlap(self.span, span):
                self.meet(before, clock, access, verb, "wrote")

    def read(self, clock: Clock, access: Access) -> Tensor:
        self.after_writes(clock, access, "reads")
        if not self.shared.filled[self.place()].all():
            message = f"reads what nobody wrote of the buffer of {self.shared.operation.where}"
            raise Fault("unwritten", access.operation, message)
        self.shared.reads.setdefault(self.span, {})[access.actor] = access
        return self.tensor

    def claim(self, clock: Clock, access: Access) -> None:
        """What a write checks and leaves behind, but for the values."""
        self.after_writes(clock, access, "writes")
        for span, readers in self.shared.reads.items():
            if overlap(self.span, span):
                for before in readers.values():
                    self.meet(before, clock, access, "writes", "read")
        for accesses in (self.shared.writes, self.shared.reads):
            for span in [span for span in accesses if covers(self.span, span)]:
                del accesses[span]
        self.shared.writes[self.span] = access
        self.shared.filled[self.place()] = True

    def write(self, values: Tensor, clock: Clock, access: Access) -> None:
        self.claim(clock, access)
        self.tensor.copy_(values)
