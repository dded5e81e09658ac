"""`make torture` at a small scale: all its parts run, and find nothing; and what it would find."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "torture" / "run.py"


def test_a_small_torture_finds_nothing(tmp_path):
    command = [sys.executable, SCRIPT, "--scale", "0.004", "--output-path", tmp_path / "found.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    counts = {name: part["trials"] for name, part in found["parts"].items()}
    assert counts == {
        "corruptions": 8,
        "hostile files": 2,
        "kills": 1,
        "full disks": 1,
        "threaded clips": 1,
    }
