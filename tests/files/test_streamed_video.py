"""Videos written from chunks of frames: the bytes of the whole, while the next chunk is made."""

import threading
import weakref

import numpy as np
import pytest

from engine.errors import UsageError
from engine.media import write_video
from engine.media.video import AHEAD


def clip(frames: int = 17, height: int = 32, width: int = 48) -> np.ndarray:
    """A picture of noise that moves."""
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return np.stack([np.roll(picture, 2 * n, 1) for n in range(frames)])


def cut(frames: np.ndarray, sizes: list[int]):
    assert sum(sizes) == len(frames)
    return (chunk for chunk in np.split(frames, np.cumsum(sizes)[:-1]))


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("sizes", [[1, 4, 4, 4, 4], [17], [1] * 17, [12, 5]], ids=str)
def test_chunks_give_the_bytes_of_the_whole(tmp_path, suffix, sizes):
    whole, streamed = tmp_path / f"whole{suffix}", tmp_path / f"streamed{suffix}"
    write_video(whole, clip(), 8)
    write_video(streamed, cut(clip(), sizes), 8)
    assert streamed.read_bytes() == whole.read_bytes()


def test_few_chunks_are_held_and_the_caller_makes_them(tmp_path):
    """The first, whose size the file has, and those that wait or are encoded. The file is there
    from the second chunk on."""
    seen, here = [], threading.get_ident()

    def chunks():
        for n in range(12):
            assert threading.get_ident() == here
            assert len([*tmp_path.glob(".*.partial")]) == (n > 0)
            chunk = clip(4, 320, 320)
            seen.append(weakref.ref(chunk))
            yield chunk
            del chunk
            assert sum(ref() is not None for ref in seen) <= AHEAD + 1

    write_video(tmp_path / "clip.mp4", chunks())
    assert len(seen) == 12 and [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


class Fails(np.ndarray):
    """A chunk that cannot be encoded."""

    def __iter__(self):
        raise RuntimeError("the disk is on fire")


def making_fails(frames):
    yield frames[:4]
    raise RuntimeError("the disk is on fire")


def encoding_fails(frames):
    yield frames[:4]
    yield frames[4:8].view(Fails)
    yield from cut(frames[8:], [1] * 9)


def interrupted(frames):
    yield frames[:4]
    raise KeyboardInterrupt("the disk is on fire")


@pytest.mark.parametrize("chunks", [making_fails, encoding_fails, interrupted])
def test_an_error_in_either_thread_leaves_the_old_file(tmp_path, chunks):
    path, threads = tmp_path / "clip.mp4", threading.active_count()
    path.write_bytes(b"old")
    with pytest.raises((RuntimeError, KeyboardInterrupt), match="on fire"):
        write_video(path, chunks(clip()))
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    "chunks, said",
    [
        ([], "non-empty"),
        ([clip(1), clip(1, 16)], r"frames of \[32, 48, 3\], as the first; got \[16, 48, 3\]"),
        ([clip(1), clip(1)[:0]], "non-empty"),
        ([clip(1), clip(1)[0]], r"got uint8 \(32, 48, 3\)"),
        ([clip(1)[:, :31]], "48x31"),
    ],
    ids=["none", "other size", "empty", "a picture", "odd"],
)
def test_bad_chunks_are_refused(tmp_path, chunks, said):
    with pytest.raises(UsageError, match=said):
        write_video(tmp_path / "clip.mp4", iter(chunks))
    assert list(tmp_path.iterdir()) == []
