"""What the server adds to a job, and what batching captions gives: the embedded model on a CPU.

    PYTHONPATH=.:kernels python -m bench serve bench/results/cpu-serve.json      6 minutes

A video made by a call in this process and saved takes turns with the same video asked of a server,
from the moment it was created to that when it was complete, as the table of jobs has them: a client
that asks all the time would take a core from them. Then so many clients at a time want
captions, of a server that runs them one by one and of one that runs up to 8 together. At last so
many servers share a table, of one thread each, as the replicas of Ray do.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.harness import record

STEPS, ROUNDS, LOOK = (1, 8, 24), 15, 0.3  # of a video; pairs; seconds between two questions
CLIENTS, CAPTIONS = (1, 2, 4, 8), 32
SERVERS, CLIPS = (1, 2), 24


@contextmanager
def server(folder: Path, *flags: str):
    """The address of a server of its own."""
    line = [sys.executable, "-m", "engine", "serve", "--port", "0", "--data", str(folder), *flags]
    path = os.pathsep.join((str(record.ROOT), str(record.ROOT / "kernels")))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait()


def videos(client, store, pipe, folder: Path) -> list[dict]:
    """Rows of seconds by steps, of the call and of the job."""
    rows = []
    for steps in STEPS:
        asked = {"prompt": "a red circle", "num_inference_steps": steps, "seed": 1}

        def call(asked=asked) -> None:
            pipe.generate(**asked, progress=False).save(folder / "own.mp4")

        def job(asked=asked) -> float:
            id = client.post("/v1/videos", json=asked).json()["id"]
            while (row := store.get(id)).status != "completed":
                time.sleep(LOOK)
            return row.completed_at - row.created_at

        pairs = []
        for _ in range(ROUNDS + 1):  # the first warms both
            pairs.append([seconds(call), job()])
        own, served = zip(*pairs[1:], strict=True)
        added = statistics.median(b - a for a, b in pairs[1:])
        medians = {"call": statistics.median(own), "job": statistics.median(served)}
        rows.append({"steps": steps, "added": added, "rounds": pairs[1:]} | medians)
    return rows


def seconds(work) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def captions(client, video: bytes, batch: int) -> list[dict]:
    """Rows of captions a second and of their median seconds, by clients at a time."""
    file = client.post("/v1/files", files={"file": ("clip.mp4", video)}).json()["id"]
    part = {"type": "video_url", "video_url": {"url": file}}
    asked = {"messages": [{"role": "user", "content": [part]}], "num_inference_steps": 8}

    def one(seed: int) -> float:
        return seconds(
            lambda: client.post(
                "/v1/chat/completions", json=asked | {"seed": seed}
            ).raise_for_status()
        )

    rows = []
    for clients in CLIENTS:
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, range(clients)))
            begin = time.perf_counter()
            took = list(pool.map(one, range(CAPTIONS)))
            whole = time.perf_counter() - begin
        row = {"clients": clients, "most together": batch, "captions_per_s": CAPTIONS / whole}
        rows.append(row | {"median": statistics.median(took)})
    return rows


def several(folder: Path) -> list[dict]:
    """Rows of videos a second, by servers of one table; all jobs are asked of the first."""
    import httpx

    from engine.serve.store import Store

    rows, asked = [], {"prompt": "a red circle", "num_inference_steps": max(STEPS)}
    for count in SERVERS:
        room = folder / f"several-{count}"
        room.mkdir()
        store = Store(f"sqlite+pysqlite:///{room / 'jobs.sqlite'}")
        flags = "--database", str(store.engine.url), "--results", str(room)

        def run(client, jobs: int, store=store) -> list:
            ids = [client.post("/v1/videos", json=asked).json()["id"] for _ in range(jobs)]
            while store.count("queued", "in_progress"):
                time.sleep(LOOK)
            return [store.get(id) for id in ids]

        with ExitStack() as stack:
            urls = [stack.enter_context(server(room / str(i), *flags)) for i in range(count)]
            with httpx.Client(base_url=urls[0], timeout=600) as client:
                run(client, 2 * count)  # the first warm all
                done = run(client, CLIPS)
        took = max(job.completed_at for job in done) - min(job.started_at for job in done)
        owners = Counter(job.owner for job in done)
        rows.append({"servers": count, "videos_per_s": CLIPS / took, "of each": [*owners.values()]})
        store.close()
    return rows


def measured() -> dict:
    import httpx
    import torch

    from engine import Pipeline
    from engine.config import EMBEDDED
    from engine.serve.settings import Settings
    from engine.serve.store import Store

    torch.set_num_threads(1)
    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")
    found = {"videos": [], "captions": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for batch in (1, 8):
            flags = "--caption-batch", str(batch)
            with (
                server(folder / str(batch), *flags) as url,
                httpx.Client(base_url=url, timeout=600) as client,
            ):
                if not found["videos"]:
                    store = Store(Settings(data=folder / str(batch)).database_url)
                    found["videos"] = videos(client, store, pipe, folder)
                    store.close()
                video = (folder / "own.mp4").read_bytes()
                found["captions"] += captions(client, video, batch)
        found["several"] = several(folder)
    setting = {"rounds": ROUNDS, "captions": CAPTIONS, "state": record.state("cpu")}
    made = found | {"setting": setting, "environment": record.machine("cpu")}
    return {"schema": record.SCHEMA, "bench": "serve"} | made


def write(path: Path) -> None:
    path.write_text(json.dumps(measured(), indent=1) + "\n")
