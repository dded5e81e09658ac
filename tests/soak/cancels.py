"""Videos that are cancelled at a random step. By the answer so many steps were done; the device
does at most the one that it is at."""

import json
import random
import re
import statistics
import time
from collections.abc import Callable

from alone import ASKED, PROMPTS, QUICK, Alone
from serving import Served, until

from engine.serve.work import SPARSE

# Per cent of a job are its steps here. Each takes longer than the time between two signs of life,
# or what an answer says of the progress would be late: 120 ms where one of 64x64 takes 24.
LONG = {"num_inference_steps": 95, "size": "128x128", "seconds": "10"}
FOLLOWS = {"prompt": PROMPTS[0], "seed": 0, "mode": "t2v"} | ASKED | QUICK
STOPPED = re.compile(r"cancelled after step (\d+) of 95")


def said_of(served: Served, id: str) -> str:
    """What the log says of the end of a job, once it does."""

    def found():
        lines = [line for line in served.log.read_text().splitlines() if id in line]
        records = [json.loads(line) for line in lines if line.startswith("{")]
        return next((record for record in records if record["message"] == "ended"), None)

    return until(found).get("error", "")


def begun(served: Served, id: str, steps: int):
    """The row of a job once so many steps are done."""

    def found():
        row = served.store.get(id)
        return row if row.progress >= steps else None

    return until(found)


def trial(served: Served, alone: Alone, number: int, draw: random.Random) -> dict:
    """One cancel: its faults, the steps that were done after the answer, seconds of a step, and
    seconds from the answer until the next job began."""
    id, faults = served.ask(**LONG, seed=number), []
    next_id = served.ask(**FOLLOWS)
    job = begun(served, id, draw.randint(1, 8))
    time.sleep(draw.uniform(0, 0.3))
    video = served.http.post(f"/v1/videos/{id}/cancel").json()
    answered = time.time()
    if video["status"] != "failed" or video["error"]["code"] != "cancelled":
        faults.append(f"{id}: {video}")

    said = said_of(served, id)
    stopped = STOPPED.search(said)
    steps = int(stopped[1]) + 1 - video["progress"] if stopped else -1
    if steps not in (0, 1):
        faults.append(f"{id}: {steps} steps after the answer that said {video}; the log: {said!r}")
    after = served.ended(next_id)
    file = served.http.get(f"/v1/videos/{next_id}/content").content
    faults += filter(None, [alone.compare(FOLLOWS, after, file)])
    return {
        "faults": faults,
        "steps": steps,
        "a step": (answered - job.started_at) / max(1, video["progress"]),
        "until the next": served.store.get(next_id).started_at - answered,
    }


def run(served: Served, alone: Alone, count: int, draw: random.Random, say: Callable) -> dict:
    """So many cancels."""
    trials = []
    for number in range(count):
        trials.append(trial(served, alone, number, draw))
        say(f"cancels: {number + 1} of {count}, {trials[-1]}")

    steps = [one["steps"] for one in trials]
    step = statistics.median(one["a step"] for one in trials)
    if step <= SPARSE:
        raise SystemExit(f"cancels: a step must exceed {SPARSE} s; got {step:.3f}. Enlarge LONG.")
    waits = [one["until the next"] for one in trials]
    return {
        "trials": count,
        "faults": sum((one["faults"] for one in trials), []),
        "steps after the answer": {str(n): steps.count(n) for n in sorted(set(steps))},
        "a step, s": round(step, 3),
        "until the next job, s": {
            "median": round(statistics.median(waits), 3),
            "most": round(max(waits), 3),
        },
    }
