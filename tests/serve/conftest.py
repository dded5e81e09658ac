"""Servers that tests talk to, and what the same requests give without one."""

from functools import lru_cache
from pathlib import Path

import pytest

NEEDED = "fastapi uvicorn multipart sqlalchemy prometheus_client openai httpx"
for package in NEEDED.split():
    pytest.importorskip(package, reason="pip install 'univigu-engine[serve,dev]'")
if not Path("/proc/self/stat").exists():
    pytest.skip("finds the runner's process in /proc", allow_module_level=True)

import serving  # noqa: E402
import torch  # noqa: E402

from engine.config import EMBEDDED  # noqa: E402
from engine.media import read_video, write_video  # noqa: E402
from engine.pipeline import Pipeline  # noqa: E402

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="session")
def serve(tmp_path_factory):
    """Starts a server with these flags; it ends with the tests."""
    started = []

    def start(*flags, key=None) -> serving.Served:
        data = tmp_path_factory.mktemp("serve") / "data"
        started.append(serving.Served(data, *flags, key=key))
        return started[-1]

    yield start
    for server in started:
        server.close()


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    """A video of the model's size, in a folder that `server` allows."""
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (9, 8, 8, 3), generator=generator, dtype=torch.uint8)
    path = tmp_path_factory.mktemp("allowed") / "clip.mp4"
    write_video(path, frames.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy(), 8)
    return path


@pytest.fixture(scope="session")
def server(serve, clip):
    return serve("--allow-folder", str(clip.parent), "--upload-mb", "1")


@pytest.fixture(scope="session")
def strict(serve, tmp_path_factory):
    """A server with a key, a short queue and little memory, whose captions wait for no video."""
    file = tmp_path_factory.mktemp("key") / "key"
    file.write_text(KEY + "\n")
    flags = "--queue-limit", "2", "--memory-gb", "0.1", "--interleave"
    return serve("--api-key-file", str(file), *flags, key=KEY)


@pytest.fixture(scope="session")
def pipe():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the servers
    yield Pipeline.from_pretrained(EMBEDDED)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def alone(pipe, tmp_path_factory):
    """The result of `generate` and the frames that its file gives back, by a request's fields."""
    folder = tmp_path_factory.mktemp("alone")

    @lru_cache
    def made(fields: tuple):
        asked = dict(fields)
        width, height = map(int, asked.pop("size").split("x"))
        frames = round(float(asked.pop("seconds")) * 8) + 1
        size = {"num_frames": frames, "height": height, "width": width}
        result = pipe.generate(**asked, **size, progress=False)
        result.save(folder / "clip.mp4")
        return result, read_video(folder / "clip.mp4").frames

    return lambda **fields: made(tuple(sorted(fields.items())))
