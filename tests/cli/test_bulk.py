"""caption-dataset and generate-dataset: rows, resume after kills, refusals, full disks."""

import json
import random
import subprocess
import sys
from pathlib import Path

import bulk_runs
import numpy as np
import pytest

from engine.media import read_clips, read_video, write_video
from engine.pipeline import Pipeline
from engine.toy import draw_scenes, render


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Twelve clips of 9 to 27 frames, every fourth of 5, and two files that are no videos."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for i, frames in enumerate(render(draw_scenes(12, 0, held_out=True))):
        frames = frames[:5] if i % 4 == 3 else np.concatenate([frames] * (1 + i % 3))
        write_video(folder / "sub" / f"{i:02d}.mp4", frames, 8)
    (folder / "bad.mp4").write_text("no video")
    (folder / "zero.mkv").write_bytes(b"")
    return folder


@pytest.fixture
def line(places, videos):
    common = f"caption-dataset --model-path {places['folder']} --num-inference-steps 2 --quiet "
    return f"{common} --batch-size 2 --input {videos} --output-path "


def rows_of(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()]


def children(line: str, folder: Path, runs: list[dict], parts: str = "out.jsonl.parts"):
    """What `bulk_runs` says of each run of the command."""
    asked = {"line": line.split(), "runs": runs, "parts": str(folder / parts)}
    command = [sys.executable, bulk_runs.__file__, json.dumps(asked)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(text) for text in done.stdout.splitlines()]


