"""What the routes share: settings, the table of jobs, the runner, and who waits for what."""

import asyncio
import json
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path

from engine.config import PipelineConfig
from engine.serve.errors import WireError, not_found
from engine.serve.loading import ModelSource
from engine.serve.metrics import Metrics
from engine.serve.results import files, remove_result, workshop
from engine.serve.settings import DAY, GB, Settings
from engine.serve.store import (
    CAPTION,
    COMPLETED,
    FAILED,
    FAULTS,
    OUT_OF_REACH,
    VIDEO,
    KeyReused,
    QueueFull,
    Store,
)
from engine.serve.supervisor import Supervisor

TIDY = 60  # seconds between two looks for results that are too old or too many
HOUR = 3600  # seconds
LOOK = 0.5  # seconds between two looks at a job that another server may run
LOG = logging.getLogger("univigu.serve")


class Server:
    """The state of a server's process. name: in the table of jobs; that of --data by default."""

    def __init__(
        self,
        settings: Settings,
        source: ModelSource,
        config: PipelineConfig,
        name: str | None = None,
    ):
        self.settings, self.source, self.config = settings, source, config
        for room in (settings.data, settings.videos, settings.uploads, workshop(settings)):
            room.mkdir(parents=True, exist_ok=True)
        self.store = Store(settings.database_url)
        self.metrics = Metrics(self.store, lambda: self.supervisor.ready)
        replica = name or replica_of(settings.data)
        self.supervisor = Supervisor(settings, source, self.store, replica, self.hear)
        self.draining, self.seconds = False, 1.0  # of a usual video, for Retry-After
        self.waiting: dict[str, list[asyncio.Future]] = {}
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.creating = threading.Lock()

    def start(self) -> None:
        self.supervisor.start()
        threading.Thread(target=self._tidy, daemon=True).start()

    def hear(self, record: dict) -> None:
        """What the runner says, in a thread of the supervisor's."""
        self.metrics.hear(record)
        if record["event"] == "ended":
            names = "id", "trace", "kind", "code", "error"  # the last where there is one
            LOG.info("ended", extra={name: record[name] for name in names if name in record})
            self.tell(record["id"])
        if record["event"] == "said":
            self.tell(record["id"])
        if record["event"] == "video":
            self.seconds = 0.8 * self.seconds + 0.2 * record["seconds"]

    def tell(self, id: str) -> None:
        """Whoever waits for the job looks again."""
        with self.lock:
            futures = self.waiting.pop(id, [])
        for future in futures:
            future.get_loop().call_soon_threadsafe(_wake, future)

    def create(self, kind: str, request: dict, asked: dict, like: str = "", key=None):
        """A job that waits. Errors: WireError."""
        if self.draining:
            raise WireError(503, "draining", "The server is about to stop.", retry_after=30)
        try:
            with self.creating:  # the limit and the row are one
                limit = self.settings.queue_limit
                job = self.store.create(kind, request, asked, limit, like, key)
        except KeyReused:
            raise WireError(
                422, "key_reused", "The Idempotency-Key stands for another request."
            ) from None
        except QueueFull as full:
            raise WireError(
                429,
                "queue_full",
                f"{full} already; ask again later.",
                retry_after=self.seconds * full.waiting / 4,  # some of them will be done
            ) from None

        self.supervisor.wake()
        LOG.info("created", extra={"id": job.id, "trace": job.trace, "kind": kind})
        return job

    async def follow(self, id: str, gone: Callable):
        """The row of a job whenever it may have changed, at last as it ended or None where it was
        deleted. gone: asked now and then whether nobody waits any more; the job is cancelled
        then."""
        while True:
            future = asyncio.get_running_loop().create_future()
            with self.lock:
                self.waiting.setdefault(id, []).append(future)
            try:
                try:
                    job = await asyncio.to_thread(self.store.get, id)
                except OUT_OF_REACH:  # the runner goes on, and so does whoever waits for it
                    await asyncio.sleep(LOOK)
                    continue

                yield job
                if job is None or job.status in (COMPLETED, FAILED):
                    return
                await asyncio.wait_for(future, LOOK)
            except TimeoutError:
                if await gone():
                    await asyncio.to_thread(self.cancel, id)
            finally:
                self._forget(id, future)

    def _forget(self, id: str, future: asyncio.Future) -> None:
        with self.lock:
            others = [one for one in self.waiting.pop(id, []) if one is not future]
            if others:
                self.waiting[id] = others

    def find(self, id: str):
        """The row of a video. Errors: WireError."""
        job = self.store.get(id)
        if job is None or job.kind != VIDEO:
            raise not_found(VIDEO, id)
        return job

    def file_of(self, job) -> Path:
        """The mp4 of a video. Errors: WireError unless it is complete."""
        if job.status == FAILED:
            raise WireError(400, "video_failed", f"The video failed: {job.error_code}.", "id")
        if job.status != COMPLETED:
            raise WireError(400, "video_not_ready", f"The video is {job.status}; ask later.", "id")
        path = self.settings.videos / f"{job.id}.mp4"
        if not path.is_file():
            raise WireError(404, "not_found", "The file of the video is gone.", "id")
        return path

    def cancel(self, id: str):
        """The row of a job, which has failed as cancelled unless it had ended; None: it is gone."""
        job = self.store.cancel(id)
        self.supervisor.stop_job(id)
        self.tell(id)
        return job

    def expires_at(self, job) -> float | None:
        if job.completed_at is None or not self.settings.keep_days:
            return None
        return job.completed_at + DAY * self.settings.keep_days

    def remove(self, id: str) -> bool:
        """Whether there was such a job; its files go too."""
        found = self.store.remove(id)
        if found:
            self.supervisor.stop_job(id)
            remove_result(self.settings, id)
            self.tell(id)
        return found

    def _tidy(self) -> None:
        while True:
            try:
                self.tidy()
            except (OSError, *FAULTS) as error:  # a disk or a table that is gone may come back
                LOG.error("results could not be tidied", extra={"error": str(error)})
            if self.stopped.wait(TIDY):
                return

    def tidy(self) -> None:
        """Deletes results that are too old, the oldest of too many, uploads above the limit, and
        what a killed process left: unfinished files, and captions that nobody waits for. The other
        servers of the table do the same, at any time."""
        hour_ago = time.time() - HOUR
        for id in self.store.ended_before(hour_ago, CAPTION):
            self.store.remove(id)
        room = workshop(self.settings)
        spare = room.iterdir() if room == self.settings.copies else room.glob(".*.partial")
        for path, _, changed in files(spare):
            if changed < hour_ago:
                path.unlink(missing_ok=True)

        if self.settings.keep_days:
            oldest = time.time() - DAY * self.settings.keep_days
            for id in self.store.ended_before(oldest, VIDEO):
                self.remove(id)
        if self.settings.keep_gb:
            self._keep_newest(int(self.settings.keep_gb * GB))

        uploads = sorted(files(self.settings.uploads.iterdir()), key=itemgetter(2))
        above = sum(size for _, size, _ in uploads) - self.settings.uploads_gb * GB
        for path, size, _ in uploads:
            if above <= 0:
                break
            path.unlink(missing_ok=True)
            above -= size

    def _keep_newest(self, most: int) -> None:
        """Other servers do the same meanwhile: what is no row any more is not counted."""
        ids, sizes = self.store.ended_before(time.time(), VIDEO), Counter()
        for path, size, _ in files(self.settings.videos.iterdir()):
            sizes[path.name.partition(".")[0]] += size
        above = sum(sizes[id] for id in ids) - most
        for id in ids:
            if above <= 0:
                break
            self.remove(id)
            above -= sizes[id]

    def drain(self) -> None:
        """Takes no more jobs, and ends the runner."""
        self.draining = True
        self.supervisor.stop(self.settings.drain_seconds)

    def end(self) -> None:
        self.drain()
        self.stop()

    def stop(self) -> None:
        self.stopped.set()
        self.store.close()


def _wake(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


def replica_of(data: Path) -> str:
    """The name of this server in the table of jobs, kept in its folder from the first start on."""
    file = data / "replica.json"
    if not file.exists():
        file.write_text(json.dumps({"replica": secrets.token_hex(8)}))
    return json.loads(file.read_text())["replica"]
