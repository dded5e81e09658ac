"""`univigu caption` of files as people have them: phones, long videos, windows, subtitles."""

import json
import shlex
from dataclasses import asdict

import numpy as np
import pytest
from pipeline_folder import build_pipeline_folder
from video_files import from_rgb, write

from engine.cli import main
from engine.config import read_pipeline_config
from engine.media import write_video
from engine.toy.scenes import Scene, render


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    base = tmp_path_factory.mktemp("caption")
    build_pipeline_folder(base / "folder")
    times = [i / 30 for i in range(30)] + [1 + i / 15 for i in range(15)]
    frames = [from_rgb(np.full((48, 80, 3), 5 * i, np.uint8), "yuv444p") for i in range(45)]
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]
    write(base / "phone.mp4", frames, times=times, matrix=turned)
    return base


@pytest.fixture
def caption(places, tmp_path, monkeypatch, capsys):
    """Runs the command on the phone's file -> (exit code, what was printed)."""
    monkeypatch.chdir(tmp_path)

    def caption(words="", video=places / "phone.mp4"):
        line = f"caption --model-path {places / 'folder'} --num-inference-steps 2 --video {video} "
        code = main(shlex.split(line + words))
        printed = capsys.readouterr()
        return code, printed.out if code == 0 else printed.err

    return caption


def read(path):
    return json.loads(path.read_text("utf-8"))["captions"]


def test_a_phones_video_needs_no_flag(caption, places, tmp_path):
    """Rotated, of a variable rate, and longer than the model's clip."""
    folder = read_pipeline_config(places / "folder")
    code, said = caption("--output-path a.json")
    (record,) = read(tmp_path / "a.json")
    assert code == 0 and said.startswith(record["caption"])
    source = record["source"]
    assert source["size"] == [80, 48] and source["codec"] == "h264"
    asked = asdict(folder)
    assert (source["num_frames"], source["fps"]) == (asked["num_frames"], asked["fps"])
    assert record["start"] == 0.0
    assert record["end"] == pytest.approx(folder.num_frames / folder.fps, abs=1e-3)
    turned, fitted, sampled, taken = source["done"]
    assert turned == "turned by 90 degrees clockwise"
    assert fitted == f"48x80 scaled to cover {folder.width}x{folder.height}, cropped"
    assert sampled.endswith(f"frames a second sampled at {folder.fps}")
    assert taken.startswith("0.00 s to ") and taken.endswith(" taken")
    assert f"done to phone.mp4: {'; '.join(source['done'])}" in said.splitlines()
    assert "source" not in record["settings"] and record["settings"]["mode"] == "v2t"


def test_interval_rate_and_frames(caption, tmp_path):
    words = "--start 0.5 --end 1.5 --fps 10 --num-frames 9 --output-path a.json --quiet"
    assert caption(words)[0] == 0
    (record,) = read(tmp_path / "a.json")
    assert (record["start"], record["end"]) == (0.5, 1.4)
    assert (record["source"]["num_frames"], record["source"]["fps"]) == (9, 10)


def test_a_caption_for_each_window(caption, tmp_path):
    code, said = caption("--every 0.5s --num-frames 5 --fps 10 --output-path a.json --quiet")
    records = read(tmp_path / "a.json")
    assert code == 0
    assert [record["start"] for record in records] == [0.0, 0.5, 1.0, 1.5]
    assert [record["end"] for record in records[:3]] == [0.5, 1.0, 1.5]
    assert said.splitlines() == [f"{r['start']:.2f} s: {r['caption']}" for r in records]


def test_forms_of_the_output(caption, tmp_path):
    for suffix in ("jsonl", "srt", "vtt"):
        words = f"--every 1s --num-frames 5 --fps 10 --quiet --output-path {suffix}.{suffix}"
        assert caption(words)[0] == 0
    captions = [record["caption"] for record in read(tmp_path / "srt.json")]
    lines = [json.loads(line) for line in (tmp_path / "jsonl.jsonl").read_text().splitlines()]
    assert [line["caption"] for line in lines] == captions and len(captions) == 2
    assert [line["start"] for line in lines] == [0.0, 1.0]
    first, second, _ = (tmp_path / "srt.srt").read_text().split("\n\n") + [""]
    assert first == f"1\n00:00:00,000 --> 00:00:01,000\n{captions[0]}"
    assert second.startswith("2\n00:00:01,000 --> 00:00:0")
    head, first, _ = (tmp_path / "vtt.vtt").read_text().split("\n\n")
    shown = captions[0].replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert (head, first) == ("WEBVTT", f"00:00:00.000 --> 00:00:01.000\n{shown}")


@pytest.mark.parametrize(
    "words, said",
    [
        ("--every soon", "--every must be a time such as 5s"),
        ("--every 0s", "--every must be a time such as 5s"),
        ("--fps 0", "--fps must be between 1 and 240"),
        ("--num-frames 8", "num_frames must be 4k+1"),
        ("--start 60", "start must lie inside phone.mp4"),
        ("--start 2 --end 1", "0 <= start < end"),
        ("--num-frames 81 --fps 30", "must show 81 frames at 30 a second"),
        ("--output-path a.txt", "must end in .json, .jsonl, .srt or .vtt"),
    ],
)
def test_what_is_no_clip(caption, words, said):
    code, error = caption(words)
    assert code == 2 and said in error


def test_subtitles_are_of_one_video(caption, places):
    both = f"{places / 'phone.mp4'} {places / 'phone.mp4'}"
    code, error = caption("--output-path a.srt", video=both)
    assert code == 2 and "subtitles must be of one video; got 2" in error


def test_the_same_second_at_another_rate_or_size_has_the_same_caption(tmp_path, capsys):
    """The model of the package knows 9 frames of 64 x 64 at 8 a second."""
    (known,) = render([Scene("red", "circle", "moves right", "top left", "white")])
    known = np.asarray(known)
    write_video(tmp_path / "known.mp4", known, 8)
    write_video(tmp_path / "fast.mp4", known.repeat(4, axis=0)[: 4 * 8 + 1], 32)
    big = np.kron(known, np.ones((1, 5, 5, 1), np.uint8))
    wide = np.pad(big, ((0, 0), (0, 0), (120, 120), (0, 0)), mode="edge")
    write_video(tmp_path / "wide.mp4", wide, 8)
    said = set()
    for name in ("known", "fast", "wide"):
        line = f"caption --video {tmp_path / name}.mp4 --num-inference-steps 24 --quiet"
        assert main(shlex.split(line)) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and "red circle" in said.pop()
