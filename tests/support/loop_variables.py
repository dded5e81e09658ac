"""Loop variables that Triton's frontend loses, found while it builds the first IR of a kernel.

A loop carries the variables whose value a first visit of its body changes. In

    previous = slot
    for i in range(n):
        use(previous)
        previous = slot
        slot += 1

that visit gives `previous` the value it had, so the loop does not carry it and every iteration uses
the first slot. Nothing is said, the machine code is wrong and Python would have been right.
"""

import ast
import importlib
import json
import pkgutil

import torch
import triton
import triton.language as tl
from triton.compiler import code_generator
from triton.compiler.code_generator import CodeGenerator, flatten_values_to_ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

import univigu_kernels
from univigu_kernels import OPS, _triton, ahead
from univigu_kernels._card import CARDS


class Watch:
    """Within it: `lost` (function, line, variable) and `seen` (function, line) of the loops that
    Triton's frontend visits."""

    def __init__(self):
        self.lost, self.seen = set(), set()

    def __enter__(self):
        self.find, self.visit = CodeGenerator._find_carries, CodeGenerator.visit_compound_statement
        bodies = {}

        def find(generator, node, before, ignore=frozenset()):
            found = self.find(generator, node, before, ignore)
            bodies[id(node.body)] = node, before, {*found[0], *ignore}
            return found

        def visit(generator, body):
            self.visit(generator, body)
            if id(body) in bodies:  # the second visit, after which the variables are what they are
                self.compare(generator, *bodies.pop(id(body)))

        CodeGenerator._find_carries, CodeGenerator.visit_compound_statement = find, visit
        return self

    def __exit__(self, *error):
        CodeGenerator._find_carries, CodeGenerator.visit_compound_statement = self.find, self.visit

    def compare(self, generator, node, before, carried):
        place = name_of(generator.jit_fn), node.lineno
        self.seen.add(place)
        for name, value in before.items():
            if name in carried or not code_generator._is_triton_value(value):
                continue
            after = generator.lscope[name]
            if flatten_values_to_ir([value]) != flatten_values_to_ir([after]):
                self.lost.add((*place, name))


def name_of(function) -> str:
    return f"{function.fn.__module__}.{function.fn.__name__}"


class _Built(Exception):
    """The frontend is done."""


def _stop(*_):
    raise _Built


def _only_the_frontend(*given):
    """Triton's hook for a compiler of one's own: without arguments, its name in the cache."""
    if not given:
        return "frontend", "frontend"
    stages = given[1]
    stages.update(dict.fromkeys(stages, _stop))


def build(launches, capability: int) -> None:
    """Takes the launches through the frontend for a GPU of `capability`, and no further."""
    with triton.knobs.runtime.scope(), ahead.target(capability):
        triton.knobs.runtime.add_stages_inspection_hook = _only_the_frontend
        for launch in launches:
            try:
                ahead.compiled(launch)
            except _Built:
                continue
            raise AssertionError(f"{ahead.name_of(launch)} was compiled past the frontend")


def build_all() -> None:
    """Every kernel that the operations launch at the sizes of the models, on the newest card of
    each matrix instruction."""
    built = set()
    newest = {card.instruction: capability for capability, card in sorted(CARDS.items())}
    for capability in newest.values():
        with _triton.rehearsal(CARDS[capability]) as launches:
            for op in OPS.values():
                for sizes in op.cases.values() if op.rehearse else ():
                    op.rehearse(sizes)
        fresh = [one for one in ahead.distinct(launches) if ahead.key_of(one) not in built]
        built.update(map(ahead.key_of, fresh))
        build(fresh, capability)


def loops() -> set[tuple[str, int]]:
    """(function, line) of every loop in the package's device functions that is not unrolled."""
    found = set()
    for module in pkgutil.iter_modules(univigu_kernels.__path__, "univigu_kernels."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, JITFunction):
                for node in ast.walk(value.parse()):
                    if isinstance(node, ast.While) or (
                        isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter)
                    ):
                        found.add((name_of(value), node.lineno))
    return found


@triton.jit
def copied(out, n, slot):
    previous = slot
    for i in range(n):
        tl.store(out + i, previous)
        previous = slot
        slot += 1


@triton.jit
def copied_under_an_if(out, n, slot):
    previous = slot
    while n > 0:
        tl.store(out + n, previous)
        if n % 2 == 0:
            previous = slot
        slot += 1
        n -= 1


@triton.jit
def copied_in_the_inner_loop(out, n, slot):
    for i in range(n):
        previous = slot
        for j in range(n):
            tl.store(out + i + j, previous)
            previous = slot
            slot += 1


@gluon.jit
def copied_in_gluon(out, n, slot):
    previous = slot
    for i in range(n):
        gl.store(out + i, previous)
        previous = slot
        slot += 1


@triton.jit
def computed(out, n, slot):
    previous, same = slot - 1, slot
    for i in range(n):
        tl.store(out + i, previous + same)
        previous = slot
        slot += 1


EXAMPLES = copied, copied_under_an_if, copied_in_the_inner_loop, copied_in_gluon, computed


def report() -> dict:
    """What `main` of this file prints: variables lost in the package, its loops that no launch
    reaches, and variables lost in the examples."""
    with Watch() as ours:
        build_all()
    args = torch.empty(8, dtype=torch.int32, device="meta"), 5, 3
    with Watch() as examples:
        build([_triton.Launch(kernel, (1,), args, {}) for kernel in EXAMPLES], 90)
    found = {"lost": ours.lost, "unreached": loops() - ours.seen, "examples": examples.lost}
    return {name: sorted(places) for name, places in found.items()}


if __name__ == "__main__":
    print(json.dumps(report()))
