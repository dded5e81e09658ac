"""The operations that have effects, wait, or hold regions.

Each is a function of an operation that returns what runs it for a partition: a plain function, or a
coroutine that yields None where another partition may move and a Blocked where it must wait.
"""

import inspect
import re
from collections.abc import Callable

import torch
from torch import Tensor

from . import machine
from .arithmetic import settled
from .clocks import Access, MBarrier
from .fault import Fault
from .memory import Pointers, Shared, View
from .parse import NAME, Operation
from .ptx import Assembly

STEPS: dict[str, Callable] = {}


def runs(*names: str):
    def register(make: Callable) -> Callable:
        def made(operation: Operation):
            step = make(operation)
            return step, inspect.isgeneratorfunction(step)

        STEPS.update(dict.fromkeys(names, made))
        return make

    return register


# Control.


@runs("scf.if")
def branch(operation: Operation):
    blocks = [machine.Block(region) for region in operation.regions]
    condition = operation.operands[:1]

    def step(p):
        taken = 0 if p.take(operation, condition)[0] else 1
        values = (yield from blocks[taken].run(p, [])) if taken < len(blocks) else []
        p.give(operation, values)

    return step


@runs("scf.for")
def loop(operation: Operation):
    index, *bounds = operation.operands[:4]
    pairs = re.findall(rf"({NAME}) = ({NAME})", operation.head.partition("iter_args")[2])
    block = machine.Block(operation.regions[0], [index, *(inner for inner, _ in pairs)])

    def step(p):
        low, high, by = p.take(operation, bounds)
        values = [p.values[outer] for _, outer in pairs]
        for i in range(low, high, by):
            values = yield from block.run(p, [i, *values])
        p.give(operation, values)

    return step


@runs("scf.while")
def repeat(operation: Operation):
    pairs = re.findall(rf"({NAME}) = ({NAME})", operation.head)
    before = machine.Block(operation.regions[0], [inner for inner, _ in pairs])
    after = machine.Block(operation.regions[1])

    def step(p):
        values = [p.values[outer] for _, outer in pairs]
        while True:
            goes_on, *values = yield from before.run(p, values)
            if not goes_on:
                break
            values = yield from after.run(p, values)
        p.give(operation, values)

    return step


@runs("ttg.warp_specialize")
def specialise(operation: Operation):
    default, *others = (machine.Block(region) for region in operation.regions)

    def step(p):
        captured = [p.values[name] for name in operation.operands]
        clock, started = p.release(), []
        for i, block in enumerate(others):
            warps = operation.regions[i + 1].warps
            q = machine.Partition(p.machine, f"partition {i}", warps, {}, clock.copy())
            p.machine.add(q, block, captured)
            started.append(q)

        values = yield from default.run(p, [])
        ended = lambda: p.machine.running.keys().isdisjoint(started)  # noqa: E731
        yield machine.Blocked(operation, ended, "the other partitions")
        for q in started:
            p.clock.join(q.clock)
        p.give(operation, values)

    return step


