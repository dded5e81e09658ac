"""Systems other than this one, by simulation: what they lack is taken away."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data import reading
from engine.result import peak_memory

WINDOWS = """
import importlib.util, os, sys
if importlib.util.find_spec("psutil"): import psutil  # its module for Linux needs what goes
sys.modules["resource"] = None
for name in ("sysconf", "pread", "preadv", "sched_getaffinity"): delattr(os, name)

from engine.cli import main
from engine.cli.environment import cpu
words = "--num-inference-steps 1 --quiet"
made = main(f"generate --prompt red --num-frames 5 --output-path w.mp4 {words}".split())
said = main(f"caption --video w.mp4 --output-path c.json {words}".split())
found = cpu()
assert found["memory GiB"] is None and found["cores usable"] == found["cores"]
sys.exit(made or said)
"""


def test_what_windows_lacks(tmp_path):
    """Loading, generating, captions, and the report of the machine."""
    command = [sys.executable, "-c", WINDOWS]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"peak_memory": null' in (tmp_path / "c.json").read_text()


def test_the_peak_is_bytes_on_linux_and_on_macos(monkeypatch):
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert peak_memory("cpu") >= 1024 * kib > 10**7
    monkeypatch.setattr(sys, "platform", "darwin")
    assert kib <= peak_memory("cpu") < 10 * kib


@pytest.mark.parametrize("windows", [False, True])
def test_reads_at_an_offset(tmp_path, monkeypatch, windows):
    if windows:
        monkeypatch.delattr(os, "preadv")
    path = tmp_path / "file"
    path.write_bytes((2).to_bytes(8, "little") + b"{}" + bytes(range(90)))
    descriptor = os.open(path, os.O_RDONLY)
    try:
        out = bytearray(5)
        assert reading.read_at(descriptor, out, 20) == 5 and out == bytes(range(10, 15))
        assert reading.read_at(descriptor, out, 98) == 2 and out[:2] == bytes([88, 89])
        assert reading.read_header(descriptor) == (2, {})
    finally:
        os.close(descriptor)


def test_platforms_are_stated():
    root = Path(__file__).resolve().parents[2]
    project = (root / "pyproject.toml").read_text()
    for name in ("POSIX :: Linux", "MacOS", "Microsoft :: Windows"):
        assert f"Operating System :: {name}" in project
    assert "macOS and Windows" in (root / "README.md").read_text()
