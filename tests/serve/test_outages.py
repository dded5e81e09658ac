"""A table of jobs that is locked, goes away and comes back: no work is lost by it."""

import asyncio
import time
from contextlib import contextmanager

import databases
import httpx
import numpy as np
import pytest
from serving import MIDDLE, PROMPT, QUICK, SMALL, Served
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from engine.config import EMBEDDED, read_pipeline_config
from engine.media import read_video
from engine.serve import store as store_module
from engine.serve.app import build
from engine.serve.loading import ModelSource
from engine.serve.server import Server
from engine.serve.settings import Settings
from engine.serve.store import JOBS, VIDEO, PatientStore


def test_a_locked_table_says_when_to_ask_again(tmp_path, caplog):
    """503, which clients try again, and no fault of the server's."""
    source, config = ModelSource(name="tiny", path=str(EMBEDDED)), read_pipeline_config(EMBEDDED)
    server = Server(Settings(data=tmp_path), source, config)
    event.listen(server.store.engine, "connect", lambda db, _: db.execute("PRAGMA busy_timeout=9"))
    server.store.engine.dispose()  # the next connections hear of it

    async def asked():
        app = build(server, None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            with server.store.engine.connect() as other:
                other.exec_driver_sql("BEGIN IMMEDIATE")
                locked = await client.post("/v1/videos", json=SMALL | {"prompt": PROMPT})
            free = await client.post("/v1/videos", json=SMALL | {"prompt": PROMPT})
        return locked, free

    locked, free = asyncio.run(asked())
    errors = [getattr(record, "error", "") for record in caplog.records]
    assert (locked.status_code, locked.json()["error"]["code"]) == (503, "table_unreachable")
    assert locked.headers["retry-after"] == "5"
    assert "database is locked" in next(filter(None, errors))
    assert free.json()["status"] == "queued"
    server.stop()


def test_a_runner_s_store_waits_for_what_must_be_kept_and_for_nothing_else(tmp_path, monkeypatch):
    """An answer that was lost changes nothing: what was completed is, what was claimed waits."""
    store = PatientStore(f"sqlite+pysqlite:///{tmp_path / 'jobs.sqlite'}")
    done, claimed = (store.create(VIDEO, {}, {}, 9).id for _ in range(2))
    assert store.claim("me").id == done

    lost, begin = [2], store.engine.begin

    @contextmanager
    def losing():
        """A transaction that is done, and says that it is not."""
        with begin() as db:
            yield db
        if lost[0]:
            lost[0] -= 1
            raise OperationalError("commit", {}, OSError("connection lost"))

    monkeypatch.setattr(store.engine, "begin", losing)
    monkeypatch.setattr(store_module, "AGAIN", 0.01)
    assert store.complete(done, "me", {}) and store.get(done).status == "completed"
    assert lost == [0]

    lost[0] = 1
    assert store.claim("me") is None and store.get(claimed).status == "in_progress"
    store.take_back("me")
    assert store.get(claimed).status == "queued" and store.claim("me").attempts == 1

    lost[0] = 1
    assert store.beat(claimed, "me", 5)
    assert store.remove(claimed) and store.beat(claimed, "me", 6), "it is not asked for a while"
    store.deaf = 0.0
    assert not store.beat(claimed, "me", 7)
    store.close()


def test_a_runner_that_finds_no_table_ends_at_once_where_it_is_told_to(tmp_path):
    server = Served(tmp_path / "data", "--drain-seconds", "100")
    try:
        JOBS.drop(server.store.engine)
        time.sleep(1)  # the runner looks
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 50
    finally:
        server.close()


def test_a_table_that_goes_and_comes_back_ends_nothing(server):
    """As a database that is restarted while nothing runs."""
    runner = server.runner
    JOBS.drop(server.store.engine)
    time.sleep(1)  # some looks of the supervisor's and of the runner's
    JOBS.create(server.store.engine)
    assert server.ended(server.ask())["status"] == "completed"
    assert server.runner == runner


def test_a_database_that_starts_again_loses_no_work(tmp_path, alone):
    """What runs meanwhile goes on in its one attempt, and clients are told to ask again."""
    pytest.importorskip("psycopg", reason="pip install 'univigu-engine[postgres]'")
    if databases.binaries() is None:
        pytest.skip(databases.MISSING)
    asked = {**MIDDLE, "seed": 1}
    with databases.cluster() as cluster:
        server = Served(tmp_path / "data", "--stall-seconds", "2", database=cluster.url)
        try:
            id = server.ask(**asked)
            server.begun(id)
            cluster.stop()
            answer = server.http.get(f"/v1/videos/{id}")
            time.sleep(4)  # longer than a stall, and than the video takes
            cluster.start()

            video, job = server.ended(id), server.store.get(id)
            frames = read_video(server.data / "results" / f"{id}.mp4").frames
            assert server.stop() == 143
        finally:
            server.close()
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "table_unreachable")
    assert (video["status"], job.attempts) == ("completed", 1)
    assert 1 < server.log.read_text().count("the table of jobs is out of reach") < 4
    assert np.array_equal(frames, alone(**SMALL | QUICK | {"prompt": PROMPT} | asked)[1])
