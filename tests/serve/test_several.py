"""Several servers on one table: each answers for all, and one that is killed loses no job."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import databases
import numpy as np
import pytest
from serving import LONG, PROMPT, QUICK, SMALL, until

from engine.config import EMBEDDED, read_pipeline_config
from engine.errors import UsageError
from engine.media import read_video
from engine.serve.loading import ModelSource
from engine.serve.results import files, here
from engine.serve.server import Server
from engine.serve.settings import Settings
from engine.serve.store import CAPTION, VIDEO, Store
from engine.serve.supervisor import SILENCE, Others, server_of
from engine.serve.work import Worker


@pytest.fixture(
    scope="module", params=["SQLite", pytest.param("PostgreSQL", marks=pytest.mark.soak)]
)
def kind(request):
    """What the table that servers share is."""
    return request.param


@pytest.fixture(scope="module")
def shared(kind, tmp_path_factory):
    return tmp_path_factory.mktemp(kind)


@pytest.fixture(scope="module")
def database(kind, shared):
    if kind == "SQLite":
        yield f"sqlite+pysqlite:///{shared / 'jobs.sqlite'}"
        return
    if databases.binaries() is None:
        pytest.skip(databases.MISSING)
    with databases.postgres() as url:
        yield url


@pytest.fixture(scope="module")
def pair(serve, shared, database):
    """Two servers of one table, whose results are in one folder."""
    with ThreadPoolExecutor(2) as both:
        flags = "--database", database, "--results", str(shared)
        found = list(both.map(lambda _: serve(*flags), range(2)))
    for server in found:
        server.store.close()
        server.store = Store(database)
    return found


def owners(server, ids) -> set[str]:
    return {server_of(server.store.get(id).owner) for id in ids}


def test_each_answers_for_all(pair, alone, clip):
    first, second = pair
    key = {"Idempotency-Key": "of all"}
    asked = SMALL | QUICK | {"prompt": PROMPT, "seed": 7}
    once = first.http.post("/v1/videos", json=asked, headers=key).json()["id"]
    assert second.http.post("/v1/videos", json=asked, headers=key).json()["id"] == once

    ids = [once]
    while len(owners(first, ids)) < 2 and len(ids) < 60:  # until both have made one
        ids += [first.ask(seed=7) for _ in range(4)]
        assert {second.ended(id)["status"] for id in ids} == {"completed"}
    assert len(owners(first, ids)) == 2

    _, frames = alone(**SMALL | QUICK | {"prompt": PROMPT, "seed": 7})
    for id in (once, ids[-1]):
        file = clip.parent / f"{id}.mp4"
        file.write_bytes(second.http.get(f"/v1/videos/{id}/content").content)
        assert np.array_equal(read_video(file).frames, frames)
        file.unlink()

    upload = first.client.files.create(file=clip, purpose="vision").id
    part = {"type": "video_url", "video_url": {"url": upload}}
    asked = {"messages": [{"role": "user", "content": [part]}], "num_inference_steps": 1}
    assert second.http.post("/v1/chat/completions", json=asked).status_code == 200
    assert second.http.delete(f"/v1/videos/{once}").status_code == 200
    assert first.http.get(f"/v1/videos/{once}").status_code == 404


def test_a_killed_one_leaves_its_jobs_to_the_other(pair, alone, shared):
    """The one that ran, and those that it took and that wait."""
    long = [pair[0].ask(**LONG) for _ in range(2)]
    for id in long:  # each runs one, and neither takes what comes next
        until(lambda id=id: pair[0].store.get(id).progress)
    by_server = {pair[0].store.get(id).owner: id for id in long}
    assert len(by_server) == 2
    short = [pair[0].ask(seed=i) for i in range(3)]

    dies, lives = pair
    runner = dies.runner
    name = (dies.data / "replica.json").read_text()
    mine = next(id for owner, id in by_server.items() if server_of(owner) in name)
    assert dies.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not os.path.exists(f"/proc/{runner}"), 30)
    other = next(id for id in long if id != mine)
    assert lives.http.delete(f"/v1/videos/{other}").status_code == 200

    again = until(lambda: (job := lives.store.get(mine)).attempts == 2 and job)
    assert server_of(again.owner) in (lives.data / "replica.json").read_text()
    assert lives.http.delete(f"/v1/videos/{mine}").status_code == 200
    for i, id in enumerate(short):
        assert lives.ended(id)["status"] == "completed"
        _, frames = alone(**SMALL | QUICK | {"prompt": PROMPT, "seed": i})
        assert np.array_equal(read_video(shared / "results" / f"{id}.mp4").frames, frames)
    assert len(lives.store.servers()) == 1


@pytest.fixture
def own(tmp_path):
    """The state of a server of a table, without its processes, by its name and settings."""
    made = []

    def server(name: str, **settings):
        data = tmp_path / name
        database = f"sqlite+pysqlite:///{tmp_path / 'jobs.sqlite'}"
        source = ModelSource(name="tiny", path=str(EMBEDDED))
        settings = Settings(data=data, database=database, **settings)
        made.append(Server(settings, source, read_pipeline_config(EMBEDDED)))
        return made[-1]

    yield server
    for one in made:
        one.stop()


def test_results_in_two_places_are_refused(own):
    server = own("a")
    server.store.sign("another", "/elsewhere")
    with pytest.raises(UsageError, match="--results must be the same .* and /elsewhere of one"):
        server.supervisor.start()
    assert list(server.store.servers()) == ["another"]


def test_who_is_silent_is_gone(own, monkeypatch):
    """By the clock of who listens; after too long a time without a look, silence begins again."""
    clock = SimpleNamespace(monotonic=lambda: clock.now, time=time.time, now=100.0)
    monkeypatch.setattr("engine.serve.supervisor.time", clock)
    server = own("a")
    others, store = Others(server.store, "me"), server.store
    store.create(VIDEO, {}, {}, 9)
    store.claim("unsigned.1")
    for name in ("me", "dead", "alive"):
        store.sign(name, "/x")

    for expected in ([], [], ["dead", "unsigned"]):
        assert sorted(others.silent()) == expected
        store.sign("alive", "/x")
        clock.now += 0.6 * SILENCE
    clock.now += SILENCE
    assert others.silent() == []


def test_two_that_tidy_at_once_keep_what_one_would(own, tmp_path):
    both = [own(name, results=str(tmp_path / "all"), keep_gb=25e-9) for name in "ab"]
    store, ids = both[0].store, []
    for _ in range(20):
        ids.append(store.create(VIDEO, {}, {}, 99).id)
        store.claim("me")
        (both[0].settings.videos / f"{ids[-1]}.mp4").write_bytes(b"0" * 10)
        store.complete(ids[-1], "me", {})
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(Server.tidy, both))
    left = sorted(path.name for path in both[0].settings.videos.iterdir())
    assert left == sorted(f"{id}.mp4" for id in ids[-2:])

    gone = both[1].settings.videos / "gone.mp4"
    assert list(files([gone])) == []


def test_results_behind_a_url(own, pipe, clip):
    """Made, read, captioned and deleted by servers that share no folder."""
    upath = pytest.importorskip("upath", reason="pip install 'univigu-engine[remote]'")
    maker, other = (own(name, results="memory://univigu-tests") for name in "ab")
    workers = [
        Worker(pipe, one.store, one.settings, name, print, time.sleep)
        for name, one in zip("ab", (maker, other), strict=True)
    ]
    asked = {"prompt": PROMPT, "mode": "t2v", "negative_prompt": "", "seed": 0, "lora": {}}
    asked |= dict.fromkeys(("flow_shift", "solver", "text_steps")) | QUICK
    asked |= {"num_frames": 5, "height": 32, "width": 32}
    id = maker.store.create(VIDEO, asked, {}, 9).id
    workers[0].video(maker.store.claim("a"))

    shared = other.file_of(other.find(id))
    assert isinstance(shared, upath.UPath) and str(shared).startswith("memory://")
    copy = here(other.settings, shared)
    assert copy.is_relative_to(other.settings.data) and copy.read_bytes() == shared.read_bytes()
    assert len(list(maker.settings.videos.glob(f"{id}.*"))) == 2

    upload = maker.settings.uploads / "file-0"
    upload.write_bytes(clip.read_bytes())
    wanted = {"path": str(upload.absolute()), "start": 0, "n": 1, "seed": 1}
    wanted |= {"num_inference_steps": 1, "temperature": 1.0, "video_cache": "exact"}
    wanted |= {"commit": "jump"}
    caption = maker.store.create(CAPTION, wanted, {}, 9).id
    workers[1].captions()
    assert maker.store.get(caption).status == "completed"

    os.utime(copy, (0, 0))
    other.tidy()
    assert not copy.exists()
    assert here(other.settings, shared).exists()
    assert maker.remove(id) and list(maker.settings.videos.iterdir()) == []
    assert not list(maker.settings.copies.iterdir())
    upload.unlink()
