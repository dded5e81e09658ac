"""Deaths, stalls, signals and lack of memory: no accepted job is lost, and none becomes another."""

import asyncio
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from serving import LONG, MIDDLE, PROMPT, QUICK, SMALL, until

from engine.config import EMBEDDED, read_pipeline_config
from engine.errors import Cancelled
from engine.media import read_video
from engine.serve.captions import ChatRequest, events
from engine.serve.loading import ModelSource
from engine.serve.settings import Settings
from engine.serve.store import CAPTION, JOBS, VIDEO, Store
from engine.serve.work import Beat, so_far


def frames_of(server, id: str) -> np.ndarray:
    return read_video(server.data / "results" / f"{id}.mp4").frames


def check(server, alone, wanted: dict[str, dict]) -> None:
    """All videos have completed, each as the same request gives alone."""
    for id, fields in wanted.items():
        video = server.ended(id)
        assert video["status"] == "completed", video
        _, frames = alone(**SMALL | QUICK | {"prompt": PROMPT} | fields)
        assert np.array_equal(frames_of(server, id), frames)


def results(server) -> set[str]:
    """Files in the folder of results but for pictures, which are made when they are asked for."""
    return {path.name for path in (server.data / "results").iterdir() if path.suffix != ".webp"}


def deaths(server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(next(s.split()[1] for s in lines if s.startswith("univigu_runner_deaths_total")))


def test_a_job_that_kills_the_runner_twice_fails_and_the_next_one_runs(server):
    before = deaths(server)
    bad, good = server.ask(**LONG), server.ask()
    server.begun(bad)
    server.kill_runner()
    server.begun(bad, attempts=2)
    server.kill_runner()

    video = server.ended(bad)
    assert (video["status"], video["error"]["code"]) == ("failed", "runner_died")
    assert server.ended(good)["status"] == "completed"
    assert not [name for name in server.files() if bad in name]
    assert deaths(server) == 2 + before


def test_twenty_clients_sixty_jobs_and_three_deaths_of_the_runner(server, alone):
    """None lost, none mixed up; what ran under a death ran again."""
    wanted, lock, done = {}, threading.Lock(), threading.Semaphore(0)

    def client(i: int) -> None:
        fields = {"prompt": f"a circle moves {i % 5}", "seed": i, "num_inference_steps": 1 + i % 2}
        for _ in range(3):
            id = server.ask(**fields)
            with lock:
                wanted[id] = fields
            server.ended(id)
            done.release()

    with ThreadPoolExecutor(20) as clients:
        running = [clients.submit(client, i) for i in range(20)]
        for _ in range(3):
            for _ in range(10):
                assert done.acquire(timeout=300)
            until(lambda: server.store.counts().get(("video", "in_progress")))
            server.kill_runner()
        for one in running:
            one.result()

    assert len(wanted) == 60
    check(server, alone, wanted)
    attempts = [server.store.get(id).attempts for id in wanted]
    assert set(attempts) <= {1, 2} and attempts.count(2) <= 3
    for id in wanted:
        server.http.delete(f"/v1/videos/{id}")


def test_a_server_that_is_killed_loses_no_job(serve, alone):
    """Nor does one that ends at once, at SIGTERM: its job waits for the next start."""
    server = serve("--drain-seconds", "0")
    wanted = {server.ask(**MIDDLE, seed=1): {**MIDDLE, "seed": 1}}
    wanted |= {server.ask(seed=i): {"seed": i} for i in range(2, 5)}
    server.begun(next(iter(wanted)))
    runner = server.runner
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not os.path.exists(f"/proc/{runner}"), 30)
    partial = server.data / "results" / ".0123456789abcdef.partial"
    partial.write_bytes(b"what a killed runner leaves")
    os.utime(partial, (0, 0))

    server.start()
    check(server, alone, wanted)
    assert server.store.get(next(iter(wanted))).attempts == 2
    assert results(server) == {f"{id}.{end}" for id in wanted for end in ("mp4", "json")}

    id = server.ask(**LONG)
    server.begun(id)
    assert server.stop() == 143
    job = server.store.get(id)
    assert (job.status, job.owner, job.attempts) == ("queued", None, 0)


def test_a_stalled_runner_is_replaced_and_a_signal_waits_for_the_job(serve, alone):
    server = serve("--stall-seconds", "2", "--drain-seconds", "170")
    first = server.runner
    id = server.ask(**MIDDLE, seed=1)
    server.begun(id)
    server.pause_runner()
    check(server, alone, {id: {**MIDDLE, "seed": 1}})
    assert server.store.get(id).attempts == 2 and server.runner != first

    last, waits = server.ask(**MIDDLE, seed=1), server.ask()
    server.begun(last)
    assert server.stop() == 143
    assert server.store.get(last).status == "completed"
    assert server.store.get(waits).status == "queued"
    assert np.array_equal(frames_of(server, last), frames_of(server, id))


