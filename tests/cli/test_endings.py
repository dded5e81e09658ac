"""How a command's process ends: by a signal at any moment, with a reader that has left, in a
terminal that is narrow or knows few characters."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.cli import console

ROOT = Path(__file__).resolve().parents[2]
GENERATE = ["generate", "--prompt", "a red circle", "--num-inference-steps", "1", "--quiet"]
# What the program does, with a word printed as soon as it listens for signals.
PROGRAM = """
import contextlib, engine.cli.entry as entry
inner = entry.signals

@contextlib.contextmanager
def signals():
    with inner() as received:
        print("entered", flush=True)
        yield received

entry.signals = signals
entry.program()
"""


def start(arguments, folder, **options):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env |= options.pop("env", {})
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, **options)


@pytest.mark.parametrize("delay", [0.0, 0.2, 1.0, 4.0])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_at_any_moment(tmp_path, number, delay):
    """Also one that comes while torch is being imported, which may raise an error of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    steps = [*GENERATE[:4], "5000", "--quiet"]
    process = start(["-c", PROGRAM, *steps], tmp_path, **pipes)
    assert process.stdout.readline() == "entered\n"
    time.sleep(delay)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)

    assert process.returncode == 128 + number, said
    assert said == "univigu: cancelled.\n"
    assert os.listdir(tmp_path) == []


def test_a_signal_waits_for_the_end_of_torchs_import(monkeypatch):
    """Raised within it, it may meet C++ that lets no exception through."""
    import torch

    monkeypatch.setattr(torch.__spec__, "_initializing", True, raising=False)
    with pytest.raises(KeyboardInterrupt), console.signals() as received:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        assert received == []
        torch.__spec__._initializing = False
        time.sleep(10)
    assert received == [signal.SIGTERM]


def test_handlers_are_given_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), console.signals() as received:
        signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with console.signals() as received:
            signal.raise_signal(signal.SIGINT)
        assert received == [] and signal.getsignal(signal.SIGINT) is signal.SIG_IGN

        with console.signals() as received:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # after another came, too
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("arguments", [["generate", "--help"], GENERATE])
def test_a_reader_that_leaves_costs_no_result(tmp_path, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(["-m", "engine", *arguments], tmp_path, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    _, said = process.communicate(timeout=120)
    assert (process.returncode, said) == (0, "")
    written = ["out.json", "out.mp4"] if arguments is GENERATE else []
    assert sorted(os.listdir(tmp_path)) == written


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        {"COLUMNS": "1", "TERM": "dumb"},
    ],
    ids=["ascii", "one column"],
)
def test_a_poor_terminal_costs_no_result(tmp_path, env):
    command = ["-m", "engine", *GENERATE, "--output-path", "é.mp4"]
    process = start(command, tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    said, trouble = process.communicate(timeout=120)
    assert process.returncode == 0, trouble
    assert said == ("\\udcc3\\udca9.mp4\n" if "LC_ALL" in env else "é.mp4\n")
    assert sorted(os.listdir(tmp_path)) == ["é.json", "é.mp4"]


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


@FULL
def test_a_log_on_a_full_disk_keeps_the_exit_code(tmp_path):
    """The reason is what ended the command, not that it could not be written."""
    command = ["-m", "engine", *GENERATE, "--model-path", "absent"]
    with open("/dev/full", "w") as full:
        assert start(command, tmp_path, stderr=full).wait(120) == 4


@FULL
def test_results_that_a_full_disk_does_not_take_are_an_error(tmp_path):
    with open("/dev/full", "w") as full:
        process = start(["-m", "engine", "env"], tmp_path, stdout=full, stderr=subprocess.PIPE)
        _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and "Traceback" not in said, said
