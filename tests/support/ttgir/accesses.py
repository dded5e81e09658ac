"""Loads, stores and views of global and of shared memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from .arithmetic import settled
from .fault import Fault
from .memory import Shared, View
from .parse import Operation
from .steps import runs


def chosen(places, mask) -> tuple[Tensor, Tensor]:
    places = torch.as_tensor(places, dtype=torch.int64)
    return places, torch.as_tensor(mask, dtype=torch.bool).expand(places.shape)


@runs("tt.load")
def load(operation: Operation):
    type = operation.operand_types[0]
    undefined = float("nan") if type.dtype.is_floating_point else -1  # where the mask is off

    def step(p):
        pointers, *rest = p.take(operation, operation.operands)
        mask, other = (*rest, *(1, undefined)[len(rest) :])
        places, mask = chosen(pointers.places, mask)
        values = torch.as_tensor(other, dtype=pointers.dtype).expand(places.shape).clone()
        access = p.access(operation)
        values[mask] = pointers.memory.read(places[mask], pointers.dtype, p.clock, access)
        p.give(operation, [settled(values, type)])

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
