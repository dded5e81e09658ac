"""How many clips two threads make on one Pipeline in the time of one: the embedded model on a CPU.

    PYTHONPATH=.:kernels python -m bench threads bench/results/cpu-threads.json      4 minutes

The two take turns, round by round, in fresh processes with the default number of OpenMP's threads
and with one. A figure is made as `bench.harness.timing` says.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.harness import record
from bench.harness.timing import Clock, interleaved, speedups

ONE, TWO = "one thread", "two threads"
CLIPS, STEPS, ROUNDS, PROCESSES = 4, 4, 5, 4
OPENMP = {"default": {}, "1": {"OMP_NUM_THREADS": "1"}}  # what is set


def calls(pipe) -> dict[str, dict[str, Callable]]:
    """Task -> a call by name; each makes CLIPS clips or captions."""
    settings = {"num_inference_steps": STEPS, "progress": False}
    clip = pipe.generate("a red circle", **settings).frames
    tasks = {
        "generate": lambda seed: pipe.generate("a red circle", seed=seed, **settings),
        "caption": lambda seed: pipe.caption(clip, seed=seed, **settings),
    }

    def alone(task: Callable) -> None:
        for seed in range(CLIPS):
            task(seed)

    def together(task: Callable) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(task, range(CLIPS)))

    return {
        name: {ONE: lambda task=task: alone(task), TWO: lambda task=task: together(task)}
        for name, task in tasks.items()
    }


def work() -> None:
    """Prints one process's seconds as JSON: task -> name -> rounds, and the machine's state."""
    from engine import Pipeline
    from engine.config import EMBEDDED

    pipe = Pipeline.from_pretrained(EMBEDDED, "cpu")
    found = {task: interleaved(two, Clock("cpu"), ROUNDS) for task, two in calls(pipe).items()}
    print(json.dumps({"seconds": found, "state": record.state("cpu")}))


def child(changes: dict[str, str]) -> dict:
    """One process, with these changes to its environment. Errors: subprocess.CalledProcessError."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | changes
    line = [sys.executable, "-m", "bench", "threads"]
    done = subprocess.run(line, env=env, cwd=record.ROOT, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def measured(processes: int = PROCESSES) -> dict:
    """A result: rows with the seconds of a clip on one thread, and what two make of them."""
    found = {name: [] for name in OPENMP}
    for _ in range(processes):
        for name, changes in OPENMP.items():
            found[name].append(child(changes))

    rows = []
    for name, children in found.items():
        for task in children[0]["seconds"]:
            samples = {way: [one["seconds"][task][way] for one in children] for way in (ONE, TWO)}
            figure = speedups(samples, ONE)[TWO]
            best = min(min(rounds) for rounds in samples[ONE]) / CLIPS
            row = {"OpenMP": name, "task": task, "speedup": figure.value}
            row |= {"speedup_low": figure.low, "speedup_high": figure.high}
            rows.append(row | {"clip_seconds": best, "rounds": samples})
    states = {name: [one["state"] for one in children] for name, children in found.items()}
    setting = {"clips": CLIPS, "steps": STEPS, "rounds": ROUNDS, "processes": processes}
    made = {"rows": rows, "states": states, "environment": record.machine("cpu")}
    return {"schema": record.SCHEMA, "bench": "threads", "setting": setting} | made


def write(path: Path) -> None:
    path.write_text(json.dumps(measured(), indent=1) + "\n")
