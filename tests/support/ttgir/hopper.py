"""Fences, mbarriers, TMA and the warp groups' matrix products."""

import re

import torch
from torch import Tensor

from .clocks import Access, MBarrier
from .fault import Fault
from .memory import View
from .parse import NAME, Operation
from .partition import Blocked, Copy, InFlight, Product
from .steps import runs


@runs("ttng.fence_async_shared")
def fence(operation: Operation):
    def step(p):
        p.clock["fence", p] = p.clock[p]
        p.release()

    return step


def barrier_of(p, operation: Operation) -> MBarrier:
    """The one that the first operand names, seen by the partition."""
    view = p.values[operation.operands[0]]
    barrier = view.shared.barriers.get(view.span)
    if barrier is None:
        raise Fault("barrier", operation, f"no barrier in the buffer of {view.shared.operation}")
    barrier.seen(operation, p.clock, p)
    return barrier


def holds(p, operation: Operation, position: int) -> bool:
    """Whether the predicate there holds; it does where there is none."""
    names = operation.operands[position : position + 1]
    return all(p.take(operation, names))


@runs("ttng.init_barrier")
def init_barrier(operation: Operation):
    def step(p):
        view = p.values[operation.operands[0]]
        if view.span in view.shared.barriers:
            raise Fault("barrier", operation, f"{view.shared.barriers[view.span]} is in use")
        made = MBarrier(operation, operation.literals[0], p.access(operation))
        view.shared.barriers[view.span] = made

    return step


@runs("ttng.inval_barrier")
def inval_barrier(operation: Operation):
    def step(p):
        barrier_of(p, operation)
        view = p.values[operation.operands[0]]
        del view.shared.barriers[view.span]

    return step


@runs("ttng.wait_barrier")
def wait_barrier(operation: Operation):
    def step(p):
        if not holds(p, operation, 2):
            return
        barrier, (parity,) = barrier_of(p, operation), p.take(operation, operation.operands[1:2])
        if parity not in (0, 1):
            raise Fault("barrier", operation, f"a parity of {parity}")
        passed = lambda: barrier.passed(parity)  # noqa: E731
        yield Blocked(operation, passed, f"parity {parity} of {barrier}")
        p.clock.join(barrier.past)

    return step


@runs("ttng.arrive_barrier")
def arrive_barrier(operation: Operation):
    def step(p):
        yield
        if holds(p, operation, 1):
            barrier_of(p, operation).arrive(operation, p.release(), operation.literals[0])

    return step


@runs("ttng.barrier_expect")
def barrier_expect(operation: Operation):
    def step(p):
        yield
        if holds(p, operation, 1):
            barrier = barrier_of(p, operation)
            barrier.expect(operation, operation.literals[0])
            barrier.arrive(operation, p.release())

    return step


def same_box(operation: Operation, descriptor, view: View) -> None:
    sizes, box = ([n for n in sizes if n > 1] for sizes in (view.tensor.shape, descriptor.box))
    if sizes != box or view.tensor.dtype != descriptor.dtype:
        message = f"a box of {descriptor.box} and a buffer of {list(view.tensor.shape)}"
        raise Fault("descriptor", operation, message)


@runs("ttng.async_tma_copy_global_to_local")
def copy_in(operation: Operation):
    descriptor, *corner = re.findall(NAME, operation.head.partition("]")[0])
    target, bar, predicate = re.findall(NAME, operation.head.partition("]")[2])

    def step(p):
        yield
        (taken,) = p.take(operation, [predicate])
        if not taken:
            return
        source, *at = p.take(operation, [descriptor, *corner])
        view, bar_view = p.values[target], p.values[bar]
        same_box(operation, source, view)
        copy = Copy(operation)
        clock, access = p.start(copy)
        barrier = bar_view.shared.barriers.get(bar_view.span)
        if barrier is None:
            raise Fault("barrier", operation, "no barrier to tell")
        barrier.seen(operation, clock, copy)
        view.claim(clock, access)

        def land() -> None:
            view.tensor.copy_(source.load(at, clock, access).view(view.tensor.shape))
            barrier.land(operation, clock, source.bytes())

        copy.land = land
        p.machine.copies.append(copy)

    return step


@runs("ttng.async_tma_copy_local_to_global")
def copy_out(operation: Operation):
    def step(p):
        yield
        target, *at, view = p.take(operation, operation.operands)
        same_box(operation, target, view)
        copy = Copy(operation)
        clock, access = p.start(copy)
        target.store(at, view.read(clock, access).view(target.box), clock, access)
        p.stores.append(copy)

    return step


@runs("ttng.async_tma_store_wait")
def store_wait(operation: Operation):
    pending = int(operation.attribute("pendings"))

    def step(p):
        yield
        while len(p.stores) > pending:
            p.clock[p.stores.pop(0)] = 1

    return step


@runs("ttng.warp_group_dot")
def dot(operation: Operation):
    left, right, accumulator, *use = operation.operands
    asynchronous = operation.attribute("isAsync") == "true"

    def operand(p, name: str, product, clock, access: Access) -> Tensor:
        value = p.values[name]
        if isinstance(value, View):
            value = value.read(clock, access)
        else:
            if id(value) not in p.inputs:
                p.take(operation, [name])
            p.inputs[id(value)] = (value, product)
        if value.dtype == torch.float32:
            raise NotImplementedError(f"{operation}: products in tf32")
        return value.float()

    def step(p):
        yield
        product = Product(operation)
        clock, access = p.start(product)
        a, b = (operand(p, name, product, clock, access) for name in (left, right))
        result = a @ b
        if all(p.take(operation, use)):
            before = p.values[accumulator]
            result += before.tensor if isinstance(before, InFlight) else before
        p.products.append(product)
        p.give(operation, [InFlight(result, product)])
        if not asynchronous:
            p.retire(0)
            p.give(operation, [result])

    return step


@runs("ttng.warp_group_dot_wait")
def dot_wait(operation: Operation):
    pending = int(operation.attribute("pendings"))

    def ready(value):
        done = isinstance(value, InFlight) and value.product.retired
        return value.tensor if done else value

    def step(p):
        yield
        p.retire(pending)
        p.give(operation, [ready(p.values[name]) for name in operation.operands])

    return step
