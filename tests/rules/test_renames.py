"""A file gets its name in one place, after its data are on the disk."""

import ast
import os

import pytest
from counting import ROOT

from engine.files import writing

# A checkpoint has a protocol of its own, which tests/files/test_checkpoint.py watches.
MAY = {"engine/files/writing.py", "engine/checkpoint/commit.py"}
MOVERS = {"os": {"replace", "rename", "renames", "link"}, "shutil": {"move"}}


def renames(text: str) -> list[int]:
    """The lines of `text` that give a file another name. A Path's replace has one argument, a
    string's has two."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names}
            found += [node.lineno] if names & MOVERS.get(node.module, set()) else []
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        by_path = node.func.attr == "replace" and len(node.args) == 1 and not node.keywords
        if by_path or node.func.attr in MOVERS.get(module, {"rename"}):
            found.append(node.lineno)
    return found


def test_files_are_renamed_in_one_place():
    found = {}
    for path in (ROOT / "engine").rglob("*.py"):
        if lines := renames(path.read_text(encoding="utf-8")):
            found[path.relative_to(ROOT).as_posix()] = lines
    assert found.keys() == MAY, found


@pytest.mark.parametrize(
    "line",
    [
        "os.replace(a, b)",
        "os.rename(a, b)",
        "os.renames(a, b)",
        "os.link(a, b)",
        "shutil.move(a, b)",
        "from os import replace",
        "from os import path, rename",
        "from shutil import move",
        "path.rename(b)",
        "path.replace(b)",
        "(folder / 'a').replace(b)",
        "Path(a).rename(b)",
    ],
)
def test_a_rename_is_found(line):
    assert renames(line) == [1]


@pytest.mark.parametrize(
    "line", ["text.replace('a', 'b')", "replace(config, a=1)", "replace(x)", "os.remove(a)"]
)
def test_what_is_no_rename(line):
    assert renames(line) == []


def test_data_is_on_the_disk_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    done, replace, fsync = [], os.replace, os.fsync

    def synced(descriptor):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def renamed(old, new):
        done.append(f"{old.name} -> {new.name}")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with writing.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert done == [partial.name, f"{partial.name} -> a.txt", tmp_path.name]
    assert (tmp_path / "a.txt").read_text() == "whole"
