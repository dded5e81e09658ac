"""The parts of a bulk run: work ahead, ids, batches, and parts that do not fit what is there."""

import json
import os
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from pipeline_folder import build_pipeline_folder

from engine.bulk import Captions, Item, Output, do, identity, read_prompts, read_videos
from engine.bulk.ahead import ahead
from engine.bulk.cluster import Worker
from engine.bulk.items import seed_of
from engine.bulk.work import Piece, parts_of
from engine.errors import UsageError
from engine.media import write_video
from engine.pipeline import Pipeline
from engine.toy import draw_scenes, render


def test_what_is_ahead_comes_in_order_whoever_is_slow():
    def read(source):
        for i in range(source % 4):
            time.sleep(0.002 * (7 - source % 7))
            yield source, i

    wanted = [(source, i) for source in range(20) for i in range(source % 4)]
    for threads, most in ((1, 1), (3, 2), (8, 16)):
        assert list(ahead(range(20), read, threads, most)) == wanted


def test_what_is_ahead_is_bounded_and_ends():
    """Eight pieces wait and four threads hold one each, of sources that would never end."""
    made, lock = [], threading.Lock()

    def read(source):
        while True:
            with lock:
                made.append(source)
            yield source

    before = threading.active_count()
    pieces = ahead(range(100), read, threads=4, most=8)
    assert next(pieces) == 0
    time.sleep(0.2)
    assert 8 <= len(made) <= 1 + 8 + 1 + 4
    pieces.close()
    assert threading.active_count() == before


def test_an_error_ahead_comes_at_its_turn():
    def read(source):
        yield source
        if source == 2:
            raise OSError("gone")

    pieces = ahead(range(9), read, threads=4, most=4)
    assert [next(pieces) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(pieces)


def test_an_id_depends_on_neither_place_nor_neighbours(tmp_path):
    def ids(folder: str, names: list[str]) -> dict[str, str]:
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / folder / name).touch()
        return {item.text: item.id() for item in read_videos(tmp_path / folder)}

    few = ids("a", ["x.mp4", "s/y.MOV", "notes.txt", ".hidden.mp4"])
    assert list(few) == ["s/y.MOV", "x.mp4"]
    many = ids("b/c", ["0.mp4", "x.mp4", "s/y.MOV"])
    assert many.items() > few.items()


def test_each_window_and_each_repeat_has_its_own_id_and_seed():
    items = [Item(0, "x.mp4"), Item(1, "x.mp4", repeat=1), Item(2, "x.mp4", start=5.0)]
    ids = {item.id(begin) for item in items for begin in (0.0, 1.0, 1.5)}
    assert len(ids) == 9 and len({seed_of(seed, id) for seed in (0, 1) for id in ids}) == 18
    assert items[0].id(1.0) == Item(7, "x.mp4", "/elsewhere").id(1.0 + 1e-9)


