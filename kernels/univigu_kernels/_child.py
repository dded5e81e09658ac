"""Processes of our own, beside the caller's: for what may hang or die, and for compiling."""

import os
import subprocess
import sys
from pathlib import Path


def start(module: str, variables: dict[str, str] | None = None, **pipes) -> subprocess.Popen:
    """`python -m module`, which finds this package where the caller did. It has the caller's
    environment with `variables`, but compiles kernels where the caller interprets them."""
    paths = os.environ.get("PYTHONPATH", ""), str(Path(__file__).parents[1])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", module]
    return subprocess.Popen(command, env=env | (variables or {}), **pipes)
