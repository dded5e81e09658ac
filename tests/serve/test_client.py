"""The real openai package against a real server."""

import base64
import http.client
import io
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import openai
import pytest
from PIL import Image
from serving import LONG, PROMPT, QUICK, SMALL, until

from engine.media import read_video

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of client.videos


def chat(server, url, **fields):
    content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": "What?"}]
    return server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": content}], **fields
    )


def data_url(path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()


@pytest.fixture(scope="module")
def video(server):
    """A video with its caption, made as a user makes one."""
    return server.client.videos.create_and_poll(
        prompt=PROMPT,
        model=server.model,
        size="64x64",
        seconds="1",
        extra_body=QUICK | {"mode": "t2vt", "seed": 7},
    )


def test_a_video_is_what_generate_makes_of_the_same_arguments(server, video, alone, tmp_path):
    result, frames = alone(prompt=PROMPT, mode="t2vt", seed=7, size="64x64", seconds="1", **QUICK)
    server.client.videos.download_content(video.id).write_to_file(tmp_path / "clip.mp4")
    assert np.array_equal(read_video(tmp_path / "clip.mp4").frames, frames)
    assert video.model_extra["caption"] == result.caption
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    assert (video.seconds, video.size, video.model) == ("1", "64x64", server.model)
    assert video.created_at <= video.completed_at and video.prompt == PROMPT


def test_a_job_s_own_fields_give_the_same_clip(server, video, tmp_path):
    extra = QUICK | {"mode": "t2vt", "seed": video.model_extra["seed"]}
    again = server.client.videos.create_and_poll(
        prompt=video.prompt,
        model=video.model,
        seconds=video.seconds,
        size=video.size,
        extra_body=extra,
    )
    files = [server.client.videos.download_content(one.id).read() for one in (video, again)]
    frames = [
        read_video(written(tmp_path / f"{i}.mp4", file)).frames for i, file in enumerate(files)
    ]
    assert np.array_equal(*frames) and again.id != video.id


def written(path, content):
    path.write_bytes(content)
    return path


def test_what_the_server_drew_and_filled_in_is_told(server, alone):
    """Without a seed and sizes the answer names those that were taken."""
    made = server.http.post("/v1/videos", json={"prompt": PROMPT} | QUICK)
    video = server.ended(made.json()["id"])
    assert made.headers["openai-poll-after-ms"].isdigit()
    assert (video["seconds"], video["size"]) == ("1", "64x64")

    _, frames = alone(prompt=PROMPT, seed=video["seed"], size="64x64", seconds="1", **QUICK)
    path = server.data / "results" / f"{video['id']}.mp4"
    assert np.array_equal(read_video(path).frames, frames)


def test_retrieve_says_what_create_said(server, video):
    found = server.client.videos.retrieve(video.id)
    assert found == video


def test_the_list_has_pages(server):
    ids = [server.ask(seed=i) for i in range(5)]
    newest = server.client.videos.list(limit=2)
    assert [one.id for one in newest.data] == ids[:-3:-1] and newest.has_more

    following = newest.get_next_page()
    assert [one.id for one in following.data] == ids[2:0:-1]
    ascending = server.client.videos.list(after=ids[0], order="asc", limit=100)
    assert [one.id for one in ascending.data] == ids[1:]

    everything = [one.id for one in server.client.videos.list(limit=2)]
    assert everything[:5] == ids[::-1] and len(set(everything)) == len(everything)
    assert server.client.videos.list(after="video_none").data == []
    for id in ids:
        server.client.videos.delete(id)


def test_pictures_of_a_video(server, video, tmp_path):
    content = server.client.videos.download_content
    frames = read_video(written(tmp_path / "clip.mp4", content(video.id).read())).frames
    thumbnail = Image.open(io.BytesIO(content(video.id, variant="thumbnail").read()))
    sheet = Image.open(io.BytesIO(content(video.id, variant="spritesheet").read()))
    assert thumbnail.format == sheet.format == "WEBP"
    assert thumbnail.size == (64, 64) and sheet.size == (64 * len(frames), 64)

    middle = np.asarray(thumbnail.convert("RGB")).astype(int)
    assert np.abs(middle - frames[len(frames) // 2]).mean() < 16  # webp is lossy


def test_ranges_of_a_video(server, video):
    path = f"/v1/videos/{video.id}/content"
    whole = server.http.get(path)
    part = server.http.get(path, headers={"range": "bytes=10-19"})
    last = server.http.get(path, headers={"range": "bytes=-5"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole.content)}"
    assert last.content == whole.content[-5:] and whole.headers["accept-ranges"] == "bytes"
    beyond = {"range": f"bytes={len(whole.content)}-"}
    assert server.http.get(path, headers=beyond).status_code == 416


def test_delete_takes_the_files_along(server):
    id = server.ask()
    assert server.ended(id)["status"] == "completed"
    server.http.get(f"/v1/videos/{id}/content?variant=thumbnail")
    assert len([name for name in server.files() if id in name]) == 3

    gone = server.client.videos.delete(id)
    assert (gone.id, gone.deleted, gone.object) == (id, True, "video.deleted")
    assert not [name for name in server.files() if id in name]
    with pytest.raises(openai.NotFoundError):
        server.client.videos.delete(id)


@pytest.mark.parametrize("way", ["cancel", "delete"])
def test_a_running_video_is_stopped_and_leaves_no_file(server, way):
    id, after = server.ask(**LONG), server.ask()
    server.begun(id)
    if way == "cancel":
        video = server.http.post(f"/v1/videos/{id}/cancel").json()
        assert (video["status"], video["error"]["code"]) == ("failed", "cancelled")
        assert server.client.videos.retrieve(id).progress == video["progress"] < 95
    else:
        server.client.videos.delete(id)
        assert server.http.get(f"/v1/videos/{id}").status_code == 404
    assert server.ended(after)["status"] == "completed"
    assert not [name for name in server.files() if id in name]


def test_cancel_of_what_has_ended_changes_nothing(server, video):
    answer = server.http.post(f"/v1/videos/{video.id}/cancel")
    assert answer.status_code == 200 and answer.json()["status"] == "completed"


def test_a_waiting_video_is_cancelled_at_once(server):
    server.pause_runner()
    try:
        id = server.ask()
        assert server.http.get(f"/v1/videos/{id}").json()["status"] == "queued"
        video = server.http.post(f"/v1/videos/{id}/cancel").json()
        assert video["error"]["code"] == "cancelled" and video["completed_at"]
    finally:
        server.resume_runner()


def test_a_key_stands_for_one_request(server):
    body = SMALL | QUICK | {"prompt": PROMPT, "seed": 1}
    head = {"idempotency-key": "k" * 255}
    first = server.http.post("/v1/videos", json=body, headers=head).json()
    as_form = {name: (None, str(value)) for name, value in reversed(body.items())}
    again = server.http.post("/v1/videos", files=as_form, headers=head)
    assert again.json()["id"] == first["id"]

    other = server.http.post("/v1/videos", json=body | {"seed": 2}, headers=head)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "key_reused")
    server.ended(first["id"])


def test_a_caption_of_a_file_in_all_its_ways(server, clip, pipe):
    """A data URL, an upload and a file of an allowed folder give the same captions, which are the
    pipeline's own."""
    before = server.files()
    upload = server.client.files.create(file=clip, purpose="vision")
    urls = data_url(clip), upload.id, f"file://{clip}"
    said = [chat(server, url, n=2, seed=3, extra_body={"num_inference_steps": 2}) for url in urls]
    captions = [[choice.message.content for choice in one.choices] for one in said]
    frames = read_video(clip).frames[None].repeat(2, 0)
    own = pipe.caption(frames, num_inference_steps=2, seed=[3, 4], progress=False)
    assert captions == [[result.caption for result in own]] * 3

    usage = said[0].usage
    assert usage.completion_tokens == usage.total_tokens > 0
    assert server.client.files.delete(upload.id).deleted
    assert server.files() == before


def read_stream(stream, count: int) -> tuple[list[list[str]], list[str], object]:
    """The pieces of each choice, the reasons to finish, and the usage."""
    pieces, reasons, usage = [[] for _ in range(count)], [], None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            pieces[choice.index] += filter(None, [choice.delta.content])
            reasons += filter(None, [choice.finish_reason])
    return pieces, reasons, usage


@pytest.mark.parametrize("commit", ["jump", "confidence"])
def test_a_stream_is_the_caption_in_pieces(server, clip, commit):
    """Tokens that stay are sent as they come; one that jumped may jump again."""
    fields = {"seed": 3, "extra_body": {"num_inference_steps": 12, "commit": commit}}
    whole = chat(server, data_url(clip), n=2, **fields)
    usage = {"include_usage": True}
    stream = chat(server, data_url(clip), n=2, stream=True, stream_options=usage, **fields)
    pieces, reasons, usage = read_stream(stream, 2)
    assert ["".join(some) for some in pieces] == [one.message.content for one in whole.choices]
    assert reasons == ["stop", "stop"] and usage == whole.usage
    assert all(len(some) == 1 if commit == "jump" else len(some) > 1 for some in pieces)


def test_a_piece_comes_before_the_caption_is_whole(server, clip):
    """And a client that leaves after it takes its caption along."""
    fields = {"num_inference_steps": 100, "commit": "confidence", "video_cache": "exact"}
    stream = chat(server, data_url(clip), seed=3, stream=True, extra_body=fields)
    assert next(iter(stream)).choices[0].delta.content
    assert server.store.counts()["caption", "in_progress"] == 1
    stream.close()
    until(lambda: not [key for key in server.store.counts() if key[0] == "caption"])
    until(lambda: not [name for name in server.files() if name.startswith("data_")])


def test_a_caption_of_a_video_made_here(server, video):
    answer = server.http.post(f"/v1/videos/{video.id}/caption")
    assert answer.status_code == 200 and isinstance(answer.json()["caption"], str)

    part = {"type": "video_url", "video_url": {"url": video.id}}
    asked = {"messages": [{"role": "user", "content": [part]}], "num_inference_steps": 2}
    answer = server.http.post("/v1/chat/completions", json=asked)
    assert isinstance(answer.json()["choices"][0]["message"]["content"], str)
    asked["messages"][0]["content"][0]["video_url"]["url"] = "video_0"
    assert server.http.post("/v1/chat/completions", json=asked).status_code == 404


def test_captions_that_wait_run_as_one_batch(server, clip):
    fields = {"extra_body": {"num_inference_steps": 2}}
    apart = [chat(server, data_url(clip), seed=i, **fields) for i in range(4)]
    before = batches(server)
    server.pause_runner()
    try:
        with ThreadPoolExecutor(4) as clients:
            asked = [
                clients.submit(chat, server, data_url(clip), seed=i, **fields) for i in range(4)
            ]
            until(lambda: server.store.counts().get(("caption", "queued")) == 4)
            server.resume_runner()
            together = [one.result() for one in asked]
    finally:
        server.resume_runner()
    said = [[one.choices[0].message.content for one in some] for some in (apart, together)]
    assert said[0] == said[1]
    assert batches(server) - before in (1, 2)  # one that slept in its window may have been alone


def batches(server) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(BATCHES)))


