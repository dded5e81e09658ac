"""Where the files of jobs lie: in a folder, or where a URL leads that fsspec opens, for several
servers of one table to see."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from engine.serve.settings import Settings


def files(paths: Iterable) -> Iterator[tuple]:
    """(path, bytes, time of the last change) of each that is there; another server may delete any
    of them meanwhile."""
    for path in paths:
        with suppress(FileNotFoundError):
            about = path.stat()
            yield path, about.st_size, about.st_mtime


def here(settings: Settings, path) -> Path:
    """A file on this machine: itself, or a copy, which stays while it is asked for."""
    if isinstance(path, Path):
        return path
    from engine.files import replacing

    copy = settings.copies / path.name
    with suppress(FileNotFoundError):
        os.utime(copy)
        return copy
    with replacing(copy) as unfinished:
        path.fs.get_file(path.path, str(unfinished))
    return copy


def workshop(settings: Settings) -> Path:
    """The folder of this machine where videos are made; `keep` puts them where all servers see
    them."""
    return settings.videos if isinstance(settings.videos, Path) else settings.copies


def keep(settings: Settings, path: Path) -> None:
    """The video comes after its sidecar."""
    shared = settings.videos
    if isinstance(shared, Path):
        return
    for made in (path.with_suffix(".json"), path):
        shared.fs.put_file(str(made), (shared / made.name).path)


def remove_result(settings: Settings, id: str) -> None:
    """All files of a job, of which none may be there."""
    for room in (settings.videos, settings.copies):
        for path in room.glob(f"{id}.*"):
            with suppress(FileNotFoundError):
                path.unlink()