@runs("tt.reduce")
def reduce(operation: Operation):
    axis, block = int(operation.attribute("axis")), machine.Block(operation.regions[0])

    def step(p):
        values = p.take(operation, operation.operands)
        while (size := values[0].shape[axis]) > 1:
            halves = [x.split(size // 2, axis) for x in values]
            values = block.run_through(p, [x[0] for x in halves] + [x[1] for x in halves])
        values = [x.squeeze(axis) for x in values]
        p.give(operation, map(settled, values, operation.result_types))

    return step


@runs("tt.get_program_id", "tt.get_num_programs")
def program(operation: Operation):
    axis = "xyz".index(operation.head)
    source = "ids" if operation.name == "tt.get_program_id" else "grid"
    return lambda p: p.give(operation, [getattr(p.machine, source)[axis]])


@runs("ttg.barrier", "gpu.barrier")
def block_barrier(operation: Operation):
    return lambda p: None  # a partition moves as one


@runs("tt.elementwise_inline_asm")
def assembly(operation: Operation):
    asm, types = Assembly(operation), operation.result_types
    dtypes = [type.dtype for type in types]
    sources = [type.dtype for type in operation.operand_types] if operation.operands else []

    def compute(p):
        values = p.take(operation, operation.operands)
        tensors = [torch.as_tensor(v, dtype=d) for v, d in zip(values, sources, strict=True)]
        p.give(operation, map(settled, asm.results(tensors, dtypes), types))

    def meet(p):
        for bar in asm.bars():
            yield
            barrier = p.machine.named_barrier(operation, bar.number)
            generation = len(barrier.past)
            barrier.arrive(operation, p.release(), 32 * p.warps, bar.threads)
            if bar.waits:
                ended = lambda b=barrier, g=generation: len(b.past) > g  # noqa: E731
                yield machine.Blocked(operation, ended, barrier)
                p.clock.join(barrier.past[generation])
        compute(p)

    if asm.bars() and any(type.shape for type in types):
        raise NotImplementedError(f"{operation}: a named barrier for each element")
    return meet if asm.bars() else compute


# Global memory.


def chosen(places, mask) -> tuple[Tensor, Tensor]:
    places = torch.as_tensor(places, dtype=torch.int64)
    return places, torch.as_tensor(mask, dtype=torch.bool).expand(places.shape)


@runs("tt.load")
def load(operation: Operation):
    type = operation.operand_types[0]

    def step(p):
        pointers, mask, *other = [*p.take(operation, operation.operands), 1][:3]
        if len(operation.operands) == 3:
            other = [p.values[operation.operands[2]]]
        places, mask = chosen(pointers.places, mask)
        dtype = pointers.dtype
        empty = float("nan") if dtype.is_floating_point else -1  # masked off, and undefined
        filler = torch.as_tensor(other[0] if other else empty, dtype=dtype)
        values = filler.expand(places.shape).clone()
        values[mask] = pointers.memory.read(places[mask], dtype, p.clock, p.access(operation))
        p.give(
            operation,
            [int(values) if not type.shape and not values.is_floating_point() else values],
        )

    return step


@runs("tt.store")
def store(operation: Operation):
    def step(p):
        pointers, value, mask = [*p.take(operation, operation.operands), 1][:3]
        places, mask = chosen(pointers.places, mask)
        value = torch.as_tensor(value, dtype=pointers.dtype).expand(places.shape)
        access = p.access(operation)
        pointers.memory.write(places[mask], value[mask], p.clock, access)

    return step


# Shared memory.


@runs("ttg.local_alloc")
def local_alloc(operation: Operation):
    type = operation.type
    size = torch.Size(type.shape).numel() * type.dtype.itemsize

    def step(p):
        shared = Shared(operation, size)
        view = View(shared, shared.bytes.view(type.dtype).view(type.shape))
        for value in p.take(operation, operation.operands):
            view.write(value, p.clock, p.access(operation))
        p.give(operation, [view])

    return step


@runs("ttg.local_dealloc")
def local_dealloc(operation: Operation):
    def step(p):
        p.values[operation.operands[0]].shared.alive = False

    return step


@runs("ttg.local_store")
def local_store(operation: Operation):
    def step(p):
        value, view = p.take(operation, operation.operands)
        view.write(value, p.clock, p.access(operation))

    return step


@runs("ttg.local_load")
def local_load(operation: Operation):
    def step(p):
        view = p.values[operation.operands[0]]
        p.give(operation, [view.read(p.clock, p.access(operation)).clone()])

    return step


@runs("ttg.memdesc_index")
def memdesc_index(operation: Operation):
    def step(p):
        view, i = p.take(operation, operation.operands)
        if not 0 <= i < len(view.tensor):
            raise Fault("bounds", operation, f"index {i} of {len(view.tensor)} buffers")
        p.give(operation, [view.on(view.tensor[i].view(operation.type.shape))])

    return step


def views(name: str):
    """An operation that gives another view of a memdesc: registers a function of the tensor."""

    def register(make: Callable) -> Callable:
        def made(operation: Operation):
            function = make(operation)

            def step(p):
                view = p.values[operation.operands[0]]
                p.give(operation, [view.on(function(view.tensor))])

            return step

        return runs(name)(made)

    return register


@views("ttg.memdesc_reshape")
def memdesc_reshape(operation: Operation):
    return lambda x: x.view(operation.type.shape)


@views("ttg.memdesc_trans")
def memdesc_trans(operation: Operation):
    order = operation.integers("order")
    return lambda x: x.permute(order)


@views("ttg.memdesc_subslice")
def memdesc_subslice(operation: Operation):
    corner = zip(operation.literals, operation.type.shape, strict=True)
    part = tuple(slice(at, at + size) for at, size in corner)
    return lambda x: x[part]


@views("ttg.memdesc_reinterpret")
def memdesc_reinterpret(operation: Operation):
    type = operation.type
    size = torch.Size(type.shape).numel() * type.dtype.itemsize
    return lambda x: x.view(-1).view(torch.uint8)[:size].view(type.dtype).view(type.shape)


@runs("ttng.fence_async_shared")
def fence(operation: Operation):
    def step(p):
        p.clock["fence", p] = p.clock[p]
        p.release()

    return step


# Barriers.


def barrier_of(p, operation: Operation) -> MBarrier:
    """The one that the first operand names, seen by the partition."""
    view = p.values[operation.operands[0]]
    barrier = view.shared.barriers.get(view.span)
    if barrier is None:
        raise Fault("barrier", operation, f"no barrier in the buffer of {view.shared.operation}")
    barrier.seen(operation, p.clock, p)
    return barrier


def holds(p, operation: Operation, position: int) -> bool:
    """The predicate that stands there, if any does."""
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
        yield machine.Blocked(operation, passed, f"parity {parity} of {barrier}")
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


# Copies.


def same_box(operation: Operation, descriptor, view: View) -> None:
    if list(view.tensor.shape) != descriptor.box or view.tensor.dtype != descriptor.dtype:
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
        copy = machine.Copy(operation)
        clock, access = p.start(copy)
        barrier = bar_view.shared.barriers.get(bar_view.span)
        if barrier is None:
            raise Fault("barrier", operation, "no barrier to tell")
        barrier.seen(operation, clock, copy)
        view.claim(clock, access)

        def land() -> None:
            view.tensor.copy_(source.load(at, clock, access))
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
        copy = machine.Copy(operation)
        clock, access = p.start(copy)
        target.store(at, view.read(clock, access), clock, access)
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


# Matrix products.


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
        product = machine.Product(operation)
        clock, access = p.start(product)
        result = operand(p, left, product, clock, access) @ operand(
            p, right, product, clock, access
        )
        if all(p.take(operation, use)):
            before = p.values[accumulator]
            result += before.tensor if isinstance(before, machine.InFlight) else before
        p.products.append(product)
        p.give(operation, [machine.InFlight(result, product)])
        if not asynchronous:
            p.retire(0)
            p.give(operation, [result])

    return step


@runs("ttng.warp_group_dot_wait")
def dot_wait(operation: Operation):
    pending = int(operation.attribute("pendings"))

    def ready(value):
        done = isinstance(value, machine.InFlight) and value.product.retired
        return value.tensor if done else value

    def step(p):
        yield
        p.retire(pending)
        p.give(operation, [ready(p.values[name]) for name in operation.operands])

    return step
