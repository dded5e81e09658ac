"""What an operator may set, each a flag of `univigu serve`."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from engine.config.fields import Range
from engine.errors import UsageError

GB, MB, DAY = 10**9, 10**6, 86_400
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of a server.

    host, port: where it listens; port 0 takes a free one.
    data: the folder of results, uploads and, without `database`, the table of jobs.
    database: SQLAlchemy's URL of the table of jobs; "" is SQLite in `data`.
    api_key_file: its first line is the key that every request but /health must bring.
    allow_folder: folders whose files chat requests may name by file:// URLs.
    queue_limit: jobs that wait; one more is refused with 429.
    most_frames, most_pixels, most_steps: of one video; pixels are height x width.
    most_prompt: characters of a prompt.
    upload_mb: megabytes of an upload, and of a request's body.
    uploads_gb: gigabytes of all uploads together; the oldest go first.
    memory_gb: an estimate above this is refused before it runs; 0: what the device has.
    attempts: how often a job is begun at most, if the runner dies under it.
    stall_seconds: a job that shows no sign of life for so long is ended with its runner.
    drain_seconds: at SIGTERM, how long the running job may go on; then it is queued again.
    keep_days, keep_gb: results older than this are deleted, and the oldest above this; 0: never.
    caption_batch: captions of one kind that run together at most.
    caption_window_ms: how long the first of them waits for others.
    interleave: captions may run between two steps of a video.

    Errors: UsageError.
    """

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
    port: int = 8000
    data: Path = Path("univigu-data")
    database: str = ""
    api_key_file: Path | None = None
    allow_folder: tuple[Path, ...] = ()
    queue_limit: int = 256
    most_frames: int = 161
    most_pixels: int = 1280 * 720
    most_steps: int = 100
    most_prompt: int = 4000
    upload_mb: float = 256
    uploads_gb: float = 10
    memory_gb: float = 0
    attempts: int = 2
    stall_seconds: float = 600
    drain_seconds: float = 30
    keep_days: float = 0
    keep_gb: float = 0
    caption_batch: int = 8
    caption_window_ms: float = 5
    interleave: bool = False

    def __post_init__(self):
        for field in fields(self):
            allowed, got = self.RANGES.get(field.name), getattr(self, field.name)
            if allowed is not None and got not in allowed:
                flag = "--" + field.name.replace("_", "-")
                raise UsageError(f"serve: {flag} must be {allowed.rule(got)}; got {got}.")

    @property
    def results(self) -> Path:
        return self.data / "results"

    @property
    def uploads(self) -> Path:
        return self.data / "uploads"

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
