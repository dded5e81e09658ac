"""One program of a launch: its partitions as coroutines, what is in flight, and who moves next.

A partition stands for all its warps, which move as one. What may run at the same time is chosen at
random from a seed; a race is found by the clocks, in any order chosen.
"""

import random

from . import accesses, control, hopper  # noqa: F401 (they register their operations)
from .clocks import Clock, NamedBarrier
from .fault import Fault
from .parse import Operation
from .partition import Copy, Partition
from .steps import Block


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
        self.reserved = 2  # named barriers that Triton itself uses, and one for each partition

    def add(self, partition: Partition, block: Block, values: list) -> None:
        self.running[partition] = block.run(partition, values)
        self.reserved = max(self.reserved, 1 + len(self.running))

    def named_barrier(self, operation: Operation, number: int) -> NamedBarrier:
        if not self.reserved <= number < 16:
            message = f"named barrier {number}; free are {self.reserved} to 15"
            raise Fault("barrier", operation, message)
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

        for barrier in self.named.values():
            for operation in barrier.came.values():
                raise Fault("unfinished", operation, f"the program ends with {barrier}")

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
