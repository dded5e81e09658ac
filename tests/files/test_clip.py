"""The clips that a model takes of a file: which frames, of what size, window by window."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch
from video_files import from_rgb, write

from engine.config import PipelineConfig
from engine.data.manifest import Clip, read_frames
from engine.errors import UsageError
from engine.media import decode, read_clips, write_video

CONFIG = PipelineConfig(num_frames=5, height=16, width=32, fps=8)
PHONE = [i / 30 for i in range(30)] + [1 + i / 10 for i in range(21)]  # 30 a second, then 10


def grey(path, times, **options):
    """A frame at each time; frame i has the level 3 i."""
    frames = [from_rgb(np.full((48, 64, 3), 3 * i, np.uint8), "yuv444p") for i in range(len(times))]
    return write(path, frames, times=times, **options)


def numbers(frames) -> list[int]:
    return (frames.float().mean((1, 2, 3)) / 3).round().int().tolist()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for suffix in (".mp4", ".mkv", ".mov"):
        grey(folder / f"phone{suffix}", PHONE)
    grey(folder / "even.mp4", [i / 16 for i in range(60)])
    grey(folder / "slow.mp4", [i / 4 for i in range(9)])
    return folder


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
@pytest.mark.parametrize("start, fps", [(0.0, 8), (0.0, 16), (0.4, 8), (0.95, 5), (1.8, 6)])
def test_frames_of_a_variable_rate_are_the_nearest(place, suffix, start, fps):
    """The earlier of two that are as near."""
    config = replace(CONFIG, fps=fps)
    wanted = [int(np.abs(np.array(PHONE) - start - i / fps).round(4).argmin()) for i in range(5)]
    clip = next(read_clips(place / f"phone{suffix}", config, start))
    assert numbers(clip.frames) == wanted
    assert torch.equal(
        clip.frames,
        read_frames(Clip(1, place / f"phone{suffix}", "a", "b", start, 1e6), config),
    )
    assert (clip.start, clip.end) == (start, start + 5 / fps)


def test_what_was_done_is_said(place):
    clip = next(read_clips(place / "phone.mp4", replace(CONFIG, num_frames=9, fps=4)))
    assert clip.source["duration"] == pytest.approx(3.0, abs=0.2)
    assert clip.source | {"duration": 0} == {
        "container": "mov,mp4,m4a,3gp,3g2,mj2",
        "codec": "h264",
        "size": [64, 48],
        "duration": 0,
        "frames_per_second": 20.0,
        "start": 0.0,
        "num_frames": 9,
        "fps": 4,
        "repeated": 0,
        "done": ["64x48 scaled to cover 32x16, cropped", "20 frames a second sampled at 4"],
    }


def test_a_slow_file_repeats_frames_and_says_so(place):
    clip = next(read_clips(place / "slow.mp4", CONFIG))
    assert numbers(clip.frames) == [0, 0, 1, 1, 2] and clip.source["repeated"] == 2
    assert "2 frames repeated" in clip.source["done"]
    with pytest.raises(UsageError, match="at least 8 frames per second; got 4"):
        read_frames(Clip(1, place / "slow.mp4", "a", "b", 0.0, 1e6), CONFIG)


def test_a_short_file_gives_4k_plus_1_frames(place):
    config = replace(CONFIG, num_frames=81, fps=16)
    assert len(next(read_clips(place / "even.mp4", config)).frames) == 57
    assert len(next(read_clips(place / "even.mp4", config, 0.0, 1.0)).frames) == 13
    assert len(next(read_clips(place / "even.mp4", config, 3.6)).frames) == 1
    with pytest.raises(UsageError, match="81 frames at 16 a second between .* got 60"):
        next(read_clips(place / "even.mp4", config, whole=True))


def test_windows(place):
    """60 frames of 16 a second: a clip of 5 frames every half second, and none of a last frame."""
    clips = list(read_clips(place / "even.mp4", CONFIG, every=0.5))
    assert [clip.start for clip in clips] == [i / 2 for i in range(7)]
    for clip in clips[:-1]:
        first = round(clip.start * 16)
        assert numbers(clip.frames) == [first + 2 * i for i in range(5)]
    assert numbers(clips[-1].frames) == [48, 50, 52, 54, 56]
    part = list(read_clips(place / "even.mp4", CONFIG, 0.25, 2.0, 0.75))
    assert [clip.start for clip in part] == [0.25, 1.0]


def test_windows_that_overlap_share_their_frames(place, monkeypatch):
    """Each frame is converted once, and only those that a clip takes."""
    seen, picture = [], decode.Source.picture
    monkeypatch.setattr(
        decode.Source, "picture", lambda self, frame: seen.append(frame.pts) or picture(self, frame)
    )
    clips = list(read_clips(place / "even.mp4", CONFIG, every=0.125))
    assert len(clips) == 26 and len(seen) == len(set(seen)) == 30
    for index, clip in enumerate(clips):
        assert numbers(clip.frames) == [2 * (index + i) for i in range(5)]


@pytest.mark.parametrize(
    "start, end, every, said",
    [
        (9.0, None, None, "start must lie inside even.mp4"),
        (2.0, 1.0, None, "0 <= start < end"),
        (0.0, None, 0.0, "every must be at least a frame's 0.125 seconds"),
        (0.0, None, float("nan"), "every must be"),
    ],
)
def test_intervals_that_are_none(place, start, end, every, said):
    with pytest.raises(UsageError, match=said):
        next(read_clips(place / "even.mp4", CONFIG, start, end, every))


def test_a_long_video_is_not_held_in_memory(tmp_path):
    """150 frames of 480 x 640 are 138 MB; what is held of them is small."""
    frames = np.zeros((1, 480, 640, 3), np.uint8)
    write_video(tmp_path / "long.mp4", np.broadcast_to(frames, (150, 480, 640, 3)), 30)
    next(read_clips(tmp_path / "long.mp4", CONFIG))  # decoder, threads and caches
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(list(read_clips(tmp_path / "long.mp4", CONFIG, every=1.0))) == 5
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 50_000  # KiB
