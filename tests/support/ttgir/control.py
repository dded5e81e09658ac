"""Loops, branches, partitions, reductions and inline assembly."""

import re

import torch

from .arithmetic import settled
from .parse import NAME, Operation
from .partition import Blocked, Partition
from .ptx import Assembly
from .steps import Block, runs


@runs("scf.if")
def branch(operation: Operation):
    blocks = [Block(region) for region in operation.regions]
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
    block = Block(operation.regions[0], [index, *(inner for inner, _ in pairs)])

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
    before = Block(operation.regions[0], [inner for inner, _ in pairs])
    after = Block(operation.regions[1])

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
    default, *others = (Block(region) for region in operation.regions)

    def step(p):
        captured = [p.values[name] for name in operation.operands]
        clock, started = p.release(), []
        for i, block in enumerate(others):
            warps = operation.regions[i + 1].warps
            q = Partition(p.machine, f"partition {i}", warps, {}, clock.copy())
            p.machine.add(q, block, captured)
            started.append(q)

        values = yield from default.run(p, [])
        ended = lambda: p.machine.running.keys().isdisjoint(started)  # noqa: E731
        yield Blocked(operation, ended, "the other partitions")
        for q in started:
            p.clock.join(q.clock)
        p.give(operation, values)

    return step


@runs("tt.reduce")
def reduce(operation: Operation):
    axis, block = int(operation.attribute("axis")), Block(operation.regions[0])

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
            barrier.arrive(operation, p.release(), p, bar.threads)
            if bar.waits:
                ended = lambda b=barrier, g=generation: len(b.past) > g  # noqa: E731
                yield Blocked(operation, ended, barrier)
                p.clock.join(barrier.past[generation])
        compute(p)

    if asm.bars() and any(type.shape for type in types):
        raise NotImplementedError(f"{operation}: a named barrier for each element")
    return meet if asm.bars() else compute
