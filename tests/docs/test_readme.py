"""README: its blocks run as they are pasted, its paths exist, and it is short."""

import re
import shlex
from pathlib import Path

import pytest

from bench.pages import measured
from bench.pages.tables import fill
from engine import cli

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "README.md").read_text()
LINES, COLUMNS = 120, 110
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.S | re.M)
PYTHON = [body for language, body in BLOCKS if language == "python"]
WALK = "engine/layers.py", "joint_attention.py", "_flash.py"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A reader's working folder: the root of the repository, as far as README's blocks read it."""
    (tmp_path / "engine").symlink_to(ROOT / "engine")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_short():
    lines = TEXT.splitlines()
    assert len(lines) <= LINES
    assert not [n for n, line in enumerate(lines, 1) if len(line) > COLUMNS]


def test_the_blocks_of_python_are_short():
    counted = [len(list(filter(None, body.splitlines()))) for body in PYTHON]
    assert len(PYTHON) == 2 and max(counted) <= 8


def test_the_blocks_run_as_they_are_pasted(root, capsys):
    """In order, each block of Python with no name but its own."""
    made, commands = {}, 0
    for language, body in BLOCKS:
        for line in body.splitlines():
            if line.startswith("univigu"):
                assert cli.main(shlex.split(line)[1:]) == 0, line
                commands += 1
        if language == "python":
            names: dict = {}
            exec(compile(body, "README.md", "exec"), names)
            made |= names
    assert commands == 1
    assert (root / "clip.mp4").exists() and (root / "clip.json").exists()
    assert made["clip"].caption in capsys.readouterr().out
    assert made["metrics"]["loss"].isfinite()


def test_what_make_is_asked_for_stands_in_one_block():
    (block,) = [body for _, body in BLOCKS if "make test" in body]
    assert [line.split("#")[0].strip() for line in block.splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize(
    "page, tables", [("README.md", measured.first_page), ("docs/measured.md", measured.tables)]
)
def test_tables_of_times_are_those_of_the_results(page, tables):
    """`make pages` writes them."""
    text = (ROOT / page).read_text()
    assert fill(text, tables()) == text


def test_writing_changes_what_is_generated_and_nothing_else(tmp_path):
    pages = {name: (ROOT / name).read_text() for name in ("README.md", "docs/measured.md")}
    (tmp_path / "docs").mkdir()
    for name, text in pages.items():
        bare = re.sub(r"(generated: [^>]+ -->\n).*?(<!-- end)", r"\1\2", text, flags=re.DOTALL)
        assert len(bare) < len(text)
        (tmp_path / name).write_text(bare)
    written = measured.write(tmp_path / "docs")
    assert {str(p.relative_to(tmp_path)): p.read_text() for p in written} == pages


def test_every_path_exists():
    table = TEXT[TEXT.index("## Rooms") :]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) == 9
    missing = []
    for _, where, what, _ in rows:
        named = re.findall(r"`([^`]+)`", where)
        folder = ROOT / named[0]
        near = [ROOT, ROOT / "engine"]
        missing += [name for name in named if not any((base / name).exists() for base in near)]
        files = re.findall(r"`(\w+\.py)`", what)
        missing += [name for name in files if not (folder / name).exists()]
    assert not missing


def test_four_files_lead_to_the_line_that_computes_joint_attention():
    """README names all three that follow it; each of them holds the name of the next."""
    rooms = TEXT[TEXT.index("## Rooms") :]
    assert all(f"`{Path(name).name}`" in rooms for name in WALK)
    kernels = ROOT / "kernels" / "univigu_kernels"
    block, op, loop = ROOT / WALK[0], kernels / WALK[1], kernels / WALK[2]
    assert "self.ops.joint_attention" in block.read_text()
    assert "from . import _flash" in op.read_text()
    assert "tl.dot(q_tile, tl.trans(k_tile)" in loop.read_text()
