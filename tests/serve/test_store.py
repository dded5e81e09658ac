"""The table of jobs by itself, on SQLite and on PostgreSQL."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import databases
import pytest
from serving import environment

from engine.errors import UsageError
from engine.serve.store import CAPTION, VIDEO, KeyReused, QueueFull, Store

CLAIM = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from engine.serve.store import Store

store = Store(sys.argv[1])

def claim(i):
    found = []
    while (job := store.claim(f"{sys.argv[2]}.{i}")) is not None:
        found.append(job.id)
    return found

print("ready", flush=True)
sys.stdin.readline()
with ThreadPoolExecutor(4) as threads:
    print(json.dumps(sum(threads.map(claim, range(4)), [])))
"""


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server of its own."""
    pytest.importorskip("psycopg", reason="pip install 'univigu-engine[postgres]'")
    if databases.binaries() is None:
        pytest.skip(databases.MISSING)
    with databases.postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgres"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield f"sqlite+pysqlite:///{tmp_path / 'jobs.sqlite'}"
        return
    url = request.getfixturevalue("postgres")
    yield url
    from engine.serve.store import JOBS

    store = Store(url)
    JOBS.drop(store.engine)
    store.close()


@pytest.fixture
def store(url):
    store = Store(url)
    yield store
    store.close()


def video(store, limit=100, key=None, **asked):
    asked = {"prompt": "a red circle"} | asked
    return store.create(VIDEO, asked, asked, limit, key=key)


def caption(store, like=""):
    return store.create(CAPTION, {}, {}, 100, like)


def test_jobs_are_taken_in_order_by_kind_and_likeness(store):
    first, last = video(store, seed=1), video(store, seed=2)
    small, other, alike = caption(store, "[1]"), caption(store, "[2]"), caption(store, "[1]")
    assert store.claim("a", (CAPTION,)).id == small.id
    assert store.claim("a", (CAPTION,), "[1]").id == alike.id
    assert store.claim("a", (CAPTION,), "[1]") is None
    assert [store.claim("a").id for _ in range(3)] == [first.id, last.id, other.id]
    assert store.claim("a") is None


def test_a_claim_says_who_and_when(store):
    made = video(store)
    assert (made.status, made.progress, made.attempts, made.owner) == ("queued", 0, 0, None)
    job = store.claim("a")
    assert (job.status, job.owner, job.attempts) == ("in_progress", "a", 1)
    assert made.created_at <= job.started_at == job.beat_at
    assert json.loads(job.request) == {"prompt": "a red circle"}


def test_who_finds_no_job_writes_nothing(tmp_path):
    """A process that stops as it writes leaves SQLite's lock to nobody, and a runner that has
    nothing to do looks all the time."""
    store = Store(f"sqlite+pysqlite:///{tmp_path / 'jobs.sqlite'}")
    with store.engine.connect() as other:
        other.exec_driver_sql("BEGIN IMMEDIATE")
        assert store.claim("me") is None
    store.close()


def test_eight_threads_of_two_processes_take_each_job_once(store, url):
    ids = sorted(video(store, seed=i).id for i in range(60))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [
        subprocess.Popen([sys.executable, "-c", CLAIM, url, name], env=environment(), **pipes)
        for name in "ab"
    ]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    taken = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert sorted(taken[0] + taken[1]) == ids
    assert {store.get(id).attempts for id in ids} == {1}


def test_a_key_used_by_many_at_once_makes_one_job(store):
    with ThreadPoolExecutor(8) as threads:
        ids = {job.id for job in threads.map(lambda _: video(store, key="k"), range(16))}
    assert len(ids) == 1 and store.count("queued") == 1


def test_a_key_stands_for_one_request(store):
    made = video(store, key="k" * 261, seed=1)  # the longest that the wire takes
    assert video(store, key="k" * 261, seed=1).id == made.id
    with pytest.raises(KeyReused):
        video(store, key="k" * 261, seed=2)
    assert video(store, limit=1, key="k" * 261, seed=1).id == made.id  # though nothing may wait
    with pytest.raises(QueueFull) as full:
        video(store, limit=1, key="other")
    assert full.value.waiting == 1


def test_jobs_of_the_dead_wait_again_and_fail_at_last(store):
    made = video(store)
    store.claim("a")
    store.beat(made.id, "a", 50)
    assert store.release("b", 2) == []
    assert store.get(made.id).status == "in_progress"

    assert store.release("a", 2) == []
    job = store.get(made.id)
    assert (job.status, job.progress, job.owner, job.attempts) == ("queued", 0, None, 1)
    assert not store.beat(made.id, "a", 60) and not store.complete(made.id, "a", {})

    store.claim("b")
    assert [lost.id for lost in store.release("b", 2)] == [made.id]
    job = store.get(made.id)
    assert (job.status, job.error_code) == ("failed", "runner_died") and job.completed_at
    assert store.claim("c") is None


def test_who_stops_by_himself_uses_up_no_attempt(store):
    made = video(store)
    for _ in range(3):
        store.claim("a")
        assert store.release("a", 1, counted=False) == []
    assert store.get(made.id).attempts == 0


@pytest.mark.parametrize("way", ["cancel", "remove"])
def test_a_sign_of_life_hears_that_nobody_wants_the_job(store, way):
    made = video(store)
    store.claim("a")
    assert store.beat(made.id, "a", 10) and not store.beat(made.id, "b", 20)
    assert getattr(store, way)(made.id)

    assert not store.beat(made.id, "a", 30)
    assert not store.complete(made.id, "a", {}) and not store.fail(made.id, "a", "x", "y")
    job = store.get(made.id)
    assert (job is None) if way == "remove" else (job.error_code, job.progress) == ("cancelled", 10)
    assert store.remove(made.id) is (way == "cancel")


def test_what_has_ended_stays_as_it_is(store):
    made = video(store)
    store.claim("a")
    assert store.complete(made.id, "a", {"caption": "a circle \0"})
    assert store.cancel(made.id).status == "completed"
    assert not store.beat(made.id, "a", 5) and not store.fail(made.id, "a", "x", "y")
    assert json.loads(store.get(made.id).result) == {"caption": "a circle \0"}
    assert store.cancel("video_none") is None


def test_counts_pages_and_owners(store):
    ids = [video(store, seed=i).id for i in range(5)]
    caption(store)
    job = store.claim("a", (CAPTION,))
    assert store.owners() == [("a", job.beat_at)]
    assert store.counts() == {("video", "queued"): 5, ("caption", "in_progress"): 1}

    page, more = store.page(None, 2, True)
    assert [job.id for job in page] == ids[:2:-1] and more
    page, more = store.page(ids[2], 2, False)
    assert [job.id for job in page] == ids[3:] and not more
    assert store.page("video_none", 2, True) == ([], False)


@pytest.mark.parametrize("name", ["video_\0", "video_é", "v" * 5000, ""])
def test_any_text_may_be_asked_for(store, name):
    assert store.get(name) is None and store.page(name, 2, True) == ([], False)


def test_prompts_of_any_script_come_back(store):
    made = video(store, prompt="ein Kreis, круг, 円, \U0001f534")
    assert json.loads(store.get(made.id).request)["prompt"] == "ein Kreis, круг, 円, \U0001f534"


@pytest.mark.parametrize(
    "url", ["nonsense", "nonsense://x", "postgresql+psycopg://127.0.0.1:1/x", "sqlite:////none/x"]
)
def test_a_database_that_is_not_there_is_named(url):
    if "psycopg" in url:
        pytest.importorskip("psycopg")
    with pytest.raises(UsageError, match="--database must be"):
        Store(url)
