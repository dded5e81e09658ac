"""From operations to what runs them, made once for each kernel.

A step runs one operation for a partition: a plain function, or a coroutine that yields None where
another partition may move and a Blocked where it must wait. Operations with effects register
theirs, by name; those of arithmetic.py have none.
"""

import inspect
from collections.abc import Callable, Iterator

from .arithmetic import pure
from .parse import Operation, Region
from .partition import Blocked, Partition

TERMINATORS = {
    "scf.yield",
    "scf.condition",
    "tt.reduce.return",
    "tt.return",
    "ttg.warp_yield",
    "ttg.warp_return",
}
STEPS: dict[str, Callable] = {}


def runs(*names: str):
    def register(make: Callable) -> Callable:
        def made(operation: Operation):
            step = make(operation)
            return step, inspect.isgeneratorfunction(step)

        STEPS.update(dict.fromkeys(names, made))
        return make

    return register


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
    if operation.name in STEPS:
        return STEPS[operation.name](operation)
    function = pure(operation)
    if function is None:
        raise NotImplementedError(f"{operation}: not an operation that this machine knows")
    several = len(operation.results) > 1

    def compute(partition: Partition) -> None:
        value = function(*partition.take(operation, operation.operands))
        if operation.results:
            partition.give(operation, value if several else (value,))

    return compute, False