def test_the_identity_of_a_list_changes_with_its_order(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("one\ntwo\none\n")
    items = read_prompts(path)
    assert [(item.text, item.repeat) for item in items] == [("one", 0), ("two", 0), ("one", 1)]
    path.write_text("two\none\none\n")
    assert identity(items) != identity(read_prompts(path))


def test_names_and_prompts_that_are_no_unicode(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"good\n\xff\xfe bad\n")
    good, bad = read_prompts(tmp_path / "p.txt")
    assert good.error is None and "Unicode" in bad.error
    (tmp_path / "v.jsonl").write_text('{"video": "\\ud800.mp4"}')
    (item,) = read_videos(tmp_path / "v.jsonl")
    assert item.text == "\\ud800.mp4" and json.dumps([item.text], ensure_ascii=False).encode()


def test_a_file_whose_name_is_no_unicode_is_a_row(pipe, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / os.fsdecode(b"\xff.mp4")).write_bytes(b"no video")
    run(pipe, tmp_path / "videos", tmp_path / "a.jsonl")
    row = json.loads((tmp_path / "a.jsonl").read_text("utf-8"))
    assert row["video"] == "\\udcff.mp4" and "\\udcff.mp4 must be" in row["error"]


def test_a_batch_is_of_one_shape_and_leftovers_come_last():
    item = Item(0, "x.mp4")
    shapes = [(9,), (5,), (9,), None, (5,), (5,), (9,)]
    pieces = [
        Piece(item, i, float(i), shape=shape or (), error=None if shape else "bad")
        for i, shape in enumerate(shapes)
    ]
    found = list(parts_of(pieces, 2))
    batches = [[[piece.window for piece in batch] for batch in part.batches] for part in found]
    assert batches == [[[0, 2]], [[1, 4]], [[5], [6]]]
    assert [part.last for part in found] == [False, False, True]
    assert [piece.window for piece in found[-1].errors] == [3]
    assert [part.last for part in parts_of([], 2)] == [True]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return Pipeline.from_pretrained(build_pipeline_folder(tmp_path_factory.mktemp("pipe")))


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for i, frames in enumerate(render(draw_scenes(5, 0, held_out=True))):
        write_video(folder / f"{i}.mp4", np.concatenate([frames] * 2), 8)
    return folder


def run(pipe, folder: Path, path: Path, most: int | None = None) -> list[str]:
    """Captions of a folder, in batches of two, ended after `most` parts; the parts' contents
    before they are joined."""
    items = read_videos(folder)
    output = Output(path, {"batch_size": 2}, Captions.COLUMNS)
    work = Captions(pipe, pipe.config, 2, 1.0, choices={"num_inference_steps": 1})
    with output.begun():
        groups = output.missing(items)
        for count, _ in enumerate(do(work, output, [x for group in groups for x in group]), 1):
            if count == most:
                return []
        parts = sorted(output.folder.glob("*-*.jsonl"))
        texts = [part.name + part.read_text() for part in parts]
        output.join(items)
        return texts


def test_parts_that_went_are_made_again_as_they_were(pipe, folder, tmp_path):
    whole = run(pipe, folder, tmp_path / "a.jsonl")
    assert len(whole) == 6  # five full batches and the group's last part, which is empty
    run(pipe, folder, tmp_path / "b.jsonl", most=4)
    (tmp_path / "b.jsonl.parts" / "000000-000001.jsonl").unlink()
    assert run(pipe, folder, tmp_path / "b.jsonl") == whole
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_a_file_that_changed_in_between_is_neither_lost_nor_there_twice(pipe, folder, tmp_path):
    """The parts of its group that no longer fit are written again."""
    run(pipe, folder, tmp_path / "a.jsonl", most=3)
    (folder / "0.mp4").write_text("no video any more")
    run(pipe, folder, tmp_path / "a.jsonl")
    run(pipe, folder, tmp_path / "b.jsonl")
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [row["video"] for row in rows] == ["0.mp4", *(f"{i}.mp4" for i in "11223344")]


def test_a_kill_between_the_file_and_its_sidecar(pipe, folder, tmp_path):
    """The parts are joined again, and then go."""
    whole, path = run(pipe, folder, tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    run(pipe, folder, path, most=6)
    path.write_bytes((tmp_path / "a.jsonl").read_bytes())
    assert run(pipe, folder, path) == whole
    assert not (tmp_path / "b.jsonl.parts").exists() and (tmp_path / "b.json").exists()


def test_two_runs_at_once_are_refused(tmp_path):
    output = Output(tmp_path / "a.jsonl", {"batch_size": 2}, Captions.COLUMNS)
    with output.begun(), pytest.raises(UsageError, match="one run at a time"):
        with Output(tmp_path / "a.jsonl", {"batch_size": 2}, {}).begun():
            pass


def test_a_worker_of_a_cluster_does_a_group_and_says_what_was_wrong(pipe, folder, tmp_path):
    """What Ray gives an actor, and what it gets back."""
    run(pipe, folder, tmp_path / "a.jsonl")
    items = read_videos(folder)
    output = Output(tmp_path / "b.jsonl", {"batch_size": 2}, Captions.COLUMNS)
    given = {"items": [json.dumps([asdict(item) for item in items])]}

    def worker(steps: int) -> Worker:
        choices = {"num_inference_steps": steps}
        work = partial(Captions, pipe, pipe.config, 2, 1.0, choices=choices)
        return Worker(lambda: nullcontext(work()), (output.path, output.settings, output.columns))

    with output.begun():
        (fault,) = worker(steps=0)(given)["fault"]
        assert fault.startswith("UsageError: ") and "num_inference_steps" in fault
        assert worker(steps=1)(given) == {"rows": [10], "errors": [0], "fault": [""]}
        assert output.missing(items) == []
        output.join(items)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
