"""What a file says about how it is to be seen is honoured, or refused by its name."""

import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from video_files import COLOURS, box, coded, corners, from_rgb, inserted, quarters, write

from engine.errors import ModelFileError
from engine.media import read_video
from engine.media.decode import open_video

ONE = 1 << 16
TURNS = {  # (a, b, c, d) of a display matrix: what is shown of a picture, and in words
    "upright": ((1, 0, 0, 1), lambda f: f, []),
    "90": ((0, 1, -1, 0), lambda f: np.rot90(f, -1), ["turned by 90 degrees clockwise"]),
    "180": ((-1, 0, 0, -1), lambda f: f[::-1, ::-1], ["turned by 180 degrees clockwise"]),
    "270": ((0, -1, 1, 0), lambda f: np.rot90(f), ["turned by 270 degrees clockwise"]),
    "mirror": ((-1, 0, 0, 1), lambda f: f[:, ::-1], ["mirrored"]),
    "flip": ((1, 0, 0, -1), lambda f: f[::-1], ["mirrored", "turned by 180 degrees clockwise"]),
    "transpose": (
        (0, 1, 1, 0),
        lambda f: f.swapaxes(0, 1),
        ["mirrored", "turned by 270 degrees clockwise"],
    ),
    "transverse": (
        (0, -1, -1, 0),
        lambda f: f[::-1, ::-1].swapaxes(0, 1),
        ["mirrored", "turned by 90 degrees clockwise"],
    ),
}


def matrix_of(a, b, c, d):
    return [round(x * ONE) for x in (a, b, 0, c, d, 0, 0, 0)] + [1 << 30]


def plain(picture=None, pixels="yuv444p", count=4):
    picture = quarters() if picture is None else picture
    return [from_rgb(picture, pixels) for _ in range(count)]


def seen(path):
    """(the second picture, what was done to it)."""
    with open_video(path) as source:
        frames = source.frames()
        next(frames)
        picture = source.picture(next(frames)[1])
        return picture, source.done


FORMS = [  # suffix, codec, pixel format, largest error of a colour
    (".mp4", "libx264", "yuv444p", 2),
    (".mp4", "libx265", "yuv444p", 2),
    (".mp4", "libsvtav1", "yuv420p", 6),
    (".mp4", "mpeg4", "yuv420p", 6),
    (".mov", "libx264", "yuv420p", 2),
    (".mov", "prores_ks", "yuv422p10le", 4),
    (".mov", "qtrle", "rgb24", 0),
    (".mov", "png", "rgb24", 0),
    (".mov", "mjpeg", "yuvj444p", 4),
    (".mkv", "libx264", "yuv420p", 2),
    (".mkv", "ffv1", "yuv444p", 2),
    (".mkv", "libx265", "yuv420p", 2),
    (".webm", "libvpx-vp9", "yuv420p", 2),
    (".webm", "libvpx", "yuv420p", 6),
    (".avi", "libx264", "yuv420p", 2),
    (".avi", "mpeg4", "yuv420p", 6),
    (".ts", "libx264", "yuv420p", 2),
    (".flv", "libx264", "yuv420p", 2),
    (".gif", "gif", "rgb8", 60),
]


@pytest.mark.parametrize("suffix, codec, pixels, error", FORMS)
def test_containers_and_codecs(tmp_path, suffix, codec, pixels, error):
    """Frames in their order, at their rate, in their colours."""
    pictures = [quarters(np.roll(COLOURS, i, axis=0)) for i in range(4)]
    path = tmp_path / f"clip{suffix}"
    frames = [from_rgb(picture, pixels) for picture in pictures]
    video = read_video(write(path, [*frames, *frames, *frames], codec))
    assert video.frames.shape == (12, 48, 64, 3)
    assert video.fps == pytest.approx(8, rel=0.02)
    for shown, picture in zip(video.frames, pictures * 3, strict=True):
        assert np.abs(corners(shown) - corners(picture)).max() <= error


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_the_whole_display_matrix(tmp_path, suffix, turn):
    numbers, expected, said = TURNS[turn]
    path = write(tmp_path / f"clip{suffix}", plain(), matrix=matrix_of(*numbers))
    shown, done = seen(path)
    wanted = expected(quarters())
    assert shown.shape == wanted.shape and done == said
    assert np.abs(corners(shown) - corners(wanted)).max() <= 2


def test_an_oblique_angle_is_refused(tmp_path):
    half = 0.5**0.5
    path = write(tmp_path / "clip.mp4", plain(), matrix=matrix_of(half, half, -half, half))
    with pytest.raises(ModelFileError, match="turned by 45.0 degrees"):
        read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("aspect, width", [("4/3", 85), ("1/2", 32), ("40/33", 78)])