BATCHES = "univigu_caption_batch_count"


def test_a_client_that_leaves_takes_its_caption_along(server, clip):
    server.pause_runner()
    try:
        with pytest.raises(openai.APITimeoutError):
            chat(server, data_url(clip), timeout=0.5)
        until(lambda: not server.store.counts().get(("caption", "queued")))
        until(lambda: not [name for name in server.files() if name.startswith("data_")])
    finally:
        server.resume_runner()
    assert not [key for key in server.store.counts() if key[0] == "caption"]


def test_models_and_health(server):
    (model,) = server.client.models.list().data
    assert model.id == server.model and model.model_extra["default_size"] == "64x64"
    assert server.http.get("/health").json() == {"status": "ok"}
    assert server.http.get("/ready").status_code == 200
    assert "univigu_ready 1.0" in server.http.get("/metrics").text


def test_a_connection_outlasts_the_pause_between_two_questions(server):
    """A client that asks every 5 s loses answers where connections last 5 s, as uvicorn's do."""
    host = urlsplit(server.url)
    connection = http.client.HTTPConnection(host.hostname, host.port)
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    before = connection.sock.getsockname()
    time.sleep(5.5)
    connection.request("GET", "/health")
    assert connection.getresponse().read() and connection.sock.getsockname() == before
    connection.close()
