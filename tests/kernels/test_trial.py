"""The choice among attention backends by one timed trial, and the file that remembers it."""

import dataclasses
import json
import os
import re
import time

import pytest
import torch

from univigu_kernels import OPS, Backend, _trial, bind, explain, registry

CPU = torch.device("cpu")
JOINT, CROSS = OPS["joint_attention"], OPS["cross_attention"]
CASE = {"B": 1, "V": 9, "T": 4, "C": 5, "H": 2, "K": 8, "D": 16}


def broken(*_):
    raise NotImplementedError("no kernel\nfor this head_dim")


def slow(*arguments):
    time.sleep(0.02)
    return JOINT.reference(*arguments)


FAST, SLOW, BROKEN = (
    Backend("fast", JOINT.reference),
    Backend("slow", slow),
    Backend("broken", broken),
)


class Counted:
    def __init__(self, name, error=None):
        self.name, self.calls, self.error = name, 0, error

    def call(self, *arguments):
        self.calls += 1
        if self.error:
            raise self.error
        return JOINT.reference(*arguments)


def remembered(file, *backends, case=CASE, dtype=torch.float32):
    return _trial.remembered(file, "joint_attention", backends, case, CPU, dtype)


@pytest.mark.parametrize("op", [JOINT, CROSS], ids=lambda op: op.name)
def test_a_trial_times_real_backends_and_leaves_the_seed_alone(op):
    names = [b.name for b in op.backends if not b.supports(CPU, torch.float32)]
    backends = [b for b in op.backends if b.name in names and b.name != "triton"]
    state = torch.get_rng_state()
    trial, lasting = _trial.run(op.name, backends, CASE, CPU, torch.float32)
    assert torch.equal(state, torch.get_rng_state()) and lasting and not trial.failed
    assert {name for name, _ in trial.times} == {b.name for b in backends} >= {"sdpa", "reference"}
    seconds = [time for _, time in trial.times]
    assert seconds == sorted(seconds) and 0 < seconds[0] and seconds[-1] < 1
    q, k, *_ = _trial.inputs(op.name, CASE, CPU, torch.bfloat16)
    assert q.shape == (1, 13, 2, 8) and k.shape[1] == (13 if op is JOINT else 5)
    assert q.dtype == torch.bfloat16 and 0.5 < q.float().std() < 1.5


def test_the_fastest_is_chosen_and_explained(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    absent = Backend("absent", broken, lambda device, dtype: "needs luck")
    op = dataclasses.replace(JOINT, backends=(absent, SLOW, BROKEN, FAST, JOINT.backends[-1]))
    results = [registry._choose_by_trial(op, CPU, torch.float32, "bf16", CASE) for _ in range(2)]
    (backend, choice), (_, again) = results
    assert backend is FAST and choice.backend == "fast" and choice == again
    assert [name for name, _ in choice.times] == ["fast", "slow"]
    assert 0.02 <= dict(choice.times)["slow"] < 1
    error = "NotImplementedError in its trial: no kernel for this head_dim"
    assert choice.rejected == (("absent", "needs luck"), ("broken", error))
    assert (tmp_path / "univigu/attention.json").is_file()
    text = explain(dataclasses.replace(bind(), table=(choice,)))
    assert re.search(r"fast +fast [\d.]+ ms, slow [\d.]+ ms; absent: needs luck; broken", text)


def test_nothing_that_runs_leaves_the_reference(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = dataclasses.replace(BROKEN, name="other")
    op = dataclasses.replace(JOINT, backends=(BROKEN, other, JOINT.backends[-1]))
    backend, choice = registry._choose_by_trial(op, CPU, torch.float32, "bf16", CASE)
    assert backend.name == "reference" and [name for name, _ in choice.rejected] == [
        "broken",
        "other",
    ]
    assert not list(tmp_path.iterdir())


def test_a_cpu_never_tries(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert bind(case=CASE).table == bind().table
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="bind: case must be a mapping with B, V, T, C, H and K"):
        bind(case={"B": 1})


def test_a_trial_is_made_once_for_each_key(tmp_path):
    file, a, b, c = tmp_path / "new" / "trials.json", *(Counted(name) for name in "abc")
    first = remembered(file, a, b)
    runs = a.calls
    assert runs > 1 and remembered(file, a, b) == first and a.calls == runs
    for n, change in enumerate(
        ({"dtype": torch.float64}, {"case": {**CASE, "V": 8}}, {"case": {**CASE, "B": 2}}), start=2
    ):
        remembered(file, a, b, **change)
        assert a.calls == n * runs
    remembered(file, a, c)
    assert a.calls == 5 * runs and len(_trial.read(file)) == 5
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "\udcff",
        "[]",
        "3",
        "[" * 100_000,
        '{"KEY": 5}',
        '{"KEY": {"times": 3}}',
        '{"KEY": {"times": [["a", NaN], ["b", 1]], "failed": []}}',
        '{"KEY": {"times": [["a", 1], ["other", 1]], "failed": []}}',
        '{"KEY": {"times": [["a", 1]], "failed": []}}',
        '{"KEY": {"times": [["a", 1], ["b", -1]], "failed": []}}',
        '{"KEY": {"times": [["a", 1], ["b", 1' + "0" * 400 + ']], "failed": []}}',
    ],
    ids=range(13),
)
def test_a_damaged_file_has_no_entries_and_is_rewritten(tmp_path, content):
    file, a, b = tmp_path / "trials.json", Counted("a"), Counted("b")
    key = _trial.key("joint_attention", (a, b), CASE, CPU, torch.float32)
    content = content.replace('"KEY"', json.dumps(key))
    file.write_bytes(content.encode(errors="surrogateescape"))
    trial = remembered(file, a, b)
    runs = a.calls
    assert runs > 0 and remembered(file, a, b) == trial and a.calls == runs


