"""Every name that the tree takes from an installed package is there, also what runs on a GPU alone.

Read off the source: an import, and each chain `module.a.b` up to its first call. What only some
versions have must be asked for as getattr(module, name, default).
"""

import ast
import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ("engine", "kernels", "bench", "tests", "examples")
OWN = {"engine", "bench", "tests", "univigu_kernels"}
# setup.py, and the helpers that pytest puts on the path.
OWN |= {path.stem for path in [*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]}
GUARDED = {  # modules that kernels import from _triton.py
    "triton": "triton",
    "tl": "triton.language",
    "libdevice": "triton.language.extra.libdevice",
}
OPERATORS = "torch.ops."  # registered by what is imported; their own tests call them
SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def own(scope: ast.AST) -> Iterator[ast.AST]:
    """Nodes of a module or function, from the outside in; functions in it without their bodies."""
    for child in ast.iter_child_nodes(scope):
        yield child
        if not isinstance(child, SCOPES):
            yield from own(child)


def imported(node: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(name bound, what it means, what must exist) of an import statement."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            bound = alias.name if alias.asname else alias.name.split(".")[0]
            yield alias.asname or bound, bound, alias.name
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            dotted = f"{node.module}.{alias.name}"
            if node.module.endswith("_triton"):
                dotted = GUARDED.get(alias.name, dotted)
            yield alias.asname or alias.name, dotted, dotted


def bindings(scope: ast.AST) -> dict[str, str | None]:
    """The module or member that each name means; None: something else."""
    found: dict[str, str | None] = {}
    args = getattr(scope, "args", None)
    found |= {a.arg: None for a in ast.walk(args) if isinstance(a, ast.arg)} if args else {}
    for node in own(scope):
        for name, dotted, _ in imported(node):
            found[name] = dotted if found.get(name, dotted) == dotted else None
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found[node.id] = None
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler) and node.name:
            found[node.name] = None
    return found


def chains(scope: ast.AST, known: dict[str, str | None]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what a module or function takes from a module."""
    known, inner = known | bindings(scope), set()
    for node in own(scope):
        yield from ((node.lineno, dotted) for *_, dotted in imported(node))
        if isinstance(node, SCOPES):
            yield from chains(node, known)
        if isinstance(node, ast.Attribute) and node not in inner:
            names = []
            while isinstance(node, ast.Attribute):
                names.append(node.attr)
                node = node.value
                inner.add(node)
            if isinstance(node, ast.Name) and known.get(node.id):
                yield node.lineno, ".".join([known[node.id], *reversed(names)])


@cache
def resolves(dotted: str) -> bool:
    first, *names = dotted.split(".")
    path, thing = first, importlib.import_module(first)
    for name in names:
        path = f"{path}.{name}"
        if not hasattr(thing, name):
            try:
                importlib.import_module(path)
            except ModuleNotFoundError:
                return False
        thing = getattr(thing, name)
    return True


@cache
def installed(package: str) -> bool:
    return find_spec(package) is not None


def foreign(text: str) -> list[tuple[int, str]]:
    """(line, dotted name) of what `text` takes from packages that are installed here."""
    found = chains(ast.parse(text), {})
    return [
        (line, dotted)
        for line, dotted in found
        if (package := dotted.split(".")[0]) not in OWN | sys.stdlib_module_names
        and installed(package)
        and not dotted.startswith(OPERATORS)
    ]


def unresolved(text: str) -> list[str]:
    return [f"{line} {dotted}" for line, dotted in foreign(text) if not resolves(dotted)]


def test_what_is_asked_of_packages_exists():
    asked, missing = Counter(), []
    for path in sorted(path for room in PYTHON for path in (ROOT / room).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        asked.update(dotted.split(".")[0] for _, dotted in foreign(text))
        missing += [f"{path.relative_to(ROOT)}:{found}" for found in unresolved(text)]
    assert not missing
    assert asked["torch"] > 2000 and (asked["triton"] > 500 or not installed("triton")), asked


@pytest.mark.parametrize(
    "text, found",
    [
        ("import torch\ntorch.cuda.memoryallocated(0)", ["2 torch.cuda.memoryallocated"]),
        ("import torch as t\ndef f(x):\n    return t.nope.y", ["3 torch.nope.y"]),
        ("from torch import cuda as c\nc.nope()", ["2 torch.cuda.nope"]),
        ("from torch.nn import nope", ["1 torch.nn.nope"]),
        ("import torch.nope", ["1 torch.nope"]),
        ("def f():\n    from torch import nn\n    g = lambda: nn.nope", ["3 torch.nn.nope"]),
        ("import torch\nf = torch.zeros(1).nope\ng = torch.nn.functional.linear", []),
        ("import torch\ndef f(torch):\n    return torch.nope", []),
        ("import torch\ndef f():\n    torch = g()\n    return torch.nope", []),
        ("import torch\nf = lambda torch: torch.nope", []),
        ("import torch\ngetattr(torch, 'nope', None)", []),
        ("import not_installed\nnot_installed.nope", []),
    ],
)
def test_what_is_missing_is_named(text, found):
    assert unresolved(text) == found


def test_names_of_kernels_are_those_of_triton():
    if not installed("triton"):
        pytest.skip("needs Triton")
    text = "from univigu_kernels._triton import tl\ntl.dot\ntl.nope"
    assert unresolved(text) == ["3 triton.language.nope"]