def test_every_clip_and_every_bad_file_is_a_row_in_order(run, line, videos, tmp_path):
    code, out, _ = run(line.replace("--quiet", "") + "out.jsonl --every 1s")
    rows = rows_of(tmp_path / "out.jsonl")
    assert code == 0 and out.splitlines()[-1] == f"{len(rows)} rows, 2 of them errors"

    names = list(dict.fromkeys(row["video"] for row in rows))
    assert names == ["bad.mp4", *(f"sub/{i:02d}.mp4" for i in range(12)), "zero.mkv"]
    assert {row["video"] for row in rows if row["error"]} == {"bad.mp4", "zero.mkv"}
    assert all((row["caption"] is None) == bool(row["error"]) for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    windows = [(row["start"], row["num_frames"]) for row in rows if row["video"] == "sub/02.mp4"]
    assert windows == [(0.0, 9), (1.0, 9), (2.0, 9)]

    said = json.loads((tmp_path / "out.json").read_text())
    assert (said["rows"], said["errors"]) == (len(rows), 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.jsonl"]


def test_a_row_is_what_the_pipeline_says_of_its_clip(run, line, places, videos, tmp_path):
    """Under the row's seed, alone, in a batch of one."""
    assert run(line + "out.jsonl --batch-size 1")[0] == 0
    row = rows_of(tmp_path / "out.jsonl")[1]
    pipe = Pipeline.from_pretrained(places["folder"])
    clip = next(read_clips(videos / row["video"], pipe.config))
    alone = pipe.caption(clip, seed=row["seed"], num_inference_steps=2, progress=False)
    assert row["caption"] == alone.caption


def test_decoding_ahead_changes_nothing(run, line, tmp_path):
    for name, words in (("a", ""), ("b", "--decoders 0"), ("c", "--decoders 1")):
        assert run(f"{line} {name}.jsonl {words}")[0] == 0
    whole = (tmp_path / "a.jsonl").read_bytes()
    assert whole == (tmp_path / "b.jsonl").read_bytes() == (tmp_path / "c.jsonl").read_bytes()


@pytest.fixture(scope="module")
def whole(places, videos, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """The files that a run of `kill_line` leaves, and how many seconds it takes here."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (alone,) = children(kill_line(places, videos), folder, [{}])
    assert alone["code"] == 0
    return {path.name: path.read_bytes() for path in folder.iterdir()}, alone["seconds"]


@pytest.fixture
def undisturbed(whole) -> dict[str, bytes]:
    return whole[0]


def kill_line(places, videos) -> str:
    line = f"caption-dataset --model-path {places['folder']} --num-inference-steps 2 --quiet "
    return f"{line} --batch-size 1 --every 1s --input {videos} --output-path out.jsonl"


def test_ten_kills_change_no_byte(places, videos, whole, tmp_path):
    """Five come while the model is loaded or at work, five soon after a part was written. A part
    that is there is neither lost nor written again."""
    (undisturbed, seconds), dice = whole, random.Random(0)
    runs = [{"kill": dice.uniform(0, 0.4 * seconds)} for _ in range(5)]
    runs += [{"kill": dice.uniform(0, 0.04 * seconds), "more": 1} for _ in range(5)]
    dice.shuffle(runs)
    done = children(kill_line(places, videos), tmp_path, [*runs, {}])
    *deaths, last = [one["code"] for one in done]
    assert last == 0 and deaths.count(-9) >= 8

    kept = [one["parts"].items() for one in done if one["code"] == -9]
    assert all(before <= after for before, after in zip(kept, kept[1:], strict=False))
    assert len(set(map(len, kept))) > 3
    left = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: left[name] for name in left if not name.endswith(".partial")} == undisturbed


def test_a_full_disk_ends_the_run_and_loses_nothing(places, videos, undisturbed, tmp_path):
    """At the settings, at a part, at the file of all rows. Then the parts that are there are
    refused to a run of other settings."""
    runs = [{"limit": bytes} for bytes in (100, 700, 2500)]
    runs += [{"words": ["--num-inference-steps", "3"]}, {}]
    done = children(kill_line(places, videos), tmp_path, runs)
    assert [one["code"] for one in done] == [4, 4, 4, 2, 0]
    assert not done[0]["parts"] and len(done[2]["parts"]) > 20
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == undisturbed


def test_an_output_of_other_settings_is_refused_by_name(run, line, videos, tmp_path):
    assert run(line + "out.jsonl")[0] == 0
    before = (tmp_path / "out.jsonl").read_bytes()
    code, out, _ = run(line + "out.jsonl")
    assert code == 0 and out.splitlines() == ["out.jsonl"]
    for words, name in (
        ("--seed 5", "seed was 0 and is 5"),
        ("--batch-size 3", "batch_size was 2 and is 3"),
        ("--num-frames 5", "num_frames was None and is 5"),
        (f"--input {videos / 'sub'}", "input was '14 items"),
    ):
        code, _, err = run(f"{line} out.jsonl {words}")
        assert code == 2 and name in err
    assert (tmp_path / "out.jsonl").read_bytes() == before

    (tmp_path / "mine.jsonl").write_text("{}")
    code, _, err = run(line + "mine.jsonl")
    assert code == 2 and "without its settings" in err
    assert (tmp_path / "mine.jsonl").read_text() == "{}"


def test_a_list_gives_paths_and_intervals(run, line, videos, tmp_path):
    lines = [
        {"video": str(videos / "sub" / "02.mp4"), "start": 1.0, "end": 2.7},
        {"video": str(videos / "sub" / "02.mp4"), "start": 2.0, "end": 1.0},
        {"video": "missing.mp4"},
        {"video": ""},
        7,
    ]
    text = "".join(json.dumps(one) + "\n" for one in lines) + "not json\n"
    (tmp_path / "list.jsonl").write_text(text)
    assert run(f"{line} out.jsonl --input list.jsonl --every 0.5s --num-frames 5")[0] == 0

    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["start"] for row in rows if not row["error"]] == [1.0, 1.5, 2.0]
    errors = [row["error"] for row in rows if row["error"]]
    for error, said in zip(
        errors,
        ("0 <= start < end", "must be a file", "not empty", "JSON object", "JSON in UTF-8"),
        strict=True,
    ):
        assert said in error


def test_parquet_has_the_same_rows(run, line, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run(line + "a.jsonl")[0] == 0 and run(line + "b.parquet")[0] == 0
    table = parquet.read_table(tmp_path / "b.parquet")
    assert table.to_pylist() == rows_of(tmp_path / "a.jsonl")

    code, _, err = run(f"{line} c.jsonl --input b.parquet")
    videos = [row["video"] for row in rows_of(tmp_path / "c.jsonl")]
    assert code == 0, err
    assert videos == table["video"].to_pylist()


def test_prompts_become_videos_and_a_manifest(run, places, tmp_path):
    """One that is too long and one that is no prompt are rows with errors; a prompt that comes
    twice gives two videos."""
    prompts = ["a red circle", "a red circle", "a blue square " * 40, 3]
    text = "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    (tmp_path / "p.jsonl").write_text(text)
    line = f"generate-dataset --model-path {places['folder']} --num-inference-steps 2 --quiet "
    line += "--mode t2vt --num-frames 5 --height 32 --width 32 --input p.jsonl --output-path "
    assert run(line + "a")[0] == 0
    rows = rows_of(tmp_path / "a" / "manifest.jsonl")
    assert [row["error"] is None for row in rows] == [True, True, False, False]
    assert rows[0]["id"] != rows[1]["id"] and rows[0]["seed"] != rows[1]["seed"]
    assert "at most" in rows[2]["error"] and rows[3]["prompt"] == ""

    frames = [read_video(tmp_path / "a" / row["video"]).frames for row in rows[:2]]
    assert frames[0].shape == (5, 32, 32, 3) and (frames[0] != frames[1]).any()
    sidecar = json.loads((tmp_path / "a" / rows[0]["video"]).with_suffix(".json").read_text())
    assert sidecar["caption"] == rows[0]["caption"] and sidecar["seed"] == rows[0]["seed"]

    done = children(line + "b", tmp_path, [{"kill": 0.1, "more": 1}, {}], "b/manifest.jsonl.parts")
    assert done[-1]["code"] == 0
    again = (tmp_path / "b" / "manifest.jsonl").read_bytes()
    assert again == (tmp_path / "a" / "manifest.jsonl").read_bytes()
    for row, frame in zip(rows[:2], frames, strict=True):
        assert np.array_equal(read_video(tmp_path / "b" / row["video"]).frames, frame)


@pytest.mark.parametrize(
    "words",
    [
        "--num-inference-steps 2 --solver euler --mode t2vt --text-steps 4",
        "--sigmas 1.0 0.6 --flow-shift 2",
        "--timesteps 900 400 --solver lcm",
    ],
)
def test_the_steps_of_a_dataset_are_those_of_a_video(run, places, tmp_path, words):
    """And a run that goes on is known by them."""
    (tmp_path / "p.txt").write_text("a red circle\n")
    common = f"--model-path {places['folder']} {words} --num-frames 5 --height 32 --width 32 "
    line = f"generate-dataset {common} --quiet --input p.txt --output-path a "
    assert run(line)[0] == 0
    (row,) = rows_of(tmp_path / "a" / "manifest.jsonl")
    alone = f"generate {common} --prompt 'a red circle' --seed {row['seed']} --quiet"
    assert run(alone + " --output-path alone.mp4")[0] == 0
    clips = tmp_path / "a" / row["video"], tmp_path / "alone.mp4"
    assert np.array_equal(*(read_video(path).frames for path in clips))
    said = [json.loads(path.with_suffix(".json").read_text())["settings"] for path in clips]
    names = "solver flow_shift sigmas timesteps text_steps num_inference_steps".split()
    assert [said[0].get(name) for name in names] == [said[1].get(name) for name in names]

    assert run(line)[0] == 0
    code, _, err = run(line + "--solver unipc --flow-shift 3")
    assert code == 2 and "must have been written with the same settings" in err


def test_a_text_file_has_a_prompt_a_line(run, places, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n\n a blue square \n")
    line = f"generate-dataset --model-path {places['folder']} --num-inference-steps 1 --quiet "
    size = "--num-frames 1 --height 16 --width 16 --batch-size 2"
    assert run(f"{line} {size} --input p.txt --output-path a")[0] == 0
    rows = rows_of(tmp_path / "a" / "manifest.jsonl")
    assert [row["prompt"] for row in rows] == ["a red circle", "a blue square"]


@pytest.mark.parametrize(
    "words, said",
    [
        ("out.csv", ".jsonl or .parquet"),
        ("out.jsonl --workers 2", "--workers must go with --ray"),
        ("out.jsonl --sp 2", "Leave them out"),
        ("out.jsonl --batch-size 0", "--batch-size"),
        ("out.jsonl --decoders -1", "--decoders"),
        ("out.jsonl --input nowhere", "--input must be a folder, .jsonl or .parquet"),
        ("no/out.jsonl", "folder that exists"),
    ],
)
def test_bad_flags_are_refused_at_once(run, line, words, said):
    code, _, err = run(line + words)
    assert code == 2 and said in err


def test_two_grids_are_refused_before_the_list_is_read(run, tmp_path):
    words = "--sigmas 1.0 0.5 --timesteps 900 400 --input none.txt --output-path a"
    code, _, err = run("generate-dataset " + words)
    assert code == 2 and "got sigmas and timesteps" in err and not list(tmp_path.iterdir())


def test_an_empty_folder_is_refused(run, line, places):
    code, _, err = run(f"{line} out.jsonl --input {places['empty']}")
    assert code == 2 and "at least one video" in err


def test_the_estimate_runs_nothing(run, line, tmp_path):
    code, out, _ = run(line + "out.jsonl --estimate")
    assert code == 0 and out.startswith("v2t, 9 frames") and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_workers_of_ray_write_the_same_bytes(places, videos, undisturbed, tmp_path):
    pytest.importorskip("ray.data")
    words = kill_line(places, videos).split()
    ray = [sys.executable, "-m", "engine", *words, "--ray", "local", "--workers", "2"]
    done = subprocess.run(ray, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == undisturbed
