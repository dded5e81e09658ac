"""The file of `univigu generate --server`, made elsewhere."""

import json

import numpy as np
import pytest
from serving import PROMPT, QUICK, SMALL

from engine.cli import main
from engine.media import read_video

LINE = ["generate", "--prompt", PROMPT, "--quiet", "--num-inference-steps", "2"]
SIZE = ["--num-frames", "5", "--height", "32", "--width", "32", "--guidance-scale", "1"]


def run(server, path, *flags):
    return main([*LINE, *SIZE, "--server", server.url, "--output-path", str(path), *flags])


def test_the_file_is_that_of_the_same_call_and_its_sidecar_is_the_job(
    server, alone, tmp_path, capsys
):
    assert run(server, tmp_path / "clip.mp4", "--seed", "3", "--mode", "t2vt") == 0
    wanted, frames = alone(prompt=PROMPT, seed=3, mode="t2vt", **SMALL, **QUICK)
    assert np.array_equal(read_video(tmp_path / "clip.mp4").frames, frames)
    assert f"caption: {wanted.caption}" in capsys.readouterr().out

    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["caption"] == wanted.caption and record["seed"] == 3
    assert server.store.get(record["id"]).status == "completed"


def test_a_key_is_taken_from_a_file_and_a_wrong_one_is_an_error(strict, tmp_path, capsys):
    file = tmp_path / "key"
    file.write_text(strict.key + "\n")
    assert run(strict, tmp_path / "clip.mp4", "--api-key-file", str(file)) == 0
    file.write_text("another\n")
    assert run(strict, tmp_path / "other.mp4", "--api-key-file", str(file)) == 2
    assert "Send the server's key" in capsys.readouterr().err
    assert not (tmp_path / "other.mp4").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dtype", "bfloat16"], "--dtype must be left out with --server"),
        (["--text-rows", "8"], "--text-rows must be left out with --server"),
        (["--decoder-path", "x"], "--decoder-path must be left out with --server"),
        (["--commit", "confidence"], "--commit must be left out with --server"),
        (["--output-path", "clip.gif"], "must end in .mp4 with --server"),
        (["--server", "example"], "--server must be a URL"),
        (["--server", "http://127.0.0.1:1"], "--server must be reachable"),
        (["--mode", "t2v", "--text-steps", "3"], "text_steps"),
    ],
)
def test_what_a_server_cannot_be_asked_is_an_error(
    server, tmp_path, monkeypatch, capsys, flags, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("engine.cli.remote.TRIES", 1)
    assert run(server, tmp_path / "clip.mp4", *flags) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_fails_there_fails_here_by_its_code(strict, tmp_path, capsys):
    file = tmp_path / "key"
    file.write_text(strict.key + "\n")
    large = ["--num-frames", "161", "--height", "704", "--width", "1280"]
    assert run(strict, tmp_path / "clip.mp4", "--api-key-file", str(file), *large) == 5
    assert "by the estimate" in capsys.readouterr().err
    assert not (tmp_path / "clip.mp4").exists()


def test_a_busy_server_is_asked_again(monkeypatch):
    """By the same key, and after the time that it says."""
    import http.server
    import threading

    from engine.cli import remote

    seen, waited = [], []

    class Busy(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(self.headers["idempotency-key"])
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200 if len(seen) == 3 else 503)
            self.send_header("retry-after", "7")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Busy) as busy:
        threading.Thread(target=busy.serve_forever, daemon=True).start()
        monkeypatch.setattr(remote.time, "sleep", waited.append)
        there = remote.Remote(f"http://127.0.0.1:{busy.server_port}", None)
        assert there.json("/v1/videos", {}, **{"idempotency-key": "k"}) == {}
        busy.shutdown()
    assert seen == ["k"] * 3 and waited == [7.0, 7.0]
