"""How long a file and a function may be, in lines that hold code: no blank line, comment or
docstring counts, and a kernel's parameter list counts as one. Charging for air buys none."""

import ast
import re

import pytest
from counting import PYTHON, ROOT, code_lines, decorators, functions, is_device

SOURCES = ("csrc", "bench", "tests", ".ci")
FILE, GLUON_FILE = 300, 500
FUNCTION, FORWARD, DEVICE, PARTITION = 45, 25, 80, 130
SOURCE_FILE, WIDTH = 400, 100  # C++, CUDA and shell: physical lines
SKIPS = 20  # places that the formatter leaves alone: a matrix or a signature clearer by hand
OVER: dict[str, int] = {}  # what exceeded a ceiling when they began to count code, and still does


def ceiling_of(node: ast.FunctionDef) -> int:
    if is_device(node):
        return PARTITION if "gluon.jit" in decorators(node) else DEVICE
    return FORWARD if node.name == "forward" else FUNCTION


def over_ceilings(text: str, name: str) -> dict[str, int]:
    """What is too long in one file, with its lines."""
    lines, found = code_lines(text), {}
    ceiling = GLUON_FILE if "@gluon.jit" in text else FILE
    if len(lines) > ceiling:
        found[name] = len(lines)
    for function, node in functions(ast.parse(text)):
        length = len(lines & set(range(node.lineno, node.end_lineno + 1)))
        if length > ceiling_of(node):
            found[f"{name}::{function}"] = length
    return found


def test_ceilings():
    """What exceeds them is listed with its length. The list only shrinks."""
    found: dict[str, int] = {}
    for path in (path for room in PYTHON for path in (ROOT / room).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        found |= over_ceilings(text, name)
    assert found == OVER, "cut what is new; where an entry of OVER shrank or went, write that down"


def test_sources_are_short_and_no_line_is_wide():
    found = []
    for path in (path for room in SOURCES for path in (ROOT / room).rglob("*")):
        if path.suffix in (".cu", ".cuh", ".cpp", ".h", ".sh"):
            lines, name = path.read_text(encoding="utf-8").splitlines(), path.relative_to(ROOT)
            found += [f"{name} has {len(lines)} lines"] if len(lines) > SOURCE_FILE else []
            found += [f"{name}:{n} is wide" for n, x in enumerate(lines, 1) if len(x) > WIDTH]
    assert not found


def test_few_places_are_laid_by_hand():
    mark = re.compile(r"# fmt: " + "(skip|off)")
    files = [path for room in PYTHON for path in (ROOT / room).rglob("*.py")]
    assert sum(len(mark.findall(path.read_text(encoding="utf-8"))) for path in files) <= SKIPS


EXAMPLE = '''"""A docstring
of two lines."""

import x  # counts once


def f(a, b):
    """Does not count."""

    # neither does this
    text = """a string
    counts whole"""
    return (
        text
    )


@triton.jit
def kernel(
    a,
    b,
):
    """Does not count."""
    c = a + b
'''


def test_what_counts():
    """import; def, the string's two lines and return's three; decorator, the list as one, c."""
    assert len(code_lines(EXAMPLE)) == 1 + 6 + 3


@pytest.mark.parametrize(
    "head, most",
    [
        ("def f():", FUNCTION),
        ("def forward(self):", FORWARD),
        ("@triton.jit\ndef f(\n    a,\n    b,\n):", DEVICE),
        ("@triton.jit(do_not_specialize=['a'])\ndef f(a):", DEVICE),
        ("@gluon.jit\ndef f(a):", PARTITION),
    ],
)
def test_a_ceiling_is_reached_by_code_alone(head, most):
    body = most - 1
    air = "\n    # a comment\n\n" * 100
    fits = f"{head}{air}" + "    a = 1\n" * body
    assert over_ceilings(fits, "f") == {}
    assert list(over_ceilings(fits + "    a = 1\n", "f")) == [
        "f::" + re.search(r"def (\w+)", head)[1]
    ]


def test_a_long_file_is_found():
    assert over_ceilings("a = 1\n" * FILE, "f") == {}
    assert over_ceilings("a = 1\n" * (FILE + 1), "f") == {"f": FILE + 1}
