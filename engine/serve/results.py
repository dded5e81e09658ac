"""The files of a job."""

from contextlib import suppress

from engine.serve.settings import Settings


def remove_result(settings: Settings, id: str) -> None:
    """All files of a job, of which none may be there."""
    for path in settings.results.glob(f"{id}.*"):
        with suppress(FileNotFoundError):
            path.unlink()
