"""The pages of docs/ speak the truth: commands parse or run, blocks of code compile, the worked
example works, paths, names and links exist, and the drawing is that of the code.

A command in a page is executed here unless it says why not: `# needs a GPU`, or
`# not in CI: why, N minutes`. Those must parse.
"""

import ast
import dataclasses
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import engine
from bench.pages import drawing
from engine import cli
from engine.cli import checks
from engine.config import PRESETS
from engine.planning import memory
from univigu_kernels import OPS, bind

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
README = ROOT / "README.md"
EXAMPLE, SERVING = ROOT / "docs" / "add-an-op.md", ROOT / "docs" / "serving.md"
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
TEXTS = [README, CONTRIBUTING, *PAGES]
each_text = pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)


class Fence(NamedTuple):
    """A fenced block: the words after its fence, its text, and what comes before it."""

    info: str
    body: str
    before: str


class Command(NamedTuple):
    page: str
    line: str
    mark: str


@cache
def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.S | re.M)
    return [Fence(match[1], match[2], text[: match.start()]) for match in found]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def commands(page: Path) -> list[Command]:
    found = []
    for fence in fences(page):
        language, _, rest = fence.info.partition(" ")
        if language != "sh":
            continue
        for line in fence.body.replace("\\\n", " ").splitlines():
            line, _, comment = line.partition(" #")
            if line.strip() and not line.startswith("#"):
                mark = "needs a GPU" if rest == "gpu" else comment.strip()
                found.append(Command(page.name, line.strip(), mark))
    return found


def is_executed(command: Command) -> bool:
    return not command.mark.startswith(("needs a GPU", "not in CI:"))


ALL = [command for page in PAGES for command in commands(page)]
EXECUTED: dict[str, str] = {}  # line: the first page that has it
for _command in filter(is_executed, ALL):
    EXECUTED.setdefault(_command.line, _command.page)


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))


def problem(words: list[str]) -> str | None:
    """What is wrong with a command that is not executed here, or None."""
    words = words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]
    program, *rest = words
    if program == "torchrun":
        program, rest = "univigu", rest[rest.index("-m") + 2 :]

    if program in ("python", "pytest"):
        files = [word for word in rest if re.search(r"\.(py|sh)$", word)]
        if rest[0] == "-m" and rest[1] == "bench":
            files = ["bench/__main__.py"]
        missing = [file for file in files if not (ROOT / file).exists()]
        return f"no such file: {missing}" if missing or not files else None

    if program == "make":
        unknown = {word for word in rest if "=" not in word} - targets()
        return f"no such target: {unknown}" if unknown else None

    if program == "pip":
        asked = ",".join(re.findall(r"\[([\w,-]+)\]", " ".join(rest))).split(",")
        unknown = set(filter(None, asked)) - set(extras())
        return f"no such extra: {unknown}" if unknown else None

    if program == "univigu":
        return None if cli.parse(rest) is not None else "asks for the help"
    return None if "/" in program and (ROOT / program).exists() else f"cannot check {program!r}"


