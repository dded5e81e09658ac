"""Two hundred clients at a time. No request is lost or mixed up with another; meanwhile the gauge
of jobs is held against what was accepted and what had ended, and the memory is read."""

import random
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
from alone import Alone
from serving import PATIENCE, Served

CLIENTS = 200
ASK = 5.0  # seconds between two questions: clients that ask all the time leave the runner no core
SCRAPE = 0.5  # seconds
MARKS = 5  # readings of the memory, the last at the end
GROWTH = 0.1  # of the memory, from the first reading to the last


@dataclass
class Job:
    """A request, and the moments at which its client knew more of it."""

    asked: dict
    id: str = ""
    sent: float = float("inf")
    accepted: float = float("inf")
    seen: float = float("inf")  # as completed
    began: float = float("inf")  # these two are the table's
    ended: float = float("inf")


@dataclass
class Scrape:
    """What /metrics said between two moments: videos by status."""

    before: float
    after: float
    found: dict[str, int]


def gauge(text: str) -> dict[str, int]:
    """Videos by status, of the text of /metrics."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("univigu_jobs{") and 'kind="video"' in name:
            found[name.partition('status="')[2].partition('"')[0]] = int(float(value))
    return found


def bounds(jobs: list[Job], before: float, after: float) -> dict[str, tuple[int, int]]:
    """The least and the most that a table read between two moments can hold, by status.

    One runner takes the jobs one by one and notes the moment before the row is committed, so that
    one job's change may come later than its moment.
    """
    queued = sum(job.accepted < before and job.began > after for job in jobs)
    may_queue = sum(job.sent < after and job.began > before for job in jobs)
    completed = sum(job.ended < before for job in jobs)
    may_complete = sum(job.ended < after for job in jobs)
    return {
        "queued": (queued, may_queue + 1),
        "in_progress": (0, 1),
        "completed": (max(completed - 1, sum(job.seen < before for job in jobs)), may_complete),
        "failed": (0, 0),
        "all": (sum(j.accepted < before for j in jobs), sum(j.sent < after for j in jobs)),
    }


def wrong(jobs: list[Job], scrape: Scrape) -> list[str]:
    """The gauges of a scrape that cannot be right."""
    allowed = bounds(jobs, scrape.before, scrape.after)
    found = scrape.found | {"all": sum(scrape.found.values())}
    return [
        f"gauge: {found.get(name)} {name}, must be {least} to {most}"
        for name, (least, most) in allowed.items()
        if not least <= found.get(name, -1) <= most
    ]


def resident(process: int) -> float:
    """Megabytes of memory that a process has."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    kilobytes = next(line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return round(int(kilobytes) / 1000, 1)


class Traffic:
    """A server under so many requests."""

    def __init__(self, served: Served, alone: Alone, jobs: list[Job]):
        self.served, self.alone, self.jobs = served, alone, jobs
        self.scrapes: list[Scrape] = []
        self.memory: list[dict] = []
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        self.http = httpx.Client(base_url=served.url, timeout=PATIENCE, limits=limits)

    def client(self, jobs: list[Job]) -> list[str]:
        """Asks for one video after the other; what was wrong with them."""
        faults = []
        for job in jobs:
            job.sent = time.time()
            answer = self.http.post("/v1/videos", json=job.asked)
            job.accepted = time.time()
            if answer.status_code != 200:
                faults.append(f"request: {answer.status_code} {answer.text:.200}")
                job.sent = job.accepted = float("inf")
                continue

            job.id, video = answer.json()["id"], answer.json()
            while video["status"] in ("queued", "in_progress"):
                time.sleep(ASK)
                try:
                    video = self.http.get(f"/v1/videos/{job.id}").json()
                except httpx.TransportError as error:
                    faults.append(f"{job.id}: {type(error).__name__} {error}")
            job.seen = time.time()
            file = self.http.get(f"/v1/videos/{job.id}/content").content
            faults += filter(None, [self.alone.compare(job.asked, video, file)])
        return faults

    def watch(self, done: threading.Event) -> None:
        """Scrapes /metrics, and reads the memory each time that a fifth of the jobs has ended."""
        ended = False
        while not ended:
            ended = done.wait(SCRAPE)
            before = time.time()
            text = self.http.get("/metrics").text
            self.scrapes.append(Scrape(before, time.time(), gauge(text)))

            completed = self.scrapes[-1].found["completed"]
            if completed >= (len(self.memory) + 1) * len(self.jobs) / MARKS:
                pair = self.served.process.pid, self.served.runner
                server, runner = map(resident, pair)
                self.memory.append({"jobs": completed, "server": server, "runner": runner})

    def settle(self) -> list[str]:
        """Takes the moments from the table; what was lost."""
        faults = []
        for job in filter(lambda job: job.id, self.jobs):
            row = self.served.store.get(job.id)
            if row is None or row.completed_at is None:
                faults.append(f"{job.id}: lost")
                continue
            job.began, job.ended = row.started_at, row.completed_at
        rows = sum(self.served.store.counts().values())
        accepted = sum(bool(job.id) for job in self.jobs)
        return faults + ([f"table: {rows} jobs of {accepted}"] if rows != accepted else [])


def run(served: Served, alone: Alone, count: int, draw: random.Random, say: Callable) -> dict:
    """So many requests by up to CLIENTS clients."""
    traffic = Traffic(served, alone, [Job(alone.draw(draw)) for _ in range(count)])
    clients, done, begun = min(CLIENTS, count), threading.Event(), time.monotonic()
    watcher = threading.Thread(target=traffic.watch, args=(done,))
    watcher.start()
    try:
        with ThreadPoolExecutor(clients) as threads:
            shares = [traffic.jobs[i::clients] for i in range(clients)]
            faults = sum(threads.map(traffic.client, shares), [])
        seconds = time.monotonic() - begun
    finally:
        done.set()
        watcher.join()

    faults += traffic.settle()
    for scrape in traffic.scrapes:
        faults += wrong(traffic.jobs, scrape)
    first, last = traffic.memory[0], traffic.memory[-1]
    for name in ("server", "runner"):
        if last[name] > (1 + GROWTH) * first[name]:
            faults.append(f"memory of the {name}: {first[name]} MB, at the end {last[name]} MB")

    allowed = [bounds(traffic.jobs, s.before, s.after)["queued"] for s in traffic.scrapes]
    widths = [most - least for least, most in allowed]
    say(f"requests: {count} in {seconds:.0f} s, {faults}")
    return {
        "trials": count,
        "faults": faults,
        "clients": clients,
        "requests a second": round(count / seconds, 2),
        "scrapes": len(traffic.scrapes),
        "most queued": max(scrape.found["queued"] for scrape in traffic.scrapes),
        "scrape known within, jobs": {"median": statistics.median(widths), "most": max(widths)},
        "memory, MB": traffic.memory,
    }
