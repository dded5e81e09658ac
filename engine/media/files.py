"""What everything that reads or writes media needs: optional packages, and files that appear
complete or not at all."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UsageError

MAX_SIDE = 8192


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`: on success it takes the place of `path`, on error it goes."""
    folder = path.absolute().parent
    if not folder.is_dir():
        raise UsageError(f"output: the folder of {path} must exist; got {folder}. Create it.")
    partial = folder / f".{secrets.token_hex(8)}.partial"
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_side(height: int, width: int) -> None:
    """Errors: UsageError for sides over 8192 pixels."""
    if max(height, width) > MAX_SIDE:
        raise UsageError(
            f"video: width and height must be at most {MAX_SIDE} pixels; got {width}x{height}. "
            "Scale the video down first."
        )
