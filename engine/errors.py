"""The errors a user can cause or meet. Each carries the exit code that the command line returns for
it."""

from collections.abc import Iterable
from importlib import import_module
from types import ModuleType

MOST_CHARACTERS = 1500  # of a message; what is quoted may be of any length


class _Said(ValueError):
    """An error whose message keeps its beginning and its end, the rule and the next step, where
    what it quotes is too long for a line."""

    def __init__(self, text: str = ""):
        begin, end = MOST_CHARACTERS * 2 // 3, MOST_CHARACTERS // 3
        super().__init__(text if len(text) <= begin + end else f"{text[:begin]} ... {text[-end:]}")


class UsageError(_Said):
    """A flag, argument or input that breaks a rule; the message names it, the rule, the value and
    the next step."""

    exit_code = 2


class MissingPackage(ImportError):
    """An optional package that the requested feature needs; the message names the package and the
    extra."""

    exit_code = 3


def require(module: str, extra: str, package: str | None = None) -> ModuleType:
    """The module, imported.

    extra: the one of this package's extras that installs it.
    package: its name where that is not the module's first.

    Errors: MissingPackage.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        raise MissingPackage(
            f"{extra}: package {package} must be installed; got {error}. "
            f"Install the extra `{extra}`: pip install 'univigu-engine[{extra}]'."
        ) from error


class ModelFileError(_Said):
    """A folder, checkpoint, index or video file that is absent, truncated, mis-shaped or
    inconsistent."""

    exit_code = 4


class OutOfMemory(MemoryError):
    """A stage of a run that does not fit in memory; the message names the stage and the flags that
    save most there."""

    exit_code = 5


class NonFinite(ArithmeticError):
    """NaN or Inf where the run cannot go on; the message names the step and the place."""

    exit_code = 6


class Cancelled(RuntimeError):
    """The caller asked for the run to stop; nothing was written, or a training's checkpoint was."""

    exit_code = 130


def go_on() -> None:
    """The check of work that nobody can cancel."""


def listed(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
