"""One run at a time writes in a folder. Holders are real processes; however one ends, the folder
is free."""

import os
import signal
import socket
import threading
import time

import checkpoint_runs
import pytest
from checkpoint_runs import fit, make_shard, metrics, steps_in

from engine.checkpoint.lock import NAME, locked
from engine.errors import UsageError


@pytest.fixture(scope="module")
def forks():
    return checkpoint_runs.forks()


def hold(folder, end=None):
    """Hold the folder, say so, and end: by an error, or as the test will have it."""
    with locked(folder):
        (folder / "held").touch()
        if end == "error":
            raise RuntimeError
        if end == "exit":
            os._exit(3)
        time.sleep(60)


def wait_for(file):
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert file.exists()


@pytest.mark.parametrize("end", ["error", "exit", signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_lock_ends_with_its_process(forks, tmp_path, end):
    holder = forks(hold, tmp_path, end)
    wait_for(tmp_path / "held")

    if isinstance(end, signal.Signals):
        held = f"one run at a time .*; process {holder.pid} on {socket.gethostname()} does"
        for _ in range(3):
            with pytest.raises(UsageError, match=held), locked(tmp_path):
                pass
        os.kill(holder.pid, end)
    holder.join()
    with locked(tmp_path):
        pass


def test_threads_of_one_process_exclude_each_other_too(tmp_path):
    (other := tmp_path / "other").mkdir()
    found = []

    def enter():
        try:
            with locked(tmp_path):
                found.append("entered")
        except UsageError as error:
            found.append(str(error))

    with locked(tmp_path), locked(other):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    enter()
    assert f"process {os.getpid()} on " in found[0] and found[1:] == ["entered"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_holder_that_has_not_said_who_it_is(tmp_path, text):
    with locked(tmp_path):
        (tmp_path / NAME).write_text(text)
        with pytest.raises(UsageError, match="another process does"), locked(tmp_path):
            pass


def test_a_second_training_in_one_folder_is_refused_and_harms_nothing(forks, tmp_path):
    make_shard(tmp_path / "shard.safetensors")
    folder, arguments = tmp_path / "run", (tmp_path / "shard.safetensors", 12)
    folder.mkdir()
    with locked(folder):
        with pytest.raises(UsageError, match="one run at a time"):
            fit(folder, *arguments)
        assert sorted(os.listdir(folder)) == [NAME]

    both = [forks(fit, folder, *arguments) for _ in range(2)]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) in ([0, 0], [0, 1])  # in turn, or refused
    assert steps_in(folder / "checkpoint") == ["step-00000011", "step-00000012"]
    assert len(metrics(folder)) == 12