def test_pixels_are_made_square(tmp_path, suffix, aspect, width):
    path = write(tmp_path / f"clip{suffix}", plain(), aspect=Fraction(aspect))
    shown, (said,) = seen(path)
    assert shown.shape == (48, width, 3) and said.startswith(
        f"pixels of {aspect.replace('/', ':')}"
    )
    assert np.abs(corners(shown) - corners(quarters())).max() <= 2


def test_aspect_is_of_the_picture_before_its_turn(tmp_path):
    tags = {"matrix": matrix_of(0, 1, -1, 0), "aspect": Fraction(3, 2)}
    assert seen(write(tmp_path / "clip.mp4", plain(), **tags))[0].shape == (96, 48, 3)


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 5, 7, 9])
def test_matrix_and_range(tmp_path, matrix, full, bits):
    frames = [coded(quarters() / 255, matrix, full, bits) for _ in range(3)]
    tags = {"colorspace": matrix, "color_range": 2 if full else 1}
    shown, done = seen(write(tmp_path / "clip.mp4", frames, **tags))
    assert np.abs(corners(shown) - COLOURS).max() <= 1 + (bits == 10) and done == []


# Linear BT.709 to linear primaries, rows of red, green and blue, from ITU-R BT.2087 and others.
BT2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
P3 = [[0.8225, 0.1774, 0.0], [0.0332, 0.9669, 0.0], [0.0171, 0.0724, 0.9108]]


def pq(light):
    """SMPTE ST 2084, of light with 203 nits as 1."""
    power = (light * 203 / 10000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


def hlg(light):
    """ARIB STD-B67 with the system gamma 1.2 of a display of 1000 nits."""
    light = light * 203 / 1000
    luminance = light @ (0.2627, 0.6780, 0.0593)
    scene = light * np.maximum(luminance, 1e-9)[..., None] ** (1 / 1.2 - 1)
    dark = np.sqrt(3 * np.minimum(scene, 1 / 12))
    bright = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, dark, bright)


def gamma(light):
    return light ** (1 / 2.2)


@pytest.mark.parametrize(
    "suffix, codec, bits, error",
    [(".mp4", "libx264", 10, 3), (".mkv", "libx265", 10, 3), (".webm", "libvpx-vp9", 8, 14)],
)
@pytest.mark.parametrize(
    "primaries, to, transfer, curve, said",
    [
        (9, BT2020, 16, pq, ["BT.2020 primaries to BT.709", "PQ to SDR"]),
        (9, BT2020, 18, hlg, ["BT.2020 primaries to BT.709", "HLG to SDR"]),
        (9, BT2020, 14, gamma, ["BT.2020 primaries to BT.709"]),
        (12, P3, 13, gamma, ["Display P3 primaries to BT.709"]),
    ],
)
def test_transfer_and_primaries(
    tmp_path, suffix, codec, bits, error, primaries, to, transfer, curve, said
):
    light = (quarters() / 255) ** 2.2 @ np.array(to).T
    frames = [coded(curve(light), 9, bits=bits) for _ in range(3)]
    tags = {"colorspace": 9, "color_range": 1}
    tags |= {"color_primaries": primaries, "color_trc": transfer}
    shown, done = seen(write(tmp_path / f"clip{suffix}", frames, codec, **tags))
    assert np.abs(corners(shown) - COLOURS).max() <= error
    assert [line.partition(",")[0] for line in done] == said


def test_light_above_white_is_white(tmp_path):
    light = np.full((48, 64, 3), 4.0)
    tags = {"colorspace": 9, "color_primaries": 9, "color_trc": 16, "color_range": 1}
    frames = [coded(pq(light), 9, bits=10) for _ in range(3)]
    assert (seen(write(tmp_path / "clip.mp4", frames, **tags))[0] == 255).all()


@pytest.mark.parametrize(
    "suffix, codec, pixels",
    [
        (".webm", "libvpx-vp9", "yuva420p"),
        (".mov", "qtrle", "argb"),
        (".mov", "png", "rgba"),
        (".mov", "prores_ks", "yuva444p10le"),
        (".mkv", "ffv1", "yuva444p"),
    ],
)
def test_transparent_pixels_lie_over_black(tmp_path, suffix, codec, pixels):
    colours = [(*COLOURS[0], 255), (*COLOURS[1], 0), (*COLOURS[2], 128), (*COLOURS[3], 255)]
    path = write(tmp_path / f"clip{suffix}", plain(quarters(colours), pixels), codec)
    shown, done = seen(path)
    wanted = [COLOURS[0], (0, 0, 0), np.array(COLOURS[2]) * 128 / 255, COLOURS[3]]
    assert np.abs(corners(shown) - wanted).max() <= 5
    assert done == ["transparent pixels over black"]


