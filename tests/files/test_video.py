import json
import struct
import subprocess
import sys
import wave
from fractions import Fraction

import numpy as np
import pytest
from video_files import moving

from engine.errors import MissingPackage, ModelFileError, UsageError
from engine.media import read_video, write_sidecar, write_video

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")


def solid(colours, height=48, width=64):
    """[N, H, W, 3]: one colour per frame, so that chroma subsampling loses nothing."""
    colours = np.asarray(colours, np.uint8)[:, None, None, :]
    return np.ascontiguousarray(np.broadcast_to(colours, (len(colours), height, width, 3)))


def save(path, frames, fps, container, codec="libx264"):
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for rgb in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        out.mux(stream.encode())
    return path


def left_over(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("fps", [8, 16, 30000 / 1001])
def test_mp4_keeps_frames_size_rate_and_colour(tmp_path, count, fps):
    rng = np.random.default_rng(count)
    frames = solid([(255, 255, 255), (0, 0, 0), *rng.integers(0, 256, (count, 3))][:count])
    write_video(tmp_path / "clip.mp4", frames, fps)
    video = read_video(tmp_path / "clip.mp4")
    assert video.frames.shape == frames.shape and video.frames.dtype == np.uint8
    assert video.fps == pytest.approx(fps, rel=1e-4)
    error = video.frames.astype(int) - frames
    assert np.abs(error).max() <= 2 and abs(error.mean()) < 0.4
    assert left_over(tmp_path) == []


def test_mp4_is_tagged_and_can_be_streamed(tmp_path):
    path = tmp_path / "clip.mp4"
    write_video(path, moving())
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)


def test_equal_frames_give_equal_files(tmp_path):
    """x264 says in the file how it was set. With mbtree equal frames may differ."""
    frames, files = moving(), set()
    rng = np.random.default_rng(0)
    for _ in range(5):
        used = [np.full(rng.integers(4000, 40000), 255, np.uint8) for _ in range(200)]
        del used
        write_video(tmp_path / "clip.mp4", frames)
        files.add((tmp_path / "clip.mp4").read_bytes())
    (data,) = files
    assert b"mbtree=0" in data


def test_mp4_follows_the_picture(tmp_path):
    frames = moving(colours=2)
    write_video(tmp_path / "clip.mp4", frames[:, :, ::-1])  # a view with a negative stride
    shown = read_video(tmp_path / "clip.mp4").frames.astype(float)
    against = [np.abs(shown[8] - other).mean() for other in frames[:, :, ::-1].astype(float)]
    assert int(np.argmin(against)) == 8


@pytest.mark.parametrize("fps", [8, 16, 24, 50])
def test_gif_is_exact_for_few_colours_and_keeps_equal_frames(tmp_path, fps):
    frames = moving()
    write_video(tmp_path / "clip.gif", frames, fps)
    video = read_video(tmp_path / "clip.gif")
    np.testing.assert_array_equal(video.frames, frames)
    assert video.fps == pytest.approx(fps, rel=0.02)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.n_frames == len(frames) and image.info["loop"] == 0
        delays = []
        for index in range(image.n_frames):
            image.seek(index)
            delays.append(image.info["duration"])
    assert sum(delays[:-1]) == pytest.approx(1000 * (len(frames) - 1) / fps, abs=10)


