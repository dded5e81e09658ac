"""What orders accesses: vector clocks, mbarriers and the hardware's named barriers.

A clock maps an actor (a partition, a copy, a matrix product) to how much of it has happened before.
A partition's clock also tells which of the partitions' writes a proxy fence has published to the
async proxy: under the key ("fence", partition).
"""

from typing import NamedTuple

from .fault import Fault

LARGEST_COUNT = 2**20 - 1  # of a mbarrier's arrivals, and of the bytes that it expects


class Clock(dict):
    def join(self, other: "Clock") -> None:
        for actor, time in other.items():
            if time > self.get(actor, 0):
                self[actor] = time

    def copy(self) -> "Clock":
        return Clock(self)


class Access(NamedTuple):
    """A read or a write, by whom and when."""

    actor: object
    time: int
    generic: bool  # through the generic proxy, not the async one of TMA and of the matrix units
    operation: object
    program: int

    def precedes(self, clock: Clock) -> bool:
        return clock.get(self.actor, 0) >= self.time

    def published(self, clock: Clock) -> bool:
        """Whether a proxy fence of its writer stands between it and an access of the async proxy
        that happens at `clock`."""
        return not self.generic or clock.get(("fence", self.actor), 0) >= self.time


class MBarrier:
    """Arrivals and bytes that end a phase. What a phase's arrivals release, its waiters acquire."""

    def __init__(self, operation, count: int, made: Access):
        if not 0 < count <= LARGEST_COUNT:
            raise Fault("barrier", operation, f"a count of {count}")
        self.count = self.pending = count
        self.bytes, self.phase, self.made = 0, 0, made
        self.now, self.past = Clock(), Clock()

    def __str__(self) -> str:
        return (
            f"mbarrier of {self.made.operation.where} (count {self.count}, pending {self.pending}, "
            f"bytes {self.bytes}, phase {self.phase})"
        )

    def seen(self, operation, clock: Clock, actor) -> None:
        """An access at `clock` must find the barrier made."""
        if not self.made.precedes(clock):
            raise Fault("race", operation, f"nothing orders it after the init of {self}")
        if actor != self.made.actor and not self.made.published(clock):
            raise Fault("fence", operation, f"no proxy fence after the init of {self}")

    def expect(self, operation, count: int) -> None:
        self.bytes += count
        if self.bytes > LARGEST_COUNT:
            raise Fault("bytes", operation, f"{self} expects too many")

    def arrive(self, operation, clock: Clock, count: int = 1) -> None:
        self.pending -= count
        self.now.join(clock)
        if self.pending < 0:
            raise Fault("overrun", operation, f"more arrivals than {self} counts")
        self.end(operation)

    def land(self, operation, clock: Clock, count: int) -> None:
        """Bytes of a copy."""
        self.bytes -= count
        self.now.join(clock)
        self.end(operation)

    def end(self, operation) -> None:
        """Ends the phase, when it is due."""
        if self.pending:
            return
        if self.bytes < 0:
            raise Fault("bytes", operation, f"{self} got more bytes than it expects")
        if self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.past, self.now = self.now, Clock()

    def passed(self, parity: int) -> bool:
        """Whether a wait for the phase of this parity goes on."""
        return self.phase != parity


class NamedBarrier:
    """bar.sync and bar.arrive: `threads` of them end a generation and free those that wait."""

    def __init__(self, number: int):
        self.number, self.past = number, []  # past: the clock of each generation that ended
        self.begin()

    def begin(self) -> None:
        self.arrived, self.threads, self.came, self.now = 0, None, {}, Clock()

    def __str__(self) -> str:
        return f"named barrier {self.number} ({self.arrived} of {self.threads} threads)"

    def arrive(self, operation, clock: Clock, partition, threads: int) -> None:
        if partition in self.came:
            message = f"{partition.name} comes again before {self} is full"
            raise Fault("barrier", operation, message)
        if self.threads not in (None, threads):
            raise Fault("barrier", operation, f"{self} met with another count, {threads}")
        self.threads = threads
        self.came[partition] = operation
        self.arrived += 32 * partition.warps
        self.now.join(clock)
        if self.arrived > threads:
            raise Fault("overrun", operation, f"too many come to {self}")
        if self.arrived == threads:
            self.past.append(self.now)
            self.begin()