def test_too_little_memory_fails_one_job(strict):
    large, small = strict.ask(size="512x512", seconds="20"), strict.ask()
    video = strict.ended(large)
    assert (video["status"], video["error"]["code"]) == ("failed", "out_of_memory")
    said = video["error"]["message"]
    assert "of 0.10 GB, by the estimate" in said and "--height 256 --width 256" in said
    assert strict.ended(small)["status"] == "completed"


def test_captions_run_between_the_steps_of_a_video(strict, clip):
    id = strict.ask(**LONG)
    strict.begun(id)
    file = strict.client.files.create(file=clip, purpose="vision")
    part = {"type": "video_url", "video_url": {"url": file.id}}
    said = strict.client.chat.completions.create(
        model=strict.model,
        messages=[{"role": "user", "content": [part]}],
        extra_body={"num_inference_steps": 2},
    )
    assert said.choices[0].message.content is not None
    assert strict.http.get(f"/v1/videos/{id}").json()["status"] == "in_progress"
    assert strict.http.delete(f"/v1/videos/{id}").status_code == 200


@pytest.mark.parametrize("way", ["cancel", "remove", "told"])
def test_nothing_runs_after_the_step_in_which_a_job_was_stopped(pipe, tmp_path, monkeypatch, way):
    """Counted in steps: the sampler asks after each, the table not before some time has passed;
    where the server tells the runner, it need not."""
    monkeypatch.setattr("engine.serve.work.SPARSE", 1000 if way == "told" else 0)
    store, steps = Store(Settings(data=tmp_path).database_url), []
    id = store.create(VIDEO, {}, {}, 1).id
    beat = Beat(store, "me", [store.claim("me")])

    def follow(pipe, step, moment, tensors):
        steps.append(step)
        beat.progress = step + 1
        if step == 2:
            beat.stop(id) if way == "told" else getattr(store, way)(id)

    with pytest.raises(Cancelled):
        pipe.generate(
            PROMPT,
            num_inference_steps=20,
            callback_on_step_end=follow,
            cancel=beat,
            progress=False,
            output_path=tmp_path / "clip.mp4",
        )
    assert steps == [0, 1, 2] and not (tmp_path / "clip.mp4").exists()
    store.close()


def test_the_server_tells_the_runner_of_a_job_that_is_not_wanted(runner):
    """By a line, which reaches what runs and what runs within it."""
    from types import SimpleNamespace

    from engine.serve.runner import Runner

    jobs = [SimpleNamespace(id=id) for id in ("a", "b")]
    listening = SimpleNamespace(worker=runner, draining=None, woken=SimpleNamespace(set=int))
    with runner.beating(jobs[:1]) as outer, runner.beating(jobs) as inner:
        with pytest.raises(RuntimeError, match="no more lines"):
            Runner.listen(listening, iter_then_stop("stop a\n"))
        assert (outer.jobs, inner.jobs) == (set(), {"b"})
    assert runner.beats == []


def iter_then_stop(*lines):
    """Lines that end with an error, for the end of a runner's input ends the process."""
    yield from lines
    raise RuntimeError("no more lines")


@pytest.fixture
def runner(pipe, tmp_path):
    """A runner's worker in this process; what it said is in `said`."""
    from engine.serve.work import Worker

    settings = Settings(data=tmp_path, memory_gb=0.1)
    settings.videos.mkdir()
    store, said = Store(settings.database_url), []
    found = Worker(pipe, store, settings, "me", said.append, time.sleep)
    found.said = said
    yield found
    store.close()


def request(**fields) -> dict:
    """As `videos.settled` tells it to a runner."""
    names = "num_inference_steps flow_shift solver text_steps guidance_scale".split()
    asked = {"prompt": PROMPT, "mode": "t2v", "negative_prompt": "", "seed": 0, "lora": {}}
    asked |= dict.fromkeys(names) | {"num_frames": 5, "height": 32, "width": 32} | QUICK
    return asked | fields


@pytest.mark.parametrize("way", ["cancel", "remove"])
def test_a_video_that_was_stopped_as_it_was_finished_leaves_no_file(runner, way):
    """The last moment: the file has its name already when nobody wants it any more."""
    job = runner.store.create(VIDEO, request(), {}, 9)
    complete = runner.store.complete

    def late(id, owner, result):
        assert list(runner.settings.videos.iterdir())
        getattr(runner.store, way)(id)
        return complete(id, owner, result)

    runner.store.complete = late
    runner.video(runner.store.claim("me"))
    assert list(runner.settings.videos.iterdir()) == []
    assert runner.store.get(job.id) is None or runner.store.get(job.id).error_code == "cancelled"


def test_captions_that_fit_one_by_one_alone_run_one_by_one(runner, clip):
    wanted = {"path": str(clip), "start": 0, "n": 1, "seed": 1, "num_inference_steps": 1}
    wanted |= {"temperature": 1.0, "video_cache": "exact", "commit": "jump", "stream": False}
    ids = [runner.store.create(CAPTION, wanted, {}, 99, "[]").id for _ in range(3)]
    limit = estimate(runner, 1) + 1
    assert estimate(runner, 3) > limit
    object.__setattr__(runner.settings, "memory_gb", limit / 1e9)

    runner.captions()
    assert [runner.store.get(id).status for id in ids] == ["completed"] * 3


