"""The frames of a clip: the nearest in time, from its start to its end, cropped to fit."""

import pytest
import torch
from clips import grey

from engine.config import PipelineConfig
from engine.data.manifest import Clip, read_frames
from engine.errors import UsageError
from engine.media import write_video
from engine.media.clip import fit


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder with two videos of 80 frames, of odd sizes and rates."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "wide.mp4", grey(80, 46, 90), 24)
    write_video(folder / "tall.mp4", grey(80, 98, 34), 30000 / 1001)
    return folder


@pytest.mark.parametrize(
    "name, fps, start, wanted",
    [
        ("wide.mp4", 24, 0.0, [0, 1, 2, 3, 4]),
        ("wide.mp4", 8, 0.0, [0, 3, 6, 9, 12]),
        ("wide.mp4", 8, 1.0, [24, 27, 30, 33, 36]),
        ("wide.mp4", 16, 0.5, [12, 13, 15, 16, 18]),
        ("wide.mp4", 1, 0.0, [0, 24, 48, 72, None]),
        ("tall.mp4", 30, 0.0, [0, 1, 2, 3, 4]),
        ("tall.mp4", 10, 1.001, [30, 33, 36, 39, 42]),
        ("tall.mp4", 12, 0.0, [0, 2, 5, 7, 10]),
        ("tall.mp4", 30, 0.0001, [0, 1, 2, 3, 4]),
        ("wide.mp4", 24, 0.0416667, [1, 2, 3, 4, 5]),
    ],
)
def test_frames_are_the_nearest_in_time(videos, name, fps, start, wanted):
    config = PipelineConfig(num_frames=5, fps=fps, height=32, width=48)
    clip = Clip(1, videos / name, "a", "b", start, 1e6)
    if None in wanted:
        with pytest.raises(UsageError, match="5 frames at 1 a second .* got 4"):
            read_frames(clip, config)
        return
    frames = read_frames(clip, config)
    assert frames.shape == (5, 32, 48, 3) and frames.dtype == torch.uint8
    assert (frames.float().mean((1, 2, 3)) / 3).round().tolist() == wanted


def test_the_end_of_a_clip_is_kept(videos):
    config = PipelineConfig(num_frames=5, fps=8, height=64, width=64)
    assert len(read_frames(Clip(1, videos / "wide.mp4", "a", "b", 1.0, 1.51), config)) == 5
    with pytest.raises(UsageError, match="5 frames at 8 a second .* got 4"):
        read_frames(Clip(1, videos / "wide.mp4", "a", "b", 1.0, 1.5), config)


@pytest.mark.parametrize("rows, columns", [(16, 32), (46, 90), (90, 46), (8, 64), (17, 33)])
def test_fit_covers_and_crops_the_centre(rows, columns):
    """A slope stays a slope with the same value in the middle; nothing is stretched."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    slopes = [255 * y / rows, 255 * x / columns, 0 * x + 200]
    frames = torch.stack(slopes, -1).to(torch.uint8)[None].repeat(2, 1, 1, 1)
    out = fit(frames.numpy(), 16, 32)
    assert out.shape == (2, 16, 32, 3) and torch.equal(out[0], out[1])
    if (rows, columns) == (16, 32):
        assert torch.equal(out, frames)
    scale = max(16 / rows, 32 / columns)
    inner = out[0, 3:-3, 3:-3].float()
    assert (inner[..., 2] == 200).all()
    for axis, (size, extent) in enumerate([(rows, 16), (columns, 32)]):
        slope = inner[..., axis].diff(dim=axis).mean().item()
        assert slope == pytest.approx(255 / (size * scale), rel=0.05)
        middle = out[0].float().narrow(axis, extent // 2 - 1, 2)[..., axis].mean().item()
        assert middle == pytest.approx(127, abs=0.5 * 255 / (size * scale) + 255 / size / 2 + 1)
