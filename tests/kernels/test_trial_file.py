"""The file that remembers trials: of what it is, and what it does when it is damaged."""

import json
import os
from pathlib import Path

import pytest
import torch

from univigu_kernels import _trial
from univigu_kernels._spec import ALL_ROWS, TRAINING

CPU = torch.device("cpu")
CASE = {"B": 1, "V": 1000, "T": 64, "C": 20, "D": 64, "H": 2, "K": 32, "F": 144}


def request(*names, kind=ALL_ROWS, dtype="float32", case=CASE):
    return _trial.Request("no_module", kind, case, "cpu", dtype, names)


class Counted:
    """Trials that are made, of the two candidates a and b."""

    def __init__(self, monkeypatch):
        self.made = []
        monkeypatch.setattr(_trial, "hold", self.hold)

    def hold(self, request):
        self.made.append(request)
        return _trial.Trial((("a", 0.5),), (("b", "wrong"),))


def test_a_trial_is_made_once_for_each_request(monkeypatch, tmp_path):
    counted = Counted(monkeypatch)
    first = request("a", "b")
    changes = ({"dtype": "float64"}, {"case": {**CASE, "V": 8}}, {"kind": TRAINING})
    for n, asked in enumerate([first, *(request("a", "b", **change) for change in changes)], 1):
        for _ in range(2):
            assert _trial.remembered(asked, tmp_path).rejected == (("b", "wrong"),)
            assert len(counted.made) == n
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert len(content["trials"]) == 4 and content["card"] == "cpu"
    assert content["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("what", ["card", "versions", "sources"])
def test_the_file_is_of_one_card_version_and_source(monkeypatch, tmp_path, what):
    """Another of any of them is another file: nothing old is taken for it, and nothing is lost."""
    counted, place = Counted(monkeypatch), _trial.place(CPU)
    _trial.remembered(request("a", "b"), tmp_path)
    monkeypatch.setattr(_trial, "place", lambda device: place | {what: "another"})
    _trial.remembered(request("a", "b"), tmp_path)
    assert len(counted.made) == 2
    assert _trial.file_of(place, tmp_path) != _trial.file_of(_trial.place(CPU), tmp_path)
    monkeypatch.setattr(_trial, "place", lambda device: place)
    _trial.remembered(request("a", "b"), tmp_path)
    assert len(counted.made) == 2


def test_the_sources_are_those_of_all_kernels(tmp_path, monkeypatch):
    before, real = _trial.sources(), Path(_trial.__file__).parent
    for change in ("_flash.py", next(real.glob("_C.*.so")).name):
        folder = tmp_path / change
        folder.mkdir()
        for path in real.iterdir():
            if path.suffix in (".py", ".so"):
                (folder / path.name).write_bytes(path.read_bytes())
        monkeypatch.setattr(_trial, "__file__", str(folder / "_trial.py"))
        _trial.sources.cache_clear()
        assert _trial.sources() == before
        (folder / change).write_bytes(b"# changed")
        _trial.sources.cache_clear()
        assert _trial.sources() != before
    _trial.sources.cache_clear()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\udcff",
        "[]",
        "3",
        "[" * 100_000,
        '{"trials": 3}',
        '{"trials": {"KEY": 5}}',
        '{"trials": {"KEY": {"times": 3}}}',
        '{"trials": {"KEY": {"times": [["a", NaN], ["b", 1]], "rejected": []}}}',
        '{"trials": {"KEY": {"times": [["a", 1], ["other", 1]], "rejected": []}}}',
        '{"trials": {"KEY": {"times": [["a", 1]], "rejected": []}}}',
        '{"trials": {"KEY": {"times": [["a", 1], ["b", -1]], "rejected": []}}}',
        '{"trials": {"KEY": {"times": [["a", 1], ["b", 1' + "0" * 400 + ']], "rejected": []}}}',
    ],
    ids=range(14),
)
def test_a_damaged_file_has_no_entries_and_is_rewritten(content, monkeypatch, tmp_path):
    counted, asked = Counted(monkeypatch), request("a", "b")
    file = _trial.file_of(_trial.place(CPU), tmp_path)
    content = content.replace('"KEY"', json.dumps(asked.key()))
    file.write_bytes(content.encode(errors="surrogateescape"))
    for _ in range(2):
        assert _trial.remembered(asked, tmp_path).times == (("a", 0.5),)
        assert len(counted.made) == 1


def test_the_file_is_bounded_and_the_oldest_goes(monkeypatch, tmp_path):
    Counted(monkeypatch)
    place = _trial.place(CPU)
    file, asked = _trial.file_of(place, tmp_path), request("a", "b")
    entry = {"times": [["a", 1.0]], "rejected": []}
    _trial.write(file, place, {f"old{i}": entry for i in range(_trial.ENTRIES)})
    _trial.remembered(asked, tmp_path)
    kept = [*(f"old{i}" for i in range(1, _trial.ENTRIES)), asked.key()]
    assert list(_trial.read(file)) == kept
    assert os.listdir(file.parent) == [file.name]  # no temporary file stays


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    counted = Counted(monkeypatch)
    (tmp_path / "taken").write_text("")
    for n, folder in enumerate((tmp_path / "taken", tmp_path / "taken", None), 1):
        assert _trial.remembered(request("a", "b"), folder).times
        assert len(counted.made) == n
    assert os.listdir(tmp_path) == ["taken"]