def extras() -> dict[str, list[str]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def test_every_command_that_is_not_run_says_why_and_parses():
    assert ALL and len(EXECUTED) >= 5
    wrong = []
    for command in ALL:
        if command.mark.startswith("not in CI:"):
            reason = command.mark.removeprefix("not in CI:")
            if not re.search(r"\S.*, \d+ (minute|second)s?$", reason):
                rule = "the mark is `not in CI: why, N minutes`"
                wrong.append(f"{command.page}: {command.line}: {rule}")
        if said := problem(shlex.split(command.line)):
            wrong.append(f"{command.page}: {command.line}: {said}")
    assert not wrong


@each_text
def test_every_make_target_that_is_named_exists(page):
    assert set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", page.read_text(), re.M)) <= targets()


def test_the_check_of_commands_can_fail():
    assert problem(["make", "no-such-target"]) and problem(["curl", "x"])
    assert problem(["python", "bench/none.py"]) and problem(["pip", "install", ".[none]"])
    assert problem(shlex.split("torchrun --nproc-per-node 2 -m engine env")) is None
    with pytest.raises(ValueError, match="no-such-flag"):
        problem(["univigu", "env", "--no-such-flag"])


def process(words: list[str], folder: Path, **variables) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | variables
    env.pop("TRITON_INTERPRET", None)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@each_page
def test_the_commands_run(page, tmp_path):
    """In order, in one folder: a command may read what the one before it wrote."""
    (tmp_path / "engine").symlink_to(ROOT / "engine")  # for --model-path engine/assets/tiny
    for line in [line for line, first in EXECUTED.items() if first == page.name]:
        program, *words = shlex.split(line)
        known = {"univigu": [sys.executable, "-m", "engine"], "python": [sys.executable]}
        done = process(known[program] + words, tmp_path)
        assert done.returncode == 0, line + done.stdout + done.stderr
        assert done.stdout.strip()


def job(mode: str, flags: str) -> memory.Job:
    """The run of 480x832x81 with these flags of `univigu generate`, or of `caption`."""
    made = ["caption", "--video", "x.mp4"] if mode == "v2t" else ["generate", "--prompt", "x"]
    command = cli.parse(made + shlex.split(flags))
    chosen, names = command.sampling, ("num_frames", "height", "width")
    fields = {"steps": chosen.num_inference_steps, "text_rows": chosen.text_rows}
    fields |= {"precision": chosen.precision, "vae_tiling": chosen.vae_tiling}
    fields |= {name: getattr(command, name, None) for name in names}
    guided = mode != "v2t" and (command.video.guidance_scale or 5.0) > 1
    fields |= {"guided": guided}
    fields |= {"video_cache": checks.video_cache(getattr(command, "video_cache", "exact"))}
    kept = {name: value for name, value in fields.items() if value is not None}
    return memory.Job(mode=mode, offload=chosen.offload.replace("-", "_"), **kept)


def test_the_table_of_sizes_is_the_estimate():
    rows = re.findall(r"^\| (t2vt?|v2t) \| (.*?) \| (.*?) \| (.*?) \|", SERVING.read_text(), re.M)
    assert len(rows) >= 10
    for mode, flags, *cells in rows:
        added = "--offload text-encoder --vae-tiling " if flags.startswith("+") else ""
        asked = job(mode, added + flags.removeprefix("none").strip("+` "))
        for preset, cell in zip(("wan2.1-1.3b", "wan2.1-14b"), cells, strict=True):
            sums = memory.peaks(memory.estimate(PRESETS[preset], asked))
            expected = f"{max(sums.values()) / 1e9:.1f} ({sums[memory.DENOISING] / 1e9:.1f})"
            assert cell == expected, (mode, flags, preset)


def headings(page: Path) -> set[str]:
    lines = re.findall(r"^#+ (.*)$", prose(page), re.M)
    kept = (re.sub(r"[^\w\- ]", "", line.lower()) for line in lines)
    return {line.strip().replace(" ", "-") for line in kept}


@each_text
def test_every_link_resolves(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in headings(file)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert all(f"({page.name})" in index for page in PAGES if page.name != "README.md")


def made_by_the_example() -> set[str]:
    return {target(fence) for fence in fences(EXAMPLE) if fence.info == "python"}


def qualified(tree: ast.AST, names: list[str]) -> bool:
    """Whether a module defines the function, class or constant at a dotted name."""
    if not names:
        return True
    for node in ast.iter_child_nodes(tree):
        if getattr(node, "name", None) == names[0]:
            return qualified(node, names[1:])
        bound = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if names[0] in [getattr(name, "id", None) for name in bound]:
            return len(names) == 1
    return False


def exists(name: str) -> bool:
    """A path (a pattern too), `path::Name.method`, or a dotted Python name."""
    path, _, inside = name.partition("::")
    if inside:
        file = ROOT / path
        return file.exists() and qualified(ast.parse(file.read_text()), inside.split("."))
    if re.fullmatch(r"(engine|univigu_kernels)(\.\w+)+", name):
        module, *rest = name.split(".")
        found = importlib.import_module(module)
        for part in rest:
            if not hasattr(found, part):
                found = importlib.import_module(f"{found.__name__}.{part}")
            else:
                found = getattr(found, part)
        return True
    return any(ROOT.glob(name.rstrip("/"))) or name in made_by_the_example()


def named(page: Path) -> list[str]:
    """What is in backticks and looks like a path of the repository or a name of its code."""
    spans = (span.rstrip("()") for span in re.findall(r"`([^`\n]+)`", prose(page)))
    path = r"(?:[\w.*-]+/)+[\w.*-]*(?:::[\w.]+)?|[\w-]+\.(?:py|md|sh)(?:::[\w.]+)?"
    return [s for s in spans if re.fullmatch(rf"{path}|(?:engine|univigu_kernels)(?:\.\w+)+", s)]


@pytest.mark.parametrize("page", [CONTRIBUTING, *PAGES], ids=lambda page: page.name)
def test_every_path_and_name_exists(page):
    missing = []
    for name in named(page):
        try:
            found = exists(name)
        except ImportError:
            found = False
        missing += [] if found else [name]
    assert not missing


def test_the_check_of_names_can_fail():
    assert exists("engine/layers.py::Block.forward") and exists("engine.fp8.drift")
    assert not exists("engine/layers.py::Block.backward") and not exists("bench/none.py")
    with pytest.raises(ImportError):
        exists("engine.fp8.none")


@each_page
def test_python_blocks_compile_and_lines_are_short(page):
    for fence in fences(page):
        assert fence.info in ("sh", "sh gpu", "python", "diff"), "say what the block is"
        if fence.info == "python":
            compile(fence.body, page.name, "exec")
    lines = enumerate(page.read_text().splitlines(), 1)
    assert not [n for n, line in lines if len(line) > 120 and not line.startswith("|")]


def target(fence: Fence) -> str:
    """The file that a block of the worked example belongs to: the last one named before it."""
    return re.findall(r"`([\w/]+\.py)`", fence.before)[-1]


def change(text: str, diff: str) -> str:
    """A diff of one hunk without line numbers; its old lines must stand in the text once."""
    lines = diff.splitlines()
    old, new = ("\n".join(x[1:] for x in lines if x[:1] != sign) for sign in "+-")
    assert text.count(old) == 1, f"{text.count(old)} places for\n{diff}"
    return text.replace(old, new)


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> Path:
    """A copy of the repository, changed as the worked example says."""
    copy = tmp_path_factory.mktemp("repository")
    ignored = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("kernels", "bench"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in ("conftest.py", "support/contracts.py", "kernels/test_ops.py"):
        (copy / "tests" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tests" / name, copy / "tests" / name)
    shutil.copy(ROOT / "pyproject.toml", copy)
    for fence in fences(EXAMPLE):
        if fence.info not in ("python", "diff"):
            continue
        file = copy / target(fence)
        text = file.read_text() if file.exists() else ""
        join = "\n\n" if text else ""
        added = fence.info == "python"
        file.write_text(text + join + fence.body if added else change(text, fence.body))
    return copy


def follow(folder: Path, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(map(str, (folder / "kernels", ROOT)))
    return process([sys.executable, *words], folder, PYTHONPATH=paths)


def test_the_worked_example_keeps_the_contract(followed):
    words = ["tests/kernels/test_ops.py", "tests/kernels/test_scale_rows.py", "-k", "scale_rows"]
    done = follow(followed, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 14 + 9  # of the registry; its own


PROBE = """
import sys
import torch
from univigu_kernels import OPS, bind
sys.path[:0] = ["bench/compiled", "bench/harness"]
import aot, inputs
tasks = [task for task in aot.tasks(["scale_rows"]) if task[3] == 90][:2]
print(len(tasks), [aot.faults(aot.work(task)) for task in tasks])
case = {"B": 1, "V": 48, "T": 8, "D": 64, "H": 2, "K": 32}
args, _ = inputs.arguments("scale_rows", case, "cpu", torch.float32)
print(*OPS["scale_rows"].reference(*args).shape, bind().scale_rows.__name__)
"""


def test_the_worked_example_is_compiled_and_benched(followed):
    pytest.importorskip("triton")
    done = follow(followed, "-c", PROBE)
    assert done.stdout.splitlines() == ["2 [[], []]", "1 56 64 scale_rows_reference"], done.stderr


def test_the_worked_example_is_written_as_the_house_writes(followed):
    made = [str(followed / name) for name in made_by_the_example()]
    for words in (["check"], ["format", "--check"]):
        done = follow(followed, "-m", "ruff", *words, "--no-cache", *made)
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_drawing_shows_what_a_block_calls():
    called, ops = [], bind("reference")

    def recorded(name):
        def call(*args, **options):
            called.append(name)
            return getattr(ops, name)(*args, **options)

        return call

    cfg = dataclasses.replace(engine.ModelConfig.preset("tiny"), layers=2)
    model = engine.UniViGU(
        cfg, kernels=dataclasses.replace(ops, **{name: recorded(name) for name in OPS})
    )
    context = model.encode_context(torch.randn(1, 3, cfg.text_dim))
    conditions = model.conditions(torch.ones(1), torch.ones(1))
    called.clear()
    video, tokens = torch.randn(1, 16, 2, 4, 4), torch.zeros(1, 5, dtype=torch.int64)
    model.features(video, tokens, conditions, context)
    block = [stage.op for stage in drawing.BLOCK]
    assert called == [drawing.OPENS.op, *block, *block]


def test_the_drawing_is_that_of_the_registry(tmp_path):
    pytest.importorskip("matplotlib")
    from pictures import assert_same

    first = drawing.write(tmp_path).read_bytes()
    assert drawing.write(tmp_path).read_bytes() == first and len(first) < 120_000
    assert_same(ROOT / "docs" / "joint-block.png", tmp_path / "joint-block.png")