def test_a_gif_with_holes(tmp_path):
    from PIL import Image

    picture = Image.fromarray(quarters()).quantize(4)
    hole = picture.getpixel((60, 5))
    frames = [picture, picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    options = {"transparency": hole, "disposal": 2, "duration": 120, "optimize": False}
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], **options)
    video = read_video(tmp_path / "clip.gif")
    assert (video.frames[0, 5, 60] == 0).all() and (video.frames[1, 40, 60] == 0).all()


REFUSED = [  # tags of the codec's context, options, what is named
    ({}, {"x264-params": "colormatrix=YCgCo"}, "colour matrix of .* is YCgCo"),
    ({"color_primaries": 8}, {}, "colour primaries of .* is film"),
    ({"color_trc": 8}, {}, "colour transfer of .* is linear"),
    ({"color_trc": 9}, {}, "colour transfer of .* is log"),
    ({}, {"x264-params": "frame-packing=3"}, "two views side by side"),
    ({}, {"x264-params": "frame-packing=4"}, "two views above each other"),
]


@pytest.mark.parametrize("tags, options, said", REFUSED)
def test_refused_by_name(tmp_path, tags, options, said):
    path = write(tmp_path / "clip.mp4", plain(), options=options, **tags)
    with pytest.raises(ModelFileError, match=said):
        read_video(path)


def test_a_spherical_view_is_refused(tmp_path):
    data = write(tmp_path / "clip.mp4", plain()).read_bytes()
    head = box(b"svhd", bytes(4), b"a camera\0")
    projection = box(b"proj", box(b"prhd", bytes(16)), box(b"equi", bytes(20)))
    parents = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"]
    whole = inserted(data, parents, box(b"sv3d", head, projection))
    (tmp_path / "round.mp4").write_bytes(whole)
    with pytest.raises(ModelFileError, match="a spherical view"):
        read_video(tmp_path / "round.mp4")


def grey(count):
    """Frames whose level is 10 i."""
    return [from_rgb(np.full((48, 64, 3), 10 * i, np.uint8), "yuv444p") for i in range(count)]


def levels(video):
    return (video.frames.mean((1, 2, 3)) / 10).round().astype(int).tolist()


def test_an_edit_list_is_honoured(tmp_path):
    """The list begins half a second into the track."""
    data = bytearray(write(tmp_path / "clip.mp4", grey(12)).read_bytes())
    at = data.index(b"elst") + 8
    count, duration, begin = struct.unpack(">3I", data[at : at + 12])
    scale = struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    assert count == 1
    data[at + 8 : at + 12] = struct.pack(">I", begin + scale // 2)
    (tmp_path / "cut.mp4").write_bytes(data)
    assert levels(read_video(tmp_path / "clip.mp4")) == list(range(12))
    assert levels(read_video(tmp_path / "cut.mp4")) == list(range(4, 12))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".mov"])
def test_a_late_start_counts_from_the_first_frame(tmp_path, suffix):
    times = [5 + i / 8 for i in range(6)]
    path = write(tmp_path / f"clip{suffix}", grey(6), times=times)
    assert levels(read_video(path, 0.125, 0.3)) == [1, 2]


def test_a_fragmented_file(tmp_path):
    path = write(tmp_path / "clip.mp4", grey(6), movflags="frag_keyframe+empty_moov")
    video = read_video(path)
    assert levels(video) == list(range(6)) and video.fps == pytest.approx(8)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_the_rate_is_of_the_frames_own_times(tmp_path, suffix):
    times = [i / 30 for i in range(6)] + [0.3 + i / 5 for i in range(4)]
    video = read_video(write(tmp_path / f"clip{suffix}", grey(10), times=times))
    assert video.fps == pytest.approx(9 / 0.9, rel=2e-3)
    assert levels(read_video(tmp_path / f"clip{suffix}", 0.29, 0.6)) == [6, 7]


def test_a_recording_without_durations(tmp_path):
    """As browsers write it: remuxed, the track says nothing of a frame's duration."""
    times = [round(t, 3) for t in np.cumsum([0.03, 0.02, 0.05, 0.04, 0.045, 0.021])]
    frames = [from_rgb(np.full((48, 64, 3), 40 * i, np.uint8), "yuv420p") for i in range(6)]
    write(tmp_path / "timed.webm", frames, "libvpx-vp9", times=times)
    with av.open(str(tmp_path / "timed.webm")) as source:
        with av.open(str(tmp_path / "clip.webm"), "w") as out:
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    assert read_video(tmp_path / "clip.webm").fps == pytest.approx(
        5 / (times[-1] - times[0]), rel=0.01
    )
