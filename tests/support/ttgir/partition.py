"""A partition of a program, and what works beside it: copies and matrix products in flight."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .clocks import Access, Clock
from .fault import Fault
from .parse import Operation


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

    def __init__(self, machine, name: str, warps: int, values: dict, clock: Clock):
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
        """Starts what works beside the partition: returns its clock and its access."""
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
