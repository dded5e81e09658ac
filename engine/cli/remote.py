"""generate --server: the same command, where a server has the model."""

import json
import secrets
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from engine.cli.sampling import Sampling
from engine.errors import Cancelled, OutOfMemory, UsageError
from engine.files import replacing

TRIES, LONGEST_WAIT = 5, 120  # of a request that the server may take later; seconds
SENT = ("num_inference_steps", "seed", "quiet")  # of Sampling: what a request says, or needs not
ERRORS = {"cancelled": Cancelled, "out_of_memory": OutOfMemory, "invalid_request": UsageError}
FORBIDDEN = "sigmas", "timesteps", "decoder_path"


def check(command) -> None:
    """Errors: UsageError for flags of a `Generate` that are the server's to set."""
    plain, asked = Sampling(), command.sampling
    set_here = [
        f.name for f in fields(Sampling) if getattr(asked, f.name) != getattr(plain, f.name)
    ]
    set_here = [name for name in set_here if name not in SENT]
    own = vars(command) | vars(command.video)
    set_here += [name for name in FORBIDDEN if own[name]]
    if set_here:
        flag = "--" + set_here[0].replace("_", "-")
        raise UsageError(f"usage: {flag} must be left out with --server, whose model it is about.")
    if urlsplit(command.server).scheme not in ("http", "https"):
        raise UsageError(
            f"usage: --server must be a URL such as http://127.0.0.1:8000; got {command.server!r}."
        )
    if command.output_path.suffix != ".mp4":
        raise UsageError(
            f"usage: --output-path must end in .mp4 with --server; got {command.output_path}."
        )


class Remote:
    """A server. key: what it wants to be shown, or None."""

    def __init__(self, url: str, key: str | None):
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key

    def ask(self, path: str, body: dict | None = None, method: str | None = None, **headers):
        """The answer's bytes. A server that is busy or cannot be reached is asked again.

        Errors: UsageError for what it refuses, RuntimeError for what it cannot do.
        """
        headers |= {"authorization": f"Bearer {self.key}"} if self.key else {}
        headers |= {"content-type": "application/json"} if body is not None else {}
        data = None if body is None else json.dumps(body).encode()

        request = urllib.request.Request(self.url + path, data, headers, method=method)
        for left in reversed(range(TRIES)):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                if not left or error.code not in (429, 502, 503):
                    raise refused(error) from None
                wait = float(error.headers.get("retry-after") or 1)
            except (urllib.error.URLError, OSError) as error:
                if not left:
                    reason = getattr(error, "reason", error)
                    raise UsageError(
                        f"usage: --server must be reachable; got {reason} for {self.url}."
                    ) from None
                wait = 1.0
            time.sleep(min(wait, LONGEST_WAIT))

    def json(self, *args, **headers) -> dict:
        return json.loads(self.ask(*args, **headers))


def refused(error: urllib.error.HTTPError) -> Exception:
    try:
        said = json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        said = f"HTTP {error.code}"
    kind = UsageError if error.code < 500 else RuntimeError
    return kind(f"server: {said}")


def request_of(command, model: dict) -> dict:
    """The body of POST /v1/videos. model: what /v1/models says."""
    sent = {name: getattr(command, name) for name in "prompt mode negative_prompt".split()}
    optional = {
        n: getattr(command.video, n) for n in "guidance_scale flow_shift solver text_steps".split()
    }
    optional["num_inference_steps"] = command.sampling.num_inference_steps
    sent |= {name: value for name, value in optional.items() if value is not None}
    sent["seed"] = command.sampling.seed

    if command.num_frames is not None:
        sent["seconds"] = f"{(command.num_frames - 1) / model['fps']:.9g}"
    if command.height is not None or command.width is not None:
        width, height = model["default_size"].split("x")
        sent["size"] = f"{command.width or width}x{command.height or height}"
    return sent


def generate(command) -> dict:
    """Runs a `Generate` on its server; returns the video's record, which stands beside the file.

    Errors: UsageError, OutOfMemory, RuntimeError; Cancelled, also of an interrupt here, after which
    the server stops too.
    """
    check(command)
    key = command.api_key_file and command.api_key_file.read_text().split("\n")[0].strip()
    remote = Remote(command.server, key)
    body = request_of(command, remote.json("/v1/models")["data"][0])
    once = {"idempotency-key": secrets.token_hex(16)}  # sent again, it asks for no second video
    video = remote.json("/v1/videos", body, **once)
    path = f"/v1/videos/{video['id']}"
    try:
        video = follow(lambda: remote.json(path), video, command.sampling.quiet)
    except KeyboardInterrupt:
        remote.ask(path, method="DELETE")
        raise
    if video["status"] == "failed":
        code, said = video["error"]["code"], video["error"]["message"]
        raise ERRORS.get(code, RuntimeError)(f"server: {said}")

    save(command.output_path, remote.ask(f"{path}/content"), video)
    return video


def follow(look: Callable[[], dict], video: dict, quiet: bool) -> dict:
    """The video once it has ended."""
    with tqdm(total=100, unit="%", disable=quiet, leave=False) as bar:
        while video["status"] in ("queued", "in_progress"):
            time.sleep(0.3)
            video = look()
            bar.update(video["progress"] - bar.n)
    return video


def save(path: Path, content: bytes, record: dict) -> None:
    from engine.media import write_sidecar

    with replacing(path) as unfinished:
        unfinished.write_bytes(content)
    write_sidecar(path, record)
