"""The rules of the house, read off the source: imports, ceilings, what is never written."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench.pages import rooms

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("engine", "kernels", "csrc", "bench", "tests", "examples", "docs", ".ci")
TEXT = {".py", ".cu", ".cuh", ".cpp", ".h", ".md", ".toml", ".txt", ".json", ".sh", ".yaml", ".yml"}
FORBIDDEN_IMPORTS = [  # (files, what they never import)
    ("kernels/**/*.py", {"engine", "bench", "tests", "diffusers", "transformers"}),
    ("engine/**/*.py", {"triton", "bench", "tests"}),
    ("engine/model.py", {"engine.sample", "engine.train", "engine.graphs", "engine.pipeline"}),
    ("engine/sample.py", {"engine.train", "engine.parallel", "torch.distributed"}),
    ("engine/run.py", {"engine.train", "engine.parallel", "torch.distributed"}),
    ("engine/train/*.py", {"engine.sample", "engine.run"}),
    ("engine/data/*.py", {"engine.toy"}),
    ("engine/planning/*.py", {"torch", "engine.model", "engine.weights", "engine.pipeline"}),
    ("bench/**/*.py", {"tests"}),
]
# In pieces, or this file would break its own rule.
FORBIDDEN_WORDS = [
    "/" + "work/",
    "../" + "shared",
    "sub" + "agent",
    "pypi" + ".org",
    "python" + "hosted",
    "download.pytorch" + ".org",
]


def python_files(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def text_files() -> list[Path]:
    inside = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    files = [*inside, *(path for path in ROOT.iterdir() if path.is_file())]
    files = [path for path in files if "__pycache__" not in path.parts]
    return sorted(path for path in files if path.suffix in TEXT or not path.suffix)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def calls(node: ast.AST):
    return (child for child in ast.walk(node) if isinstance(child, ast.Call))


def called_name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def imports(path: Path) -> set[str]:
    """Dotted names that `path` imports anywhere, `from a import b` as both a and a.b."""
    base = ROOT / "kernels" if (ROOT / "kernels") in path.parents else ROOT
    taken = rooms.imported(".".join(path.relative_to(base).with_suffix("").parts), path)
    return {n for module, name in taken for n in (module, f"{module}.{name}" if name else module)}


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


@pytest.mark.parametrize("pattern, forbidden", FORBIDDEN_IMPORTS)
def test_imports_point_one_way(pattern, forbidden):
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in ROOT.glob(pattern)
        for name in imports(path)
        if any(name == stem or name.startswith(stem + ".") for stem in forbidden)
    ]
    assert not found


def test_one_guard_for_triton():
    users = {
        path.name
        for path in python_files("kernels")
        if any(name.split(".")[0] == "triton" for name in imports(path))
    }
    assert users <= {"_triton.py"}


def test_kernels_is_a_source_root_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_block_forward_neither_casts_nor_splits():
    banned = {"to", "float", "bfloat16", "half", "split", "chunk", "cat"}
    model = tree(ROOT / "engine" / "layers.py")
    block = next(n for n in model.body if isinstance(n, ast.ClassDef) and n.name == "Block")
    forward = next(n for n in block.body if isinstance(n, ast.FunctionDef) and n.name == "forward")
    found = [ast.unparse(call) for call in calls(forward) if called_name(call) in banned]
    assert not found


def test_environment_is_read_in_two_places():
    """Our variable in the registry, torchrun's in torchrun.py; _child.py hands all of it on."""
    reads = re.compile(r"^os\.(environb?|getenvb?|putenv|unsetenv)$")
    found = [
        where(path, node)
        for path in python_files("engine", "kernels")
        if path.name not in ("registry.py", "torchrun.py", "_child.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and reads.match(ast.unparse(node))
    ]
    found += [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files("engine", "kernels")
        for name in imports(path)
        if reads.match(name)
    ]
    assert not found


def test_no_pickle():
    unsafe = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    found = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files("engine", "kernels", "bench")
        for name in imports(path)
        if name.split(".")[0] in unsafe
    ]
    assert not found


def test_torch_load_reads_weights_only():
    found = [
        where(path, call)
        for path in python_files("engine", "kernels", "bench", "tests")
        for call in calls(tree(path))
        if ast.unparse(call.func) == "torch.load"
        and not any(
            keyword.arg == "weights_only" and getattr(keyword.value, "value", None) is True
            for keyword in call.keywords
        )
    ]
    found += [
        f"{path.relative_to(ROOT)} hides torch.load behind a from-import"
        for path in python_files("engine", "kernels", "bench", "tests")
        if "torch.load" in imports(path)
    ]
    assert not found


def test_no_assert_and_no_swallowed_exception():
    found = [
        where(path, node)
        for path in python_files("engine", "kernels")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.ExceptHandler) and all(isinstance(n, ast.Pass) for n in node.body))
    ]
    assert not found


def test_cuda_sources_need_no_torch_headers():
    include = re.compile(r"#\s*include\s*[<\"](torch|ATen|c10|pybind11)\b")
    cuda = [path for path in (ROOT / "csrc" / "cuda").rglob("*") if path.is_file()]
    found = [str(path.relative_to(ROOT)) for path in cuda if include.search(path.read_text())]
    assert not found


def test_words_kept_out():
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in text_files()
        for word in FORBIDDEN_WORDS
        if word in path.read_text(encoding="utf-8").lower()
    ]
    assert not found


@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_is_clean(words):
    command = [sys.executable, "-m", "ruff", *words, "--quiet", "--output-format", "concise", "."]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
