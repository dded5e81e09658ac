"""Processes of `univigu serve`, each with a data folder of its own."""

import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import httpx
import openai

from engine.serve.settings import Settings
from engine.serve.store import Store

PATIENCE = 300  # seconds: a machine may be busy with other tests
SMALL = {"seconds": "0.5", "size": "32x32"}
QUICK = {"num_inference_steps": 2, "guidance_scale": 1}
MIDDLE = {"num_inference_steps": 40, "size": "64x64", "seconds": "1"}  # a second or two
LONG = {"num_inference_steps": 100, "size": "128x128", "seconds": "20"}  # 40 s on a fast machine
PROMPT = "a red circle moves left"


def environment() -> dict[str, str]:
    """For a process that finds what this one finds."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def until(ready: Callable, seconds: float = PATIENCE):
    """What `ready` returns once it is true; it is asked less and less often, for twenty clients
    that ask all the time leave the runner no core. Errors: TimeoutError."""
    end, pause = time.monotonic() + seconds, 0.02
    while not (found := ready()):
        if time.monotonic() > end:
            raise TimeoutError(f"{ready} was not true after {seconds} s")
        time.sleep(pause)
        pause = min(0.3, 1.3 * pause)
    return found


def children(parent: int) -> list[int]:
    """Processes that a process started, of which none may be there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it ended meanwhile
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(stat.parent.name))
    return found


def states(process: int) -> list[str]:
    """One letter for each thread, as in proc(5)."""
    stats = Path(f"/proc/{process}/task").glob("*/stat")
    return [stat.read_text().rpartition(")")[2].split()[0] for stat in stats]


class Served:
    """A server that listens.

    url: its address. data: its folder. store: its table of jobs, beside the server's own.
    client, http: of the openai package and of httpx; neither tries again.
    """

    def __init__(
        self,
        data: Path,
        *flags: str,
        key: str | None = None,
        database: str = "",
        port: int = 0,
    ):
        self.data, self.flags, self.key = data, flags, key
        self.database, self.port = database, port
        self.log = data.with_suffix(".log")
        self.start()
        self.store = Store(Settings(data=data, database=database).database_url)

    def launch(self) -> None:
        """Starts its process, which may end before it listens."""
        command = [sys.executable, "-m", "engine", "serve", "--port", str(self.port)]
        command += ["--data", str(self.data), *self.flags]
        command += ["--database", self.database] if self.database else []
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, env=environment(), text=True, stdout=subprocess.PIPE, stderr=log
            )

    def start(self) -> None:
        """Starts it, again after it ended; its address may be another one then."""
        self.launch()
        watchdog = threading.Timer(PATIENCE, self.process.kill)
        watchdog.start()
        said = self.process.stdout.readline()
        watchdog.cancel()

        name, _, self.url = said.strip().removeprefix("univigu serves ").partition(" at ")
        if not self.url.startswith("http://"):
            raise RuntimeError(f"no address in {said!r}: {self.log.read_text()[-4000:]}")
        self.model = name
        headers = {} if self.key is None else {"authorization": f"Bearer {self.key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=PATIENCE)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0, timeout=PATIENCE
        )

    @property
    def runner(self) -> int:
        """The process of the runner, once it is there."""
        return until(lambda: children(self.process.pid))[0]

    def kill_runner(self) -> None:
        os.kill(self.runner, signal.SIGKILL)

    def pause_runner(self) -> None:
        """Stops the runner, at a moment at which it holds no lock of SQLite's: it does while it
        writes, and the server could not write then."""
        assert not self.database, "only SQLite is looked into"

        def free():
            runner = self.runner
            os.kill(runner, signal.SIGSTOP)
            until(lambda: all(state == "T" for state in states(runner)))
            with closing(sqlite3.connect(self.data / "jobs.sqlite", timeout=1)) as table:
                try:
                    table.execute("BEGIN IMMEDIATE")
                    return True
                except sqlite3.OperationalError:
                    self.resume_runner()
                    return False

        until(free)

    def resume_runner(self) -> None:
        os.kill(self.runner, signal.SIGCONT)

    def ask(self, prompt: str = PROMPT, **fields) -> str:
        """The id of a video that was asked for: small and quick, but for these fields."""
        answer = self.http.post("/v1/videos", json=SMALL | QUICK | {"prompt": prompt} | fields)
        if answer.status_code != 200:
            raise RuntimeError(answer.text)
        return answer.json()["id"]

    def begun(self, id: str, attempts: int = 1):
        """The row of a video that the runner works at, for the so manieth time."""

        def found():
            job = self.store.get(id)
            return job if job.progress and job.attempts == attempts else None

        return until(found)

    def ended(self, id: str) -> dict:
        """A video that has ended, as the client reads it."""

        def found():
            video = self.http.get(f"/v1/videos/{id}").json()
            return video if video["status"] in ("completed", "failed") else None

        return until(found)

    def files(self) -> list[str]:
        """What lies in the folders of results and uploads."""
        rooms = self.data / "results", self.data / "uploads"
        return sorted(path.name for room in rooms for path in room.iterdir())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Ends it; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        self.http.close()
        self.client.close()
        self.store.close()
        if self.process.poll() is None:
            for runner in children(self.process.pid):
                os.kill(runner, signal.SIGKILL)
            self.stop(signal.SIGKILL)
        self.process.stdout.close()
