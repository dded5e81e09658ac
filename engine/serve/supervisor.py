"""Keeps a runner alive: starts it, hears it, notices that it died or stands still, and gives its
jobs back to the queue; so it does for the runners of a server that is heard no more."""

import json
import logging
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engine.errors import UsageError
from engine.serve.loading import ModelSource
from engine.serve.settings import Settings
from engine.serve.store import FAULTS, RUNNER_DIED, Store, ended

LOOK = 0.25  # seconds
BACKOFF = 30  # seconds at most between two starts
SIGN, SILENCE = 2, 10  # seconds between two signs of a server, and after which it is gone
LOG = logging.getLogger("univigu.serve")


class Others:
    """What is heard of the other servers of a table. Silence is counted by this machine's clock,
    for that of another may be wrong."""

    def __init__(self, store: Store, me: str):
        self.store, self.me = store, me
        self.heard: dict[str, tuple] = {}  # the last sign of each, and when it was new
        self.looked = 0.0

    def silent(self) -> list[str]:
        """The servers that are gone. After too long a time without a look, as where the table was
        out of reach, all silences begin again."""
        now = time.monotonic()
        if now - self.looked > SILENCE:
            self.heard = {}
        self.looked = now

        signs = {server_of(owner): None for owner, _ in self.store.owners()}
        signs |= {name: row.beat_at for name, row in self.store.servers().items()}
        signs.pop(self.me, None)

        before, self.heard = self.heard, {}
        for name, sign in signs.items():
            last = before.get(name)
            self.heard[name] = last if last and last[0] == sign else (sign, now)
        return [name for name, (_, since) in self.heard.items() if now - since > SILENCE]


def server_of(owner: str) -> str:
    return owner.partition(".")[0]


class Supervisor:
    """The runner of a server.

    replica: the name of this server in the table of jobs; runners of one that is gone have it too.
    hear: told of what the runner says, as a dict, from a thread.
    """

    def __init__(
        self, settings: Settings, source: ModelSource, store: Store, replica: str, hear: Callable
    ):
        self.settings, self.source, self.store = settings, source, store
        self.replica, self.hear, self.others = replica, hear, Others(store, replica)
        self.process: subprocess.Popen | None = None
        self.owner, self.facts, self.failure = "", None, None
        self.changed, self.stopping = threading.Condition(), threading.Event()
        self.deaths, self.signed, self.unseen = 0, 0.0, 0.0

    @property
    def ready(self) -> bool:
        return self.facts is not None

    def start(self) -> None:
        """Jobs of this server's earlier life wait again; then the runner starts. Errors: UsageError
        where another server of the table keeps its results elsewhere."""
        place, late = self.settings.place, time.time() - SILENCE
        for name, row in self.store.servers().items():
            if name != self.replica and row.place != place and row.beat_at > late:
                raise UsageError(
                    "serve: --results must be the same for all servers of a --database; got "
                    f"{place} here and {row.place} of one that runs."
                )
        self._sign()
        self._release_all(self.replica)
        self._spawn()
        threading.Thread(target=self._watch, daemon=True).start()

    def _spawn(self) -> None:
        self.owner = f"{self.replica}.{secrets.token_hex(6)}"
        command = [sys.executable, "-m", "engine.serve.runner"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, start_new_session=True, **pipes)
        given = {"settings": self.settings.plain(), "source": self.source.plain()}
        self._tell(json.dumps(given | {"owner": self.owner}))
        threading.Thread(target=self._read, args=(self.process,), daemon=True).start()

    def _tell(self, line: str) -> None:
        if self.process is None:
            return
        with suppress(BrokenPipeError):  # it died, which `_watch` sees
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def wake(self) -> None:
        """A job waits."""
        self._tell("")

    def stop_job(self, id: str) -> None:
        """The job may end within a step; without this it ends when its runner asks the table."""
        self._tell(f"stop {id}")

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            record = json.loads(line)
            with self.changed:
                if record["event"] == "ready":
                    self.facts, self.deaths = record["facts"], 0
                elif record["event"] == "failed":
                    self.failure = record
                self.changed.notify_all()
            self._hear(record)

    def _hear(self, record: dict) -> None:
        try:
            self.hear(record)
        except FAULTS as error:
            LOG.error("the table of jobs is out of reach", extra={"error": str(error)})

    def wait_until_ready(self, seconds: float | None = None) -> bool:
        """Whether the runner came up; False where it ended before, or the time is over."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.ready or self.failure or self.process.poll() is not None, seconds
            )
            return self.ready

    def _watch(self) -> None:
        while not self.stopping.wait(LOOK):
            try:
                self._end_if_stalled()
                if self.process.poll() is not None:
                    self._replace()
                if time.monotonic() - self.signed > SIGN:
                    self._sign()
                    self._bury()
            except FAULTS as error:  # the next look may find the table again
                if time.time() - self.unseen > SILENCE:  # not at each look of an outage
                    LOG.error("the table of jobs is out of reach", extra={"error": str(error)})
                self.unseen = time.time()

    def _end_if_stalled(self) -> None:
        """Kills a runner that was silent for too long; while the table was out of reach, nobody
        could have heard it."""
        late = time.time() - self.settings.stall_seconds
        for owner, beat_at in self.store.owners():
            if owner == self.owner and max(beat_at, self.unseen) < late:
                LOG.error("the runner shows no sign of life", extra={"owner": owner})
                self.process.kill()
                self.process.wait()

    def _sign(self) -> None:
        self.store.sign(self.replica, self.settings.place)
        self.signed = time.monotonic()

    def _bury(self) -> None:
        """Jobs of servers that are gone wait again."""
        for name in self.others.silent():
            LOG.error("a server shows no sign of life", extra={"owner": name})
            self._release_all(name)
            self.store.leave(name)
            self.wake()

    def _replace(self) -> None:
        with self.changed:
            was_ready, self.facts = self.ready, None
            self.changed.notify_all()
        LOG.error("the runner ended", extra={"exit_code": self.process.returncode})
        self._release(self.owner)
        self._hear({"event": "died", "exit_code": self.process.returncode})
        self.deaths += 1
        wait = 0 if was_ready else min(BACKOFF, 2**self.deaths / 2)
        if not self.stopping.wait(wait):
            self._spawn()

    def _release_all(self, server: str) -> None:
        for owner, _ in self.store.owners():
            if server_of(owner) == server:
                self._release(owner)

    def _release(self, owner: str, counted: bool = True) -> None:
        for job in self.store.release(owner, self.settings.attempts, counted):
            self._hear(ended(job, RUNNER_DIED))

    def stop(self, seconds: float) -> None:
        """Ends the runner once its job is done, at the latest after so many seconds; a job that was
        not done by then waits again."""
        self.stopping.set()
        if self.process is None:
            return
        self._tell("drain")
        try:
            self.process.wait(seconds if self.ready else 0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        try:
            self._release(self.owner, counted=False)
            self.store.leave(self.replica)
        except FAULTS as error:  # the next start in this folder releases it
            LOG.error("the table of jobs is out of reach", extra={"error": str(error)})
