"""Writes requirements.lock: what README's two commands install on a CPU, each with its SHA-256.

Run by `make lock`, on Linux on x86-64 with Python 3.11. Direct dependencies have the versions of
constraints.txt; what they need in turn is the newest that they take. It asks pip, with the indexes
that pip is set up for, of which one must have torch's CPU builds; no index's name is written.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIRST = "torch", "setuptools", "wheel", "ninja"  # README's first command
EXTRAS = "models", "video"
HEADER = """\
# What the two commands of README.md install on a CPU: Linux on x86-64, Python 3.11. Made by
# `make lock`; CONTRIBUTING.md says how to install from it, renew it and audit it.
"""


def requirements() -> list[str]:
    """What is asked for by name, as pyproject.toml and README write it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in EXTRAS for name in project["optional-dependencies"][extra]]
    return [*FIRST, *project["dependencies"], *extras]


def resolve() -> list[dict]:
    """pip's report of what it would install where nothing is there yet."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    options = ["--only-binary", ":all:", "-c", str(ROOT / "constraints.txt"), "--report", "-"]
    found = subprocess.run([*pip, *options, *requirements()], check=True, stdout=subprocess.PIPE)
    return json.loads(found.stdout)["install"]


def line(entry: dict) -> str:
    name, version = entry["metadata"]["name"], entry["metadata"]["version"]
    digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{name.lower().replace('_', '-')}=={version} --hash=sha256:{digest}\n"


if __name__ == "__main__":
    (ROOT / "requirements.lock").write_text(HEADER + "".join(sorted(map(line, resolve()))))
