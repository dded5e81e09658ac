"""Requests that break a rule: the status, the error body, nothing left behind, a healthy server."""

import json
from pathlib import Path

import pytest
from bad_requests import FORM, OTHERS, VIDEO, VIDEOS
from serving import PROMPT


def state(server) -> tuple:
    """What a request might leave behind."""
    return server.files(), sum(server.store.counts().values()), sorted(Path(server.data).iterdir())


@pytest.mark.parametrize("bad", VIDEOS + OTHERS, ids=lambda bad: f"{bad.path[:20]} {bad.name}")
def test_a_bad_request_is_answered_and_leaves_nothing(server, clip, bad):
    before = state(server)
    request = dict(bad.send)
    if "json" in request:
        text = json.dumps(request["json"]).replace("{allowed}", str(clip.parent))
        request["json"] = json.loads(text)
    answer = server.http.request(bad.method, bad.path, **request)

    assert answer.status_code == bad.status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param"}
    assert error["type"] == "invalid_request_error" and error["code"] == bad.code
    assert bad.said in error["message"] and len(error["message"]) < 1000
    if bad.param is not None:
        assert error["param"] == bad.param
    assert state(server) == before
    assert server.http.get("/health").status_code == 200


def test_the_table_is_long_and_its_names_differ():
    names = [(bad.path, bad.method, bad.name) for bad in VIDEOS + OTHERS]
    assert len(names) >= 120 and len(set(names)) == len(names)


def test_a_body_without_a_length_is_stopped_at_the_limit(server):
    def chunks():
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(40):
            yield b"0" * 65_536

    before = state(server)
    answer = server.http.post("/v1/files", content=chunks(), headers=FORM)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert state(server) == before


def test_an_upload_that_is_no_video_is_refused_where_it_is_used(server):
    """Uploads are kept as they came; only a caption decodes them."""
    upload = server.http.post("/v1/files", files={"file": ("../../a.mp4", VIDEO, "video/mp4")})
    id = upload.json()["id"]
    content = [{"type": "video_url", "video_url": {"url": id}}]
    body = {"messages": [{"role": "user", "content": content}]}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_video")
    assert server.http.delete(f"/v1/files/{id}").json()["deleted"] and id not in server.files()


def test_content_waits_for_the_end_and_fails_with_the_video(server):
    server.pause_runner()
    try:
        id = server.ask()
        early = server.http.get(f"/v1/videos/{id}/content")
        caption = server.http.post(f"/v1/videos/{id}/caption")
        server.http.post(f"/v1/videos/{id}/cancel")
        late = server.http.get(f"/v1/videos/{id}/content")
    finally:
        server.resume_runner()
    codes = [(one.status_code, one.json()["error"]["code"]) for one in (early, caption, late)]
    assert codes == [(400, "video_not_ready"), (400, "video_not_ready"), (400, "video_failed")]
    assert server.http.get(f"/v1/videos/{id}").status_code == 200

    assert server.http.delete(f"/v1/videos/{id}").status_code == 200
    again = server.http.delete(f"/v1/videos/{id}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic {key}", "{key}"])
def test_a_wrong_key_opens_nothing_but_health(strict, header):
    headers = {"authorization": (header or "").replace("{key}", strict.key)}
    for path in ("/v1/videos", "/v1/models", "/ready", "/metrics", "/", "/docs", "/openapi.json"):
        answer = strict.http.get(path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.json()["error"]["type"] == "authentication_error"
    assert strict.http.get("/health", headers=headers).status_code == 200
    assert strict.http.get("/v1/models").status_code == 200


def test_a_full_queue_says_when_to_ask_again(strict):
    strict.pause_runner()
    try:
        ids = [strict.ask() for _ in range(2)]
        full = strict.http.post("/v1/videos", json={"prompt": PROMPT})
        error = full.json()["error"]
        assert (full.status_code, error["code"]) == (429, "queue_full")
        assert error["type"] == "rate_limit_error"
        assert 1 <= int(full.headers["retry-after"]) <= 120

        strict.http.delete(f"/v1/videos/{ids[0]}")
        ids = [ids[1], strict.ask()]
    finally:
        strict.resume_runner()
    assert [strict.ended(id)["status"] for id in ids] == ["completed"] * 2
