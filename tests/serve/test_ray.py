"""Replicas of Ray Serve: a job outlives the one that ran it."""

import os
import signal
from types import SimpleNamespace

import pytest
from serving import children, until

from engine.cli.serve import Serve
from engine.errors import UsageError
from engine.serve.cluster import counts_of
from engine.serve.scaling import Queue
from engine.serve.settings import Settings
from engine.serve.store import JOBS, VIDEO, Store
from engine.serve.supervisor import server_of

MIDDLE = {"num_inference_steps": 100, "size": "64x64", "seconds": "1"}  # seconds


def runners(parent: int) -> dict[int, int]:
    """The replica of each runner among the processes below one."""
    found = {}
    for child in children(parent):
        with open(f"/proc/{child}/cmdline") as line:
            if "engine.serve.runner" in line.read():
                found[child] = parent
        found |= runners(child)
    return found


def on_ray(serve, replicas: str):
    """A server with Ray of its own."""
    pytest.importorskip("ray.serve", reason="pip install 'univigu-engine[ray]'")
    try:
        return serve("--ray", "local", "--replicas", replicas)
    except RuntimeError as error:
        if "timed out during startup" in str(error):
            pytest.skip("Ray waits 15 s for its own processes, which this machine is too busy for")
        raise


def test_a_killed_replica_loses_no_job(serve):
    server = on_ray(serve, "2")
    assert len(server.store.servers()) == 2
    ids = [server.ask(**MIDDLE, seed=i) for i in range(4)]
    both = [until(lambda id=id: (job := server.store.get(id)).progress and job) for id in ids[:2]]
    assert len({server_of(job.owner) for job in both}) == 2

    runner, replica = next(iter(runners(server.process.pid).items()))
    os.kill(replica, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{runner}"), 30)
    assert [server.ended(id)["status"] for id in ids] == ["completed"] * 4
    assert sorted(server.store.get(id).attempts for id in ids) == [1, 1, 1, 2]
    assert server.http.get(f"/v1/videos/{ids[0]}/content").status_code == 200
    assert server.stop() == 143
    assert server.store.servers() == {}


@pytest.mark.soak  # Ray Serve waits 30 s before it adds one
def test_replicas_follow_the_jobs(serve):
    """A second one comes while jobs wait, and takes of them."""
    server = on_ray(serve, "1-2")
    assert len(server.store.servers()) == 1
    ids = [server.ask(**MIDDLE | {"seconds": "20"}, seed=i) for i in range(60)]
    until(lambda: len(server.store.servers()) == 2)

    def owners():
        jobs = map(server.store.get, ids)
        return {server_of(job.owner) for job in jobs if job.owner}

    until(lambda: len(owners()) == 2)
    for id in reversed(ids):
        server.http.delete(f"/v1/videos/{id}")
    assert server.stop() == 143
    assert server.store.servers() == {}


@pytest.mark.parametrize(
    "said, least, most", [("", 0, 0), ("3", 3, 3), ("2-5", 2, 5), ("10-10", 10, 10)]
)
def test_replicas_are_a_number_or_two(said, least, most):
    assert counts_of(said) == (least, most)


@pytest.mark.parametrize("said", ["0", "0-2", "5-2", "-3", "a", "1-b", "1-2-3", "1.5", "-"])
def test_other_numbers_of_replicas_are_refused(said):
    with pytest.raises(UsageError, match="--replicas must be N or MIN-MAX"):
        counts_of(said)


def test_replicas_go_with_ray():
    with pytest.raises(UsageError, match="--replicas must go with --ray; got 2"):
        Serve(replicas="2").run()


def test_as_many_replicas_as_jobs_are_wanted(tmp_path, monkeypatch):
    """And no other number than now where the table is out of reach."""
    monkeypatch.setattr("engine.serve.scaling.LOOK", 0)
    url, now = Settings(data=tmp_path).database_url, SimpleNamespace(target_num_replicas=7)
    store, policy = Store(url), Queue(url)
    assert policy(now) == (1, {})
    for _ in range(3):
        store.create(VIDEO, {}, {}, 9)
    store.claim("me")
    assert policy(now) == (3, {})
    JOBS.drop(store.engine)
    assert policy(now) == (7, {})
    store.close()
