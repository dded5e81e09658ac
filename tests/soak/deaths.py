"""SIGKILL for the server and for the runner, at random moments, under clients that go on. Every
request that was accepted is completed, once, as the same call alone gives it."""

import os
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
from alone import Alone
from serving import PATIENCE, Served, until

CLIENTS = 4
LOADING = 0.3  # share of the server's deaths that come while it may still load the model
SECONDS = 2.0  # a death comes within these, once the server is ready


class Clients:
    """Clients that ask for one video after the other until they are stopped; a request whose answer
    was lost is sent again under its Idempotency-Key."""

    def __init__(self, served: Served, alone: Alone, seed: int):
        self.alone, self.seed = alone, seed
        self.http = httpx.Client(base_url=served.url, timeout=10)
        self.stopped, self.ids = threading.Event(), []

    def answer(self, method: str, path: str, **how) -> httpx.Response:
        """The answer to a request that is sent until one comes. Errors: TimeoutError."""

        def ask():
            try:
                return self.http.request(method, path, **how)
            except httpx.TransportError:
                return None

        answer = until(ask, PATIENCE)
        if answer.status_code != 200:
            raise RuntimeError(f"{method} {path}: {answer.status_code} {answer.text:.200}")
        return answer

    def client(self, number: int) -> list[str]:
        draw, faults = random.Random(f"{self.seed} {number}"), []
        while not self.stopped.is_set():
            asked, key = self.alone.draw(draw), {"idempotency-key": secrets.token_hex(8)}
            video = self.answer("POST", "/v1/videos", json=asked, headers=key).json()
            self.ids.append(video["id"])
            path = f"/v1/videos/{video['id']}"
            while video["status"] in ("queued", "in_progress"):
                time.sleep(0.3)
                video = self.answer("GET", path).json()
            file = b""
            if video["status"] == "completed":
                file = self.answer("GET", path + "/content").content
            faults += filter(None, [self.alone.compare(asked, video, file)])
        return faults

    def is_ready(self) -> bool:
        try:
            return self.http.get("/ready").status_code == 200
        except httpx.TransportError:
            return False


def kill_server(served: Served, clients: Clients, draw: random.Random) -> None:
    if draw.random() < LOADING:
        time.sleep(draw.uniform(0, 5))
    else:
        until(clients.is_ready)
        time.sleep(draw.uniform(0, SECONDS))
    served.process.kill()
    served.process.wait()
    served.process.stdout.close()
    served.launch()


def kill_runner(served: Served, clients: Clients, draw: random.Random) -> None:
    until(clients.is_ready)
    time.sleep(draw.uniform(0, SECONDS))
    os.kill(served.runner, signal.SIGKILL)


def run(
    kill: Callable,
    served: Served,
    alone: Alone,
    count: int,
    draw: random.Random,
    say: Callable,
) -> dict:
    """So many deaths. kill: `kill_server` or `kill_runner`."""
    clients = Clients(served, alone, draw.randrange(2**31))
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(clients.client, i) for i in range(CLIENTS)]
        try:
            for number in range(count):
                kill(served, clients, draw)
                say(f"{kill.__name__}: {number + 1} of {count}")
            until(clients.is_ready)
        finally:
            clients.stopped.set()
        faults = sum((one.result() for one in running), [])

    rows = [served.store.get(id) for id in clients.ids]
    faults += [f"{id}: lost" for id, row in zip(clients.ids, rows, strict=True) if row is None]
    counts = served.store.counts()
    if counts != {("video", "completed"): len(clients.ids)}:
        faults.append(f"table: {counts} of {len(clients.ids)} accepted")
    again = sum(row.attempts > 1 for row in rows if row is not None)
    return {"trials": count, "faults": faults, "jobs": len(rows), "jobs begun again": again}