def test_the_file_is_bounded_and_the_oldest_goes(tmp_path):
    file, a, b = tmp_path / "trials.json", Counted("a"), Counted("b")
    remembered(file, a, b)
    (mine,) = _trial.read(file)
    entry = {"times": [["a", 1.0]], "failed": []}
    _trial.write(file, {f"old{i}": entry for i in range(_trial.ENTRIES)})
    remembered(file, a, b)
    assert list(_trial.read(file)) == [*(f"old{i}" for i in range(1, _trial.ENTRIES)), mine]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path):
    a, b = Counted("a"), Counted("b")
    (tmp_path / "file").write_text("")
    (tmp_path / "taken").mkdir()
    for n, file in enumerate((None, tmp_path / "file" / "trials.json", tmp_path / "taken"), 1):
        for _ in range(2):
            remembered(file, a, b)
        assert a.calls == 2 * n * (_trial.WARM_UP + _trial.RUNS)
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]  # no temporary file stays


def test_what_ran_out_of_memory_is_tried_again(tmp_path):
    file, a = tmp_path / "trials.json", Counted("a")
    b = Counted("b", torch.OutOfMemoryError("no room"))
    for n in (1, 2):
        assert remembered(file, a, b).failed == (("b", "OutOfMemoryError in its trial: no room"),)
        assert b.calls == n
    assert not file.exists()


def test_text_queries_are_not_for_the_winner_of_a_trial(monkeypatch):
    """It is timed with all rows as queries; with the text's alone it may leave a GPU idle."""
    op = OPS["joint_attention"]
    won = _trial.Trial((("sdpa", 0.1), ("triton", 0.2)), ())
    monkeypatch.setattr(_trial, "remembered", lambda *arguments: won)
    monkeypatch.setattr(registry, "_lacks", lambda backend, *rest: None)
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    by_name = {backend.name: backend.call for backend in op.backends}
    ops = bind("auto", "cuda", torch.bfloat16, case=CASE)
    assert ops.joint_attention is by_name["sdpa"]
    assert ops.text_query_attention is by_name["triton"]
    assert ops.table[-1].op == "joint_attention, text queries"
    assert re.search(r"^joint_attention, text queries +triton ", explain(ops), re.M)
    named = bind("joint_attention=sdpa", "cuda", torch.bfloat16, case=CASE)
    assert named.joint_attention is named.text_query_attention is by_name["sdpa"]
    assert len(named.table) == len(OPS)


@pytest.mark.gpu
def test_a_gpu_tries_once(tmp_path, monkeypatch):
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = {**CASE, "V": 1000, "T": 64, "C": 512, "K": 64}
    first, second = (bind("auto", "cuda", torch.bfloat16, case=case).table for _ in range(2))
    assert first == second
    for choice in first:
        tried = choice.op in _trial.OPS
        assert bool(choice.times) is tried
        assert not tried or choice.backend == choice.times[0][0]
    named = bind("joint_attention=sdpa", "cuda", torch.bfloat16, case=case).table
    assert [choice.op for choice in named if choice.times] == ["cross_attention"]