def test_gif_of_many_colours_stays_close(tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    frames = np.stack(
        [np.stack(np.broadcast_arrays(ramp, ramp[:48, None], i * 9), -1) for i in range(5)]
    )
    write_video(tmp_path / "clip.gif", frames.astype(np.uint8))
    error = read_video(tmp_path / "clip.gif").frames.astype(float) - frames
    assert np.abs(error).mean() < 8 and abs(error.mean()) < 1


def test_single_frame_gif(tmp_path):
    write_video(tmp_path / "clip.gif", moving(count=1))
    np.testing.assert_array_equal(read_video(tmp_path / "clip.gif").frames, moving(count=1))


@pytest.mark.parametrize("container", ["matroska", "avi", "mpegts", "mov"])
def test_reads_other_containers(tmp_path, container):
    path = save(tmp_path / "clip.bin", moving(), Fraction(24), container)
    video = read_video(path)
    assert video.frames.shape == (17, 24, 32, 3) and video.fps == pytest.approx(24, rel=1e-3)


def test_interval_is_half_open_and_counts_from_the_first_frame(tmp_path):
    frames = solid([(10 * i, 10 * i, 10 * i) for i in range(20)])
    write_video(tmp_path / "clip.mp4", frames, 10)
    part = read_video(tmp_path / "clip.mp4", start=0.5, end=0.8)
    assert part.frames.mean((1, 2, 3)) == pytest.approx([50, 60, 70], abs=1.5)
    assert len(read_video(tmp_path / "clip.mp4", start=1.85).frames) == 1
    assert len(read_video(tmp_path / "clip.mp4", end=99, max_frames=20).frames) == 20


def test_too_many_frames_are_refused_not_cut(tmp_path):
    write_video(tmp_path / "clip.mp4", moving())
    with pytest.raises(UsageError, match="at most 16 frames .* got more than 16"):
        read_video(tmp_path / "clip.mp4", max_frames=16)
    assert len(read_video(tmp_path / "clip.mp4", end=1, max_frames=16).frames) == 16


@pytest.mark.parametrize("start, end", [(-1, None), (2, 1), (1, 1), (float("nan"), None)])
def test_impossible_interval(tmp_path, start, end):
    with pytest.raises(UsageError, match="0 <= start < end"):
        read_video(tmp_path / "clip.mp4", start, end)


def test_start_after_the_end_of_the_video(tmp_path):
    write_video(tmp_path / "clip.mp4", moving())
    with pytest.raises(UsageError, match="start must lie inside clip.mp4"):
        read_video(tmp_path / "clip.mp4", start=60)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_portrait_video_is_turned_upright(tmp_path, turns):
    """The display matrix of the track header holds cos, sin, -sin, cos of a clockwise turn."""
    frames = solid([(200, 30, 30)])
    frames[:, :24, :32] = (20, 20, 220)
    write_video(tmp_path / "clip.mp4", frames)
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    at = data.index(b"tkhd") + 44
    assert struct.unpack(">9i", data[at : at + 36])[:5] == (65536, 0, 0, 0, 65536)
    turned = [v << 16 for v in (cos, sin, 0, -sin, cos, 0, 0, 0)] + [1 << 30]
    data[at : at + 36] = struct.pack(">9i", *turned)
    (tmp_path / "turned.mp4").write_bytes(data)
    shown = read_video(tmp_path / "turned.mp4").frames.astype(int)
    expected = np.rot90(frames, -turns, axes=(1, 2))
    assert shown.shape == expected.shape and np.abs(shown - expected).mean() < 3


def text_file(path):
    path.write_text("a text file is not a video\n" * 200)


def sound(path):
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 8000, 0, "NONE", ""))
        out.writeframes(bytes(16000))


def sound_in_mp4(path):
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def playlist(path):
    path.write_text("#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/clip.ts\n#EXT-X-ENDLIST\n")


def gif_without_frames(path, width=16, height=16):
    path.write_bytes(b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";")


def half_an_mp4(path):
    write_video(path.with_suffix(".mp4"), moving())
    data = path.with_suffix(".mp4").read_bytes()
    path.write_bytes(data[: len(data) * 7 // 10])


def picture(path):
    Image.fromarray(moving(1)[0]).save(path, format="PNG")


def nothing(path):
    path.touch()


@pytest.mark.parametrize(
    "make",
    [text_file, sound, sound_in_mp4, playlist, gif_without_frames, half_an_mp4, picture, nothing],
)
def test_not_a_video(tmp_path, make):
    make(tmp_path / "clip.txt")
    with pytest.raises(ModelFileError, match="must be a video file") as caught:
        read_video(tmp_path / "clip.txt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.mp4", "folder", "http:example", "concat:a|b"])
def test_absent_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelFileError, match="path must be a file"):
        read_video(name)


def test_a_protocol_as_a_file_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video("concat:clip.gif", moving())
    assert len(read_video("concat:clip.gif").frames) == 17


def test_concealed_damage_is_refused(tmp_path):
    """FFmpeg paints over a hole in the picture data and only marks the frame."""
    source = save(tmp_path / "clip.mp4", moving(), 16, "mp4").read_bytes()
    said = []
    for at in range(source.index(b"mdat") + 700, len(source), 100):
        (tmp_path / "hole.mp4").write_bytes(source[:at] + bytes(8) + source[at + 8 :])
        try:
            read_video(tmp_path / "hole.mp4")
        except ModelFileError as error:
            said.append(str(error))
    assert any("got a damaged frame" in error for error in said)


def test_wide_headers_are_refused_before_decoding(tmp_path):
    gif_without_frames(tmp_path / "wide.gif", width=8200, height=2)
    with pytest.raises(UsageError, match="at most 8192 pixels; got 8200x2"):
        read_video(tmp_path / "wide.gif")
    with pytest.raises(UsageError, match="at most 8192 pixels"):
        write_video(tmp_path / "wide.mp4", np.zeros((1, 2, 8194, 3), np.uint8))


