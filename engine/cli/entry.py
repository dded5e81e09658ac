"""The command line: runs a command, and turns errors into one line and an exit code.

Nothing large is imported before `main` listens for signals.
"""

import sys

from engine.cli.console import one_line, signals, streams
from engine.errors import MissingPackage, ModelFileError, OutOfMemory

INTERNAL, SIGNALLED, CANCELLED = 1, 128, 130


def exit_code(error: BaseException) -> int:
    from engine.planning.memory import is_out_of_memory

    if hasattr(error, "exit_code"):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return CANCELLED
    if is_out_of_memory(error):
        return OutOfMemory.exit_code
    if isinstance(error, ImportError):
        return MissingPackage.exit_code
    return ModelFileError.exit_code if isinstance(error, OSError) else INTERNAL


def describe(error: BaseException, code: int) -> str:
    if code > SIGNALLED:
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
    """Run one command and return its exit code: 0 done, 1 internal error, 2 usage, 3 missing
    package, 4 model or file, 5 out of memory, 6 non-finite numbers, 7 another rank died, 130
    cancelled, 143 ended by SIGTERM."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv

    with streams(), signals() as received:
        try:
            from engine.cli.parsing import parse

            command = parse([token for token in argv if token != "--debug"])
            if command is not None:
                command.run()
            return 0
        except (Exception, KeyboardInterrupt) as error:
            # An interrupted import or library raises what it likes: the signal is the reason.
            code = SIGNALLED + received[0] if received else exit_code(error)
            if debug:
                import traceback

                traceback.print_exc()
            text = "cancelled." if received else describe(error, code)
            print(f"univigu: {one_line(text)}", file=sys.stderr)
            return code


def program() -> None:
    """`main` as a process of its own."""
    import signal

    code = main()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all is done: no traceback while Python ends
    sys.exit(code)
