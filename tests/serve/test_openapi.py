"""Requests that a tool makes up from /openapi.json."""

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="pip install 'univigu-engine[dev]'")
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402

from engine.serve.store import FAILED  # noqa: E402


@pytest.fixture(autouse=True)
def swept(server):
    """What the requests left is deleted; none of their videos failed by a fault of the server."""
    before = {video["id"] for video in videos(server)}
    yield
    failed = [one for one in videos(server) if one["status"] == FAILED and one["id"] not in before]
    codes = {video["error"]["code"] for video in failed}
    for video in videos(server):
        server.http.delete(f"/v1/videos/{video['id']}")
    for name in server.files():
        server.http.delete(f"/v1/files/{name}")
    assert "internal_error" not in codes and "runner_died" not in codes


def videos(server) -> list[dict]:
    return server.http.get("/v1/videos", params={"limit": 100}).json()["data"]


def test_no_request_makes_the_server_fail(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    for operation in operations:
        attempt(operation)
    assert {one.path for one in operations} >= {"/v1/videos", "/v1/chat/completions", "/v1/files"}


def attempt(operation) -> None:
    """A few dozen requests of one route."""

    @given(case=operation.as_strategy())
    @settings(
        max_examples=24,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )
    def answered(case) -> None:
        response = case.call()
        assert response.status_code < 500
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "code", "param"}

    answered()
