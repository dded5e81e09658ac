"""What a user may rely on, as text: every command with its flags, and every public name.

`make doors` writes it to tests/support/doors.txt.
"""

import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Union, get_args, get_origin, get_type_hints

from tyro.conf import Positional

import engine
import univigu_kernels
from engine.cli.commands import COMMANDS
from engine.cli.parsing import name_of

FILE = Path(__file__).with_name("doors.txt")


def shown(kind: object) -> str:
    """A type as it is written, the same on every Python."""
    if get_origin(kind) in (Union, UnionType):
        return " | ".join(shown(one) for one in get_args(kind))
    if kind is NoneType:
        return "None"
    plain = isinstance(kind, type) and not get_args(kind)
    return kind.__name__ if plain else str(kind).replace("typing.", "").replace("pathlib.", "")


def flags(command: type) -> Iterator[str]:
    """The flags of a command with their other spellings, what each takes, and its default."""
    hints = get_type_hints(command, include_extras=True)
    for field in fields(command):
        hint = hints[field.name]
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else [hint]
        if is_dataclass(kind):
            yield from flags(kind)
            continue
        positional = set(get_args(Positional[int])[1:]) & set(marks)
        name = field.name if positional else "--" + field.name.replace("_", "-")
        aliases = [a for mark in marks for a in getattr(mark, "aliases", None) or ()]
        default = str(field.default) if isinstance(field.default, Path) else field.default
        default = "required" if default is MISSING else repr(default)
        yield f"{', '.join([name, *aliases])}: {shown(kind)} = {default}"


def doors() -> str:
    blocks = {f"univigu {name_of(c)}": flags(c) for c in get_args(COMMANDS)}
    blocks |= {module.__name__: sorted(module.__all__) for module in (engine, univigu_kernels)}
    return "\n".join("\n  ".join([title, *lines]) + "\n" for title, lines in blocks.items())


if __name__ == "__main__":
    FILE.write_text(doors(), encoding="utf-8")
    sys.stdout.write(f"{FILE}\n")
