"""The arguments of a command line, as a command."""

import contextlib
import io
import re

import tyro
from tyro.conf import FlagCreatePairsOff

from engine.cli.commands import COMMANDS
from engine.cli.console import one_line
from engine.errors import UsageError


def name_of(command: type) -> str:
    """A command as it is typed."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "-", command.__name__).lower()


NAMES = [name_of(command) for command in COMMANDS.__args__]


def parse(argv: list[str]) -> COMMANDS | None:
    """The command of `argv`; None when the help was asked for and printed. Errors: UsageError."""
    report = io.StringIO()
    try:
        with contextlib.redirect_stderr(report):
            return tyro.cli(
                COMMANDS,
                prog="univigu",
                description="Video and captions from one diffusion transformer. --debug, "
                "anywhere, shows the traceback of an error.",
                args=argv,
                config=(FlagCreatePairsOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
    names = [name for name in argv[:1] if name in NAMES]
    raise UsageError(f"{complaint(report.getvalue())} See {' '.join(['univigu', *names])} --help.")


def complaint(report: str) -> str:
    """tyro's framed report in one line: its first paragraph, and the flags that it finds
    similar.

    The frame is drawn in Unicode or ASCII and coloured or not, as stdout allows.
    """
    lines = [line.strip("│ ") for line in re.sub(r"\x1b\[[\d;]*m", "", report).splitlines()]
    body = "\n".join("" if set(line) <= set("─-╰╯") else line for line in lines[1:])
    paragraphs = [one_line(paragraph) for paragraph in re.split(r"\n{2,}", body.strip())]
    message = re.sub(r"^Error parsing __\S+: ", "", paragraphs[0])
    for paragraph in paragraphs[1:]:
        if paragraph.startswith("Perhaps you meant"):
            flags = re.findall(r"(?<!\S)--[a-z][a-z-]*(?!\S)", paragraph)
            near = [flag for flag in dict.fromkeys(flags) if flag != "--help"]
            message += f". Perhaps you meant {' or '.join(near)}"
    return f"{message.rstrip('.')}."
