"""What an operator may set, each a flag of `univigu serve`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from engine.config.fields import Range
from engine.errors import UsageError, require

GB, MB, DAY = 10**9, 10**6, 86_400
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def folder(where: str) -> Path:
    """A path; of a URL a `UPath`, which has the methods of one. Errors: MissingPackage,
    UsageError."""
    if "://" not in where:
        return Path(where)
    upath = require("upath", "remote", "universal-pathlib")
    try:
        return upath.UPath(where, use_listings_cache=False)  # others write there
    except (ValueError, ImportError) as error:
        raise UsageError(
            f"serve: --results must be a folder or a URL that fsspec opens; got {where}: {error}."
        ) from None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Where a server listens, what it keeps, and its limits."""  # the help's heading of its flags

    RANGES: ClassVar = {
        "port": Range(0, 65_535),
        "queue_limit": Range(1, 10**6),
        "most_frames": Range(1, 65_536),
        "most_pixels": Range(256, 2**26),
        "most_steps": Range(1, 1000),
        "most_prompt": Range(1, 10**6),
        "upload_mb": Range(1, 10**5),
        "uploads_gb": Range(0.001, 10**6),
        "memory_gb": Range(0, 10**6),
        "attempts": Range(1, 100),
        "stall_seconds": Range(0.1, 10**6),
        "drain_seconds": Range(0, 10**6),
        "keep_days": Range(0, 10**5),
        "keep_gb": Range(0, 10**6),
        "caption_batch": Range(1, 256),
        "caption_window_ms": Range(0, 10**4),
    }

    host: str = "127.0.0.1"
    """Where to listen; anything but this machine wants --api-key-file."""
    port: int = 8000
    """0: a free one."""
    data: Path = Path("univigu-data")
    """Folder of results, uploads and the table of jobs."""
    results: str = ""
    """A folder or an fsspec URL of results and uploads that several servers share; none: --data."""
    database: str = ""
    """URL of the jobs' PostgreSQL database, postgresql+psycopg://...; none: SQLite in --data."""
    api_key_file: Path | None = None
    """A file whose first line is the key that requests must bring."""
    allow_folder: tuple[Path, ...] = ()
    """Folders whose videos requests may name by file:// URLs."""
    queue_limit: int = 256
    """Jobs that may wait; one more is answered with 429."""
    most_frames: int = 161
    """Frames of a video, at most."""
    most_pixels: int = 1280 * 720
    """Pixels of a frame, at most."""
    most_steps: int = 100
    """Steps of a job, at most."""
    most_prompt: int = 4000
    """Characters of a prompt, at most."""
    upload_mb: float = 256
    """Megabytes of a request, at most."""
    uploads_gb: float = 10
    """Gigabytes of all uploads; the oldest go first."""
    memory_gb: float = 0
    """Refuse a job whose estimate is above this; 0: what the device has."""
    attempts: int = 2
    """Times a job is begun, if the runner dies under it."""
    stall_seconds: float = 600
    """End the runner when its job shows no sign of life for so long."""
    drain_seconds: float = 30
    """At SIGTERM, time for the job that runs; then it waits for the next start."""
    keep_days: float = 0
    """Delete results after so many days; 0: never."""
    keep_gb: float = 0
    """Delete the oldest results above so many gigabytes; 0: never."""
    caption_batch: int = 8
    """Captions that run as one batch, at most."""
    caption_window_ms: float = 5
    """How long the first of a batch waits for others."""
    interleave: bool = False
    """Captions may run between two steps of a video."""

    def __post_init__(self):
        for field in fields(self):
            allowed, got = self.RANGES.get(field.name), getattr(self, field.name)
            if allowed is not None and got not in allowed:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"serve: {flag} must be {allowed.rule(got)}; got {got}.")

    @property
    def place(self) -> str:
        """Where results and uploads are; the same for all servers of a table."""
        shared = self.results or str(self.data)
        return shared if "://" in shared else str(Path(shared).absolute())

    @property
    def videos(self) -> Path:
        return folder(self.place) / "results"

    @property
    def uploads(self) -> Path:
        return folder(self.place) / "uploads"

    @property
    def copies(self) -> Path:
        """What is on this machine of files that are behind a URL."""
        return self.data / "copies"

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite+pysqlite:///{self.data.absolute() / 'jobs.sqlite'}"

    @property
    def loopback(self) -> bool:
        """Whether nothing but this machine can reach the server."""
        return self.host in LOOPBACK

    def plain(self) -> dict:
        """As JSON has it."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found |= {"data": str(self.data), "allow_folder": [str(p) for p in self.allow_folder]}
        return found | {"api_key_file": self.api_key_file and str(self.api_key_file)}

    @classmethod
    def of_plain(cls, record: dict) -> "Settings":
        paths = {"data": Path(record["data"])}
        paths |= {"allow_folder": tuple(map(Path, record["allow_folder"]))}
        key = record["api_key_file"]
        return cls(**record | paths | {"api_key_file": key and Path(key)})
