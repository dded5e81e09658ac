"""Air and voice: long functions are written in paragraphs, docstrings begin as sentences do."""

import ast
import re

import pytest
from counting import PYTHON, ROOT, code_lines, functions

LONG = 20  # lines of code: a function of so many has a blank line
# "Of " leaves out what the docstring is about, "->" what the function does. A lower-case word
# is one of prose: names and formulas ("x [B, L, D] -> y", "seeds: one per sample") may come first.
HEADLESS = re.compile(r"Of\b|->|[a-z]{2,} [a-zA-Z]")
ARCHAIC = re.compile(r"\b(anew|whatever|alike|besides|whose\s+own)\b", re.IGNORECASE)
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def breathless(text: str) -> list[str]:
    """Names of the long functions without a blank line. One around the docstring does not count,
    nor does one inside a string."""
    code, lines, found = code_lines(text), text.splitlines(), []
    for name, node in functions(ast.parse(text)):
        described = ast.get_docstring(node, clean=False) is not None
        body = node.body[1:] if described else node.body
        within = set(range(node.lineno, node.end_lineno + 1))
        after = range(body[0].lineno, node.end_lineno + 1) if body else ()
        blank = any(not lines[n - 1].strip() and n not in code for n in after)
        if len(code & within) >= LONG and not blank:
            found.append(name)
    return found


def faults_of_voice(text: str) -> list[str]:
    """What the docstrings do wrong, each with the name of what it describes."""
    found = []
    for node in ast.walk(ast.parse(text)):
        said = ast.get_docstring(node) if isinstance(node, DOCUMENTED) else None
        if said is None:
            continue

        name = getattr(node, "name", "the module")
        if HEADLESS.match(said):
            found.append(f"{name} begins {said[:20]!r}")
        found += [f"{name} says {word!r}" for word in ARCHAIC.findall(said)]
    return found


def over_the_tree(check) -> list[str]:
    paths = sorted(path for room in PYTHON for path in (ROOT / room).rglob("*.py"))
    return [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in paths
        for fault in check(path.read_text(encoding="utf-8"))
    ]


def test_long_functions_have_paragraphs():
    assert not over_the_tree(breathless), "put a blank line where the thought turns"


def test_docstrings_begin_with_a_verb_or_a_noun_and_use_plain_words():
    assert not over_the_tree(faults_of_voice)


BODY = "    a = 1\n"


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n" + BODY * (LONG - 1),
        'def f():\n    """A docstring."""\n\n' + BODY * (LONG - 1),
        "def f():\n" + BODY * (LONG - 4) + '    b = """\n\n"""\n',
        "def f():\n" + BODY * (LONG - 2) + "    # a comment\n" + BODY,
        "class C:\n    def f(self):\n" + ("    " + BODY) * (LONG - 1),
    ],
)
def test_a_function_without_a_paragraph_is_found(text):
    assert breathless(text) in (["f"], ["C.f"])


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n" + BODY * (LONG - 2),
        "def f():\n" + BODY + "\n" + BODY * (LONG - 2),
        "def f():\n" + BODY * (LONG - 2) + "\n    # a comment\n" + BODY,
    ],
)
def test_a_short_function_and_one_in_paragraphs_pass(text):
    assert breathless(text) == []


@pytest.mark.parametrize(
    "said",
    [
        "Of the whole matrix.",
        "-> tokens [B, T].",
        "tokens of the samples.",
        "Packs the weight anew.",
        "The same sums, Whatever the threads.",
        "Rows that round alike.",
        "What a call takes besides.",
        "A process whose\n    own it is.",
    ],
)
@pytest.mark.parametrize("head", ["", "class f:\n    ", "def f():\n    ", "async def f():\n    "])
def test_a_fault_of_voice_is_found(head, said):
    assert len(faults_of_voice(f'{head}"""{said}"""\n')) == 1


@pytest.mark.parametrize(
    "said", ["Returns y.", "The rows.", "x [B, D] -> y.", "y = x w.", "adaln: LN(x).", "Often so."]
)
def test_a_plain_docstring_passes(said):
    assert faults_of_voice(f'def f():\n    """{said}"""\n') == []
