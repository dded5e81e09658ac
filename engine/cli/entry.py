"""The command line: parses a command, runs it, and turns errors into one line and an exit code."""

import contextlib
import io
import re
import sys
import traceback

import tyro
from tyro.conf import FlagCreatePairsOff

from engine.cli.commands import COMMANDS
from engine.errors import MissingPackage, ModelFileError, OutOfMemory, UsageError
from engine.planning.memory import is_out_of_memory

INTERNAL, CANCELLED = 1, 130
NAMES = [command.__name__.lower() for command in COMMANDS.__args__]


def one_line(text: str) -> str:
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "?" for c in line)


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


def exit_code(error: BaseException) -> int:
    if isinstance(error, KeyboardInterrupt):
        return CANCELLED
    if hasattr(error, "exit_code"):
        return error.exit_code
    if is_out_of_memory(error):
        return OutOfMemory.exit_code
    if isinstance(error, ImportError):
        return MissingPackage.exit_code
    return ModelFileError.exit_code if isinstance(error, OSError) else INTERNAL


def describe(error: BaseException, code: int) -> str:
    if code == CANCELLED:
        return str(error) or "cancelled."
    if code == OutOfMemory.exit_code and not isinstance(error, OutOfMemory):
        got = f"{type(error).__name__}: {error}".partition("\n")[0].rstrip(" .:")
        return (
            f"memory: the run ran out of memory ({got}). "
            "Use fewer frames, a smaller size, a smaller --batch-size or --dtype bfloat16."
        )
    if code == INTERNAL:
        return (
            f"internal error: {type(error).__name__}: {error}. "
            "Run again with --debug and report the traceback."
        )
    return str(error)


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 1 internal error, 2 usage, 3 missing
    package, 4 model or file, 5 out of memory, 6 non-finite numbers, 7 another rank died, 130
    cancelled, 143 ended by SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        command = parse([token for token in argv if token != "--debug"])
        if command is not None:
            command.run()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code(error)
        if debug:
            traceback.print_exc()
        print(f"univigu: {one_line(describe(error, code))}", file=sys.stderr)
        return code
