"""The newest openai package, installed into a folder of its own, drives a server."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

from alone import Alone
from serving import Served, environment

CLIENT = Path(__file__).with_name("newest_client.py")


def install(folder: Path) -> None:
    """Errors: CalledProcessError where pip does not reach it."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, "--target", str(folder), "openai"], check=True)


def run(served: Served, alone: Alone, count: int, draw: random.Random, say: Callable) -> dict:
    """What the package is asked to do, so many times over."""
    folder, faults, calls = alone.folder / "newest", [], 0
    install(folder)
    (version,) = [x.version for x in distributions(path=[str(folder)]) if x.name == "openai"]

    for _ in range(count):
        asked, clip = alone.draw(draw), alone.folder / "newest.mp4"
        given = json.dumps({"url": f"{served.url}/v1", "asked": asked, "clip": str(clip)})
        surroundings = environment()
        path = f"{folder}:{surroundings['PYTHONPATH']}"
        done = subprocess.run(
            [sys.executable, CLIENT, given],
            env=surroundings | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            faults.append(done.stderr[-2000:])
            continue
        said = json.loads(done.stdout)
        calls += len(said["calls"])
        faults += filter(None, [alone.compare(asked, said["video"], clip.read_bytes())])
        say(f"newest client: openai {said['openai']}, {', '.join(said['calls'])}")
    return {"trials": count, "faults": faults, "calls": calls, "openai": version}
