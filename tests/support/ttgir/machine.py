"""One program of a launch: its partitions as coroutines, what is in flight, and who moves next.

A partition stands for all its warps, which move as one. What may run at the same time is chosen at
random from a seed; a race is found by the clocks, whatever was chosen.
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from . import operations
from .arithmetic import pure
from .clocks import Access, Clock, NamedBarrier
from .fault import Fault
from .parse import Operation, Region

TERMINATORS = {
    "scf.yield",
    "scf.condition",
    "tt.reduce.return",
    "tt.return",
    "ttg.warp_yield",
    "ttg.warp_return",
}


class Blocked(NamedTuple):
    """What a partition waits for."""

    operation: Operation
    ready: Callable[[], bool]
    what: object  # told in a deadlock


class Product:
    """A matrix product in flight; an actor."""

    def __init__(self, operation: Operation):
        self.operation, self.retired = operation, False


class InFlight(NamedTuple):
    """The registers that a product writes: to be read only once a wait returned them."""

    tensor: Tensor
    product: Product


class Copy:
    """A copy between global and shared memory; an actor."""

    def __init__(self, operation: Operation, land: Callable[[], None] | None = None):
        self.operation, self.land = operation, land


class Partition:
    """Warps that run one region, with their values and what they know to have happened."""

    def __init__(self, machine: "Machine", name: str, warps: int, values: dict, clock: Clock):
        self.machine, self.name, self.warps, self.values = machine, name, warps, values
        self.clock = clock
        self.clock[self] = 1
        self.products: list[Product] = []
        self.inputs: dict[int, tuple[Tensor, Product]] = {}  # registers that products read
        self.stores: list[Copy] = []
        self.blocked: Blocked | None = None

    def access(self, operation: Operation) -> Access:
        return Access(self, self.clock[self], True, operation, self.machine.program)

    def release(self) -> Clock:
        """What has happened until now; what follows is later."""
        clock = self.clock.copy()
        self.clock[self] += 1
        return clock

    def start(self, actor: Product | Copy) -> tuple[Clock, Access]:
        """Of a thing that works beside the partition, from now on."""
        clock = self.release()
        clock[actor] = 1
        return clock, Access(actor, 1, False, actor.operation, self.machine.program)

    def take(self, operation: Operation, names: list[str]) -> list:
        """Values to compute with: none that a product in flight still reads or writes."""
        taken = [self.values[name] for name in names]
        for value in taken:
            if isinstance(value, InFlight):
                product, verb = value.product, "writes"
            elif id(value) in self.inputs:
                product, verb = self.inputs[id(value)][1], "reads"
            else:
                continue
            message = f"uses registers that {product.operation} {verb}, without its wait's result"
            raise Fault("product", operation, message)
        return taken

    def give(self, operation: Operation, values) -> None:
        self.values.update(zip(operation.results, values, strict=True))

    def retire(self, pending: int) -> None:
        """All but the newest products."""
        while len(self.products) > pending:
            product = self.products.pop(0)
            product.retired = True
            self.clock[product] = 1
            self.inputs = {k: v for k, v in self.inputs.items() if v[1] is not product}

    def finish(self) -> None:
        for kind, left in (("product", self.products), ("TMA store", self.stores)):
            if left:
                raise Fault("unfinished", left[0].operation, f"{self.name} ends before this {kind}")


class Block:
    """A region, made ready once and run often."""

    def __init__(self, region: Region, arguments: list[str] | None = None):
        self.arguments = region.arguments if arguments is None else arguments
        self.steps, self.outputs = [], []
        for operation in region.operations:
            if operation.name in TERMINATORS:
                self.outputs = operation.operands
            else:
                self.steps.append(step_of(operation))

    def run(self, partition: Partition, values: list) -> Iterator[Blocked | None]:
        """Yields where another may move; returns the values that the region ends with."""
        partition.values.update(zip(self.arguments, values, strict=True))
        for step, stops in self.steps:
            if stops:
                yield from step(partition)
            else:
                step(partition)
        return [partition.values[name] for name in self.outputs]

    def run_through(self, partition: Partition, values: list) -> list:
        """The same for a region without effects."""
        run = self.run(partition, values)
        try:
            next(run)
        except StopIteration as end:
            return end.value
        raise NotImplementedError("a reduction's region has effects")


def step_of(operation: Operation) -> tuple[Callable[[Partition], object], bool]:
    """(what runs the operation, whether that is a coroutine)."""
    if operation.name in operations.STEPS:
        return operations.STEPS[operation.name](operation)
    function = pure(operation)
    if function is None:
        raise NotImplementedError(f"{operation}: not an operation that this machine knows")
    several = len(operation.results) > 1

    def compute(partition: Partition) -> None:
        value = function(*partition.take(operation, operation.operands))
        if operation.results:
            partition.give(operation, value if several else (value,))

    return compute, False


class Machine:
    def __init__(
        self, block: Block, warps: int, values: dict, ids: tuple, grid: tuple, number: int
    ):
        self.ids, self.grid, self.program = ids, grid, number
        self.main = Partition(self, "the default partition", warps, dict(values), Clock())
        self.running = {self.main: block.run(self.main, [])}
        self.copies: list[Copy] = []  # in flight
        self.landed: list[Copy] = []
        self.named: dict[int, NamedBarrier] = {}

    def add(self, partition: Partition, block: Block, values: list) -> None:
        self.running[partition] = block.run(partition, values)

    def named_barrier(self, operation: Operation, number: int) -> NamedBarrier:
        """Triton itself uses barriers 0 and 1, and one more for each partition."""
        used = 1 + len(self.running)
        if not used < number < 16:
            raise Fault("barrier", operation, f"named barrier {number}; free are {used + 1} to 15")
        return self.named.setdefault(number, NamedBarrier(number))

    def run(self, seed: int) -> None:
        chance = random.Random(f"{seed} {self.program}")
        while self.running:
            able = [p for p in self.running if p.blocked is None or p.blocked.ready()]
            if not able and not self.copies:
                self.deadlock()
            mover = chance.choice([*able, *self.copies])
            if isinstance(mover, Copy):
                self.copies.remove(mover)
                self.landed.append(mover)
                mover.land()
            else:
                self.move(mover)
        for copy in [*self.copies, *self.landed]:
            if copy not in self.main.clock:
                raise Fault("unfinished", copy.operation, "the program ends and nobody waited")

    def move(self, partition: Partition) -> None:
        """Up to where it next stops."""
        try:
            partition.blocked = next(self.running[partition])
        except StopIteration:
            partition.finish()
            del self.running[partition]

    def deadlock(self) -> None:
        stuck = [(p.name, p.blocked) for p in self.running]
        told = "; ".join(f"{name} waits at {b.operation} for {b.what}" for name, b in stuck)
        raise Fault("deadlock", stuck[0][1].operation, told)
