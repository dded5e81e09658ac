"""Python's source as the rules read it: which lines hold code, and where the functions are."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ("engine", "kernels", "bench", "tests", "examples")
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def is_device(node: ast.AST) -> bool:
    return any(re.match(r"(triton|gluon)\.jit\b", d) for d in decorators(node))


def decorators(node: ast.AST) -> list[str]:
    return [ast.unparse(decorator) for decorator in getattr(node, "decorator_list", [])]


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that count."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            if ast.get_docstring(node, clean=False) is not None:
                found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if is_device(node):
            found -= set(range(node.lineno + 1, node.body[0].lineno))
    return found


def functions(tree: ast.AST, inside: str = "") -> list[tuple[str, ast.FunctionDef]]:
    """(dotted name, node) of every function; one in another counts for both."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{inside}.{node.name}".lstrip(".")
            found += [] if isinstance(node, ast.ClassDef) else [(name, node)]
        found += functions(node, name)
    return found
