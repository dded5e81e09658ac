"""The one way to write a file: complete or not at all, also if the power fails.

What is written is on the disk before it gets its name, and its name before the call returns.
"""

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import ModelFileError, UsageError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`: on success it takes the place of `path`, on error it goes."""
    check_folder(path)
    partial = path.absolute().parent / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Errors: UsageError where the folder of `path` is absent."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"output: the folder of {path} must exist; got {folder}. Create it.")


def publish(written: Path, path: Path) -> None:
    """Gives a finished file, or a folder whose files are on the disk, its name `path`."""
    sync(written)
    os.replace(written, path)
    sync(path.absolute().parent)


def sync(path: Path) -> None:
    """Returns when a file's data, or a folder's names, are on the disk. Windows opens no folder,
    and syncs a file that is open for writing alone."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview]) -> dict[str, int | str]:
    """Writes and syncs one file; returns its entry in a manifest, {"size", "sha256"}, computed from
    what was meant to be written."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


@contextmanager
def save_errors(path: Path) -> Iterator[None]:
    """Turns what the file system raises while `path` is written into a ModelFileError."""
    try:
        yield
    except OSError as error:
        raise ModelFileError(
            f"{path}: must be writable; got {error}. Check space and permissions."
        ) from error