@pytest.mark.parametrize("container", ["mp4", "matroska", "gif"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, container):
    source = tmp_path / "clip.gif"
    if container == "gif":
        write_video(source, moving())
    else:
        save(source, moving(), 16, container)
    data, rng, refused = source.read_bytes(), np.random.default_rng(5), 0
    for _ in range(60):
        mutant = bytearray(data[: int(rng.integers(len(data) // 3, len(data) + 1))])
        for at in rng.integers(0, len(mutant), int(rng.integers(1, 12))):
            mutant[at] = int(rng.integers(0, 256))
        (tmp_path / "mutant").write_bytes(mutant)
        try:
            video = read_video(tmp_path / "mutant")
        except (ModelFileError, UsageError):
            refused += 1
        else:
            assert video.frames.ndim == 4 and len(video.frames) and video.fps > 0
    assert refused >= 5


@pytest.mark.parametrize(
    "shape, said",
    [
        ((1, 47, 64, 3), "64x47. Crop to 64x46, pad to 64x48"),
        ((1, 48, 63, 3), "63x48. Crop to 62x48, pad to 64x48"),
        ((1, 47, 63, 3), "63x47. Crop to 62x46, pad to 64x48"),
    ],
)
def test_odd_sizes_are_refused_with_the_nearest_even_ones(tmp_path, shape, said):
    with pytest.raises(UsageError) as caught:
        write_video(tmp_path / "clip.mp4", np.zeros(shape, np.uint8))
    assert said in str(caught.value) and list(tmp_path.iterdir()) == []
    write_video(tmp_path / "clip.gif", np.zeros(shape, np.uint8))
    assert read_video(tmp_path / "clip.gif").frames.shape == shape


@pytest.mark.parametrize(
    "name, frames, fps, said",
    [
        ("clip.webm", moving(1), 16, r"end in \.mp4 or \.gif; got 'clip\.webm'"),
        ("clip", moving(1), 16, r"end in \.mp4 or \.gif"),
        ("clip.mp4", moving(1)[0], 16, r"got uint8 \(24, 32, 3\)"),
        ("clip.mp4", moving(1).astype(np.float32), 16, "got float32"),
        ("clip.mp4", moving(1)[:0], 16, "non-empty"),
        ("clip.mp4", moving(1).tolist(), 16, "got list"),
        ("clip.mp4", moving(1), 0, "fps must be between"),
        ("clip.mp4", moving(1), float("nan"), "fps must be between"),
        ("clip.gif", moving(1), 60, "at most 50 for gif; got 60"),
        ("absent/clip.mp4", moving(1), 16, "folder of .* must exist"),
    ],
)
def test_write_rules(tmp_path, name, frames, fps, said):
    with pytest.raises(UsageError, match=said):
        write_video(tmp_path / name, frames, fps)
    assert list(tmp_path.iterdir()) == []


class Breaks(np.ndarray):
    """Frames that fail after the first."""

    def __iter__(self):
        yield np.asarray(self[0])
        raise RuntimeError("the disk is on fire")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, suffix):
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="on fire"):
        write_video(path, moving().view(Breaks))
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_importing_the_module_loads_no_video_package():
    code = "import sys, engine.media.video; sys.exit(bool({'av', 'PIL'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_sidecar(tmp_path):
    record = {
        "prompt": "a café",
        "seed": 3,
        "timings": {"total": 1.5},
        "caption": None,
        "ok": [True],
    }
    path = write_sidecar(tmp_path / "clip.mp4", record)
    assert path == tmp_path / "clip.json"
    assert json.loads(path.read_text("utf-8")) == record and "café" in path.read_text("utf-8")
    for value in (np.float32("nan"), float("nan"), {"deep": [object()]}, "\ud800", b"bytes"):
        with pytest.raises(UsageError, match="sidecar: 'bad' must be plain JSON"):
            write_sidecar(tmp_path / "clip.mp4", {"seed": 4, "bad": value})
    assert json.loads(path.read_text("utf-8")) == record and left_over(tmp_path) == []

    numbers = {"seed": np.int64(4), "scale": np.float32(0.5)}
    path = write_sidecar(tmp_path / "clip.mp4", numbers)
    assert json.loads(path.read_text("utf-8")) == {"seed": 4, "scale": 0.5}


@pytest.mark.parametrize("package", ["av", "PIL"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.Image", None)
    with pytest.raises(MissingPackage, match=rf"{package} must be installed.*extra `video`"):
        write_video(tmp_path / "clip.gif", moving(1))
    assert list(tmp_path.iterdir()) == []
