"""The doors are frozen: a flag or a name that comes, goes or changes is seen in review."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import doors
from tyro.conf import OmitArgPrefixes, Positional, arg

from engine.cli import main
from engine.cli.parsing import NAMES


def test_doors_are_those_in_the_list():
    """`make doors` writes it. A flag or a name that goes stays as an alias that warns."""
    assert doors.FILE.read_text(encoding="utf-8") == doors.doors()


def test_every_flag_of_the_help_is_in_the_list(capsys):
    blocks = dict(block.split("\n", 1) for block in doors.doors().split("\n\n"))
    for name in NAMES:
        assert main([name, "--help"]) == 0
        shown = re.findall(r"(?m)^[│| ]+(--[a-z][a-z0-9-]+)", capsys.readouterr().out)
        listed = {word.strip(",:") for word in blocks[f"univigu {name}"].split()}
        assert shown and set(shown) <= listed


@dataclass(frozen=True)
class Inner:
    deep: Annotated[int | None, arg(metavar="INT")] = None


@dataclass(frozen=True)
class Example:
    what: Positional[str]
    some_mode: Annotated[Literal["a", "b"], arg(aliases=("--task",))] = "a"
    inner: OmitArgPrefixes[Inner] = Inner()


def test_what_a_line_says():
    assert [*doors.flags(Example)] == [
        "what: str = required",
        "--some-mode, --task: Literal['a', 'b'] = 'a'",
        "--deep: int | None = None",
    ]
