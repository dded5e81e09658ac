"""What the machine raises where a kernel breaks a rule of the hardware."""


class Fault(Exception):
    """A rule that a kernel broke.

    kind: race        two accesses to one element that nothing orders, or two programs' to one
          fence       a generic write that the async proxy may not see
          unwritten   a read of shared memory that nobody wrote
          product     a matrix product's registers before the wait that retires it
          bounds      an access outside the tensor, or one that the caller forbade
          descriptor  a tensor descriptor that the driver would refuse
          barrier     a barrier used against its rules; overrun: more arrivals than it counts;
          bytes       a phase that got more bytes than it expects
          deadlock    nothing can move
          unfinished  the program ended with work in flight
          trap        an instruction that must never execute
    where: "file.py:line" of the operation.
    """

    def __init__(self, kind: str, operation, message: str):
        self.kind, self.where = kind, operation.where
        super().__init__(f"{kind}: {operation}: {message}")