def estimate(runner, batch: int) -> int:
    """Bytes of so many captions at once."""
    from engine.planning import memory

    shape = batch, *runner.pipe.config.shape(9, 64, 64)
    how = {"mode": "v2t", "guided": False, "steps": 1}
    fields = runner.pipe.job_of(shape, dtype=runner.pipe.model.dtype, **how)
    cfg, codecs = fields.pop("cfg", runner.pipe.model.cfg), fields.pop("codecs")
    job = memory.Job(**fields, precision=runner.pipe.model.ops.precision)
    return max(memory.peaks(memory.estimate(cfg, job, codecs)).values())


@pytest.fixture
def own(tmp_path):
    """The state of a server, without its processes, by its settings."""
    from engine.serve.server import Server

    made = []

    def server(**settings):
        source = ModelSource(name="tiny", path=str(EMBEDDED))
        config = read_pipeline_config(EMBEDDED)
        made.append(Server(Settings(data=tmp_path, **settings), source, config))
        return made[-1]

    yield server
    for one in made:
        one.stop()


def finished(server, kind=VIDEO, size=10, ago=0.0) -> str:
    """A job that ended so many seconds ago, with a file of so many bytes."""
    id = server.store.create(kind, {}, {}, 99).id
    server.store.claim("me")
    (server.settings.videos / f"{id}.mp4").write_bytes(b"0" * size)
    server.store.complete(id, "me", {})
    with server.store.engine.begin() as db:
        then = {"completed_at": time.time() - ago}
        db.execute(JOBS.update().where(JOBS.c.id == id).values(then))
    return id


def test_old_results_go(own):
    server = own(keep_days=2)
    old, new = finished(server, ago=2.1 * 86_400), finished(server, ago=1.9 * 86_400)
    server.tidy()
    assert results_of(server) == [f"{new}.mp4"] and server.store.get(old) is None
    job = server.store.get(new)
    assert server.expires_at(job) == job.completed_at + 2 * 86_400


def test_the_oldest_of_too_many_results_go(own):
    server = own(keep_gb=25e-9)
    ids = [finished(server, ago=10 - i) for i in range(4)]
    server.tidy()
    assert results_of(server) == sorted(f"{id}.mp4" for id in ids[2:])


def test_without_limits_all_results_stay(own):
    server = own()
    ids = [finished(server, ago=10**9), finished(server)]
    server.tidy()
    assert results_of(server) == sorted(f"{id}.mp4" for id in ids)


def test_what_nobody_can_ask_for_any_more_goes(own):
    """Captions whose client left with the server's last life, and files never finished."""
    server = own()
    caption, fresh = finished(server, CAPTION, ago=3700), finished(server, CAPTION)
    for name in ("old", "new"):
        (server.settings.videos / f".{name}.partial").write_bytes(b"0")
    os.utime(server.settings.videos / ".old.partial", (0, 0))
    server.tidy()
    assert server.store.get(caption) is None and server.store.get(fresh) is not None
    assert [name for name in results_of(server) if "partial" in name] == [".new.partial"]


def results_of(server) -> list[str]:
    return sorted(path.name for path in server.settings.videos.iterdir())


def test_the_oldest_uploads_go(own):
    server = own(uploads_gb=0.001)
    for i in range(3):
        path = server.settings.uploads / f"file-{i}"
        path.write_bytes(b"0" * 400_000)
        os.utime(path, (i, i))
    server.tidy()
    assert sorted(p.name for p in server.settings.uploads.iterdir()) == ["file-1", "file-2"]


@pytest.mark.parametrize(
    "committed, said",
    [
        ("00000", ""),
        ("01111", ""),
        ("10000", ""),
        ("11000", "a"),
        ("11011", "a"),
        ("11100", "a red"),
        ("11110", "a red circle"),
        ("11111", "a red circle"),
    ],
)
def test_what_is_sent_of_a_caption_stays(pipe, committed, said):
    """Whole words of the tokens before the first that may change; all, where the end is known."""
    ids = torch.tensor(pipe.tokenizer.encode("a red circle").ids + [5])
    assert len(ids) == 5 and ids[3] == pipe.text.eos_id
    assert so_far(pipe.text, ids, torch.tensor([digit == "1" for digit in committed])) == said


def test_a_caption_that_changes_under_way_ends_its_stream(own):
    """As it may where its runner dies and it runs again beside other captions."""

    async def answers():
        yield {"captions": ["a red"], "trace": "t", "whole": False}
        yield {"captions": ["a blue circle"], "trace": "t", "whole": True}

    async def read():
        asked = ChatRequest(messages=[{}], stream=True)
        return [json.loads(line[6:]) async for line in events(own(), asked, answers())]

    piece, error = asyncio.run(read())
    assert piece["choices"][0]["delta"]["content"] == "a red"
    assert error["error"]["code"] == "caption_changed"
