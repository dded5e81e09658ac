"""JSON, and the errors of reading: a ModelFileError that names the file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from engine.config import read_file
from engine.errors import ModelFileError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Errors: ModelFileError."""
    return parse_json(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """A small file, whole. Errors: ModelFileError."""
    with file_errors(path):
        return read_file(path)


def parse_json(content: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object. Errors: ModelFileError, which begins with `what`."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what}: must be JSON; got {error}. Download it again.") from error
    if not isinstance(parsed, dict):
        raise ModelFileError(
            f"{what}: must be a JSON object; got {type(parsed).__name__}. Download it again."
        )
    return parsed


def check_regular(path: Path) -> None:
    """Errors: ModelFileError for a pipe, a device or a socket, which may never end or answer, and
    for an empty file: some of /proc's look like one and wait for ever."""
    if path.exists() and not path.is_file():
        raise unreadable(path, "something other than a file")
    if path.exists() and not path.stat().st_size:
        raise unreadable(path, "an empty file")


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turns what the file system and safetensors raise into a ModelFileError naming the file."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from error


@contextmanager
def about(what: object) -> Iterator[None]:
    """Puts a model's or a part's name in front of errors that only know files and tensors."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{what}: {error}") from error


def unreadable(path: Path, found: object) -> ModelFileError:
    """The error for a file of which this was found."""
    line = " ".join(str(found).split())
    return ModelFileError(
        f"{path}: must be complete and readable; got {line[:160]}. "
        "Check permissions, or download it again."
    )
