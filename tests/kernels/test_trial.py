"""The choice among backends by a trial: what hurts is rejected, what is right is timed, and the
file that remembers it. What hurts is stand_ins.py's, in the trial's own process."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import contracts
import pytest
import stand_ins
import torch

from univigu_kernels import OPS, _trial, _trial_child, bind, explain, registry
from univigu_kernels._spec import ALL_ROWS, PIXELS, TEXT_QUERIES, TEXT_ROWS, TRAINING

CPU = torch.device("cpu")
CASE = {"B": 1, "V": 1000, "T": 64, "C": 20, "D": 64, "H": 2, "K": 32, "F": 144}
SUPPORT = Path(stand_ins.__file__).parent


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """A home of the test's own, and the stand-ins on the path of the trial's process."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STAND_IN_CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("STAND_IN_CHILD", str(tmp_path / "child"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SUPPORT), *filter(None, sys.path)]))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def request(*names, kind=ALL_ROWS, dtype="float32", case=CASE, module="stand_ins"):
    return _trial.Request(module, kind, case, "cpu", dtype, names)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody waits for does not."""
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def eventually(holds, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not (found := holds()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def test_what_hurts_is_rejected_with_its_reason_and_the_rest_is_timed(tmp_path):
    reasons = {
        "hangs": "its trial did not end: running for 2 s",
        "hangs_later": "its trial did not end: running for 2 s",
        "dies": "ended its trial's process by signal SIGABRT: about to die",
        "leaves": "ended its trial's process by exit code 0",
        "raises": "NotImplementedError in its trial: no kernel for this head_dim",
        "other_shape": "wrong in a tail: the result has the shape (1, 236, 2, 32), not (1, 237,",
        "wrong_first": "wrong in the model's shape: the result has a mean error of",
        "wrong_last": "wrong in the model's shape: the result has a mean error of",
        "wrong_at_the_text": "wrong in the model's shape: the result has a mean error of",
        "reads_padding": "wrong in NaN in the padding: the result has a mean error of nan",
        "forgets_lengths": "wrong in lengths with 0: the result has a mean error of",
        "noisy": "differs between two runs of a tail",
    }
    right = ("fast", "slow", "loud")
    began = time.monotonic()
    trial = _trial.hold(request(*right[:1], *reasons, *right[1:]), running=2)
    took = time.monotonic() - began

    found = dict(trial.rejected)
    assert found.keys() == reasons.keys() and not trial.untried
    for name, reason in reasons.items():
        assert found[name].startswith(reason), found[name]

    seconds = [time for _, time in trial.times]
    assert {name for name, _ in trial.times} == {*right} and seconds == sorted(seconds)
    assert trial.times[-1][0] == "slow" and 0.03 <= seconds[-1] < 1
    assert took < 2 * 2 + 60  # five processes, two of which hang

    children = [int((tmp_path / "child").read_text())]
    assert eventually(lambda: not any(map(alive, children)))


def test_a_wrong_gradient_is_found_where_gradients_are_tried():
    names = ("fast", "wrong_gradient")
    (rejected,) = _trial.hold(request(*names, kind=TRAINING)).rejected
    assert rejected[0] == "wrong_gradient" and "gradient 3 has a mean error" in rejected[1]


@pytest.mark.parametrize(
    "name, kind, dtype",
    [
        ("joint_attention", ALL_ROWS, "float32"),
        ("joint_attention", TEXT_QUERIES, "bfloat16"),
        ("joint_attention", TRAINING, "bfloat16"),
        ("cross_attention", ALL_ROWS, "bfloat16"),
        ("cross_attention", TRAINING, "float32"),
        ("linear", TEXT_ROWS, "bfloat16"),
        ("routed_ffn", ALL_ROWS, "bfloat16"),
        ("routed_ffn", TEXT_ROWS, "float32"),
        ("routed_ffn", TRAINING, "float32"),
        ("fp8_ffn", ALL_ROWS, "bfloat16"),
    ],
)
def test_the_backends_that_run_here_are_right_in_their_trial(name, kind, dtype):
    device, low = torch.device("cpu"), getattr(torch, dtype)
    names = [b.name for b in OPS[name].backends if not b.supports(device, low)]
    slow = "triton", "split"  # by the interpreter they take minutes
    names = [n for n in names if n not in slow]
    trial = _trial.hold(request(*names, kind=kind, dtype=dtype, module=OPS[name].module))
    assert trial.rejected == trial.untried == ()
    assert {n for n, _ in trial.times} == {*names} >= {"reference"}


def test_every_row_and_edge_of_a_problem_is_compared():
    """The first and last rows, and both sides of the modalities' edge and of tiles."""
    from univigu_kernels._problems import COMPARED, compared_rows

    rows = compared_rows(33016, 32760, CPU).tolist()
    assert COMPARED - 30 < len(set(rows)) == len(rows) <= COMPARED and rows == sorted(rows)
    assert {0, 1, 33015, 32759, 32760} <= {*rows}
    edges = [row for row in rows if row % 128 == 0 and row - 1 in rows]
    assert len(edges) > 30 and max(edges) > 32000
    assert compared_rows(5, 0, CPU).tolist() == [0, 1, 2, 3, 4]
    for total in (1, 255, 256, 257, 1000, 17000, 133000):
        assert {0, total - 1} <= {*(found := compared_rows(total, total // 2, CPU).tolist())}
        assert len(found) <= COMPARED


def test_a_parent_that_dies_takes_its_trial_with_it(tmp_path):
    program = """
import stand_ins
from univigu_kernels import _trial
case = dict(B=1, V=1000, T=64, C=20, D=64, H=2, K=32, F=144)
_trial.hold(_trial.Request("stand_ins", "all rows", case, "cpu", "float32", ("hangs",)))
"""
    parent = subprocess.Popen([sys.executable, "-c", program])
    assert eventually((tmp_path / "child").exists, 60)
    listed = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(listed) == 1 and alive(int(listed[0]))

    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert eventually(lambda: not alive(int(listed[0])))
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # the stand-in's own


def test_what_could_not_be_tried_is_not_remembered(tmp_path):
    asked = request("fast", "runs_out")
    for _ in range(2):
        trial = _trial.remembered(asked, tmp_path / "cache")
        assert trial.untried == (("runs_out", "memory ran out in its trial: no room"),)
        assert [name for name, _ in trial.times] == ["fast"]
    assert not (tmp_path / "cache").exists()


def test_a_trial_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path[1:])))
    trial = _trial.hold(request("fast", "slow", module="nowhere"))
    why = "the trial's process ended by exit code 1: ModuleNotFoundError: No module named 'nowhere'"
    assert trial.untried == (("fast", why), ("slow", why)) and not trial.times + trial.rejected


def test_the_choice_is_explained(monkeypatch):
    op = dataclasses.replace(
        stand_ins.OP, backends=tuple(pick("slow", "raises", "fast", "reference"))
    )
    absent = dataclasses.replace(op.backends[0], name="absent", supports=lambda *_: "needs luck")
    op = dataclasses.replace(op, backends=(absent, *op.backends))
    arguments = ALL_ROWS, CPU, torch.float32, "bf16", CASE
    results = [registry._choose_by_trial(op, *arguments) for _ in range(2)]

    (backend, choice), (_, again) = results
    assert backend.name == choice.backend == "fast" and choice == again
    assert [name for name, _ in choice.times] == ["fast", "slow"]
    error = "NotImplementedError in its trial: no kernel for this head_dim"
    assert choice.rejected == (("absent", "needs luck"), ("raises", error))
    text = explain(dataclasses.replace(bind(), table=(choice,)))
    assert re.search(r"fast +fast [\d.]+ ms, slow [\d.]+ ms; absent: needs luck; raises", text)


def pick(*names):
    return [next(b for b in stand_ins.OP.backends if b.name == name) for name in names]


def test_without_a_trial_the_usual_backend_is_taken_and_it_is_said():
    op = dataclasses.replace(stand_ins.OP, backends=tuple(pick("runs_out", "runs_out", "fast")))
    first, second = op.backends[0], dataclasses.replace(op.backends[1], name="also")
    op = dataclasses.replace(op, backends=(first, second, op.backends[2]))
    trial = _trial.Trial(untried=(("runs_out", "no room"), ("also", "no room")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_trial, "shared", lambda *_: trial)
        with pytest.warns(UserWarning, match="run by runs_out without a trial: no room"):
            backend, choice = registry._choose_by_trial(
                op, ALL_ROWS, CPU, torch.float32, "bf16", CASE
            )
    assert backend is first and dict(choice.rejected) == dict(trial.untried)


def test_nothing_that_is_right_leaves_the_reference():
    op = dataclasses.replace(
        stand_ins.OP, backends=tuple(pick("raises", "wrong_first", "reference"))
    )
    found = registry._choose_by_trial(op, ALL_ROWS, CPU, torch.float32, "bf16", CASE)
    assert found[0].name == "reference" and len(found[1].rejected) == 2


def test_a_cpu_never_tries(tmp_path):
    assert bind(case=CASE).table == bind().table == bind(case=CASE, training=True).table
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ValueError, match="bind: case must be a mapping with B, V, T, C, D, H, K"):
        bind(case={"B": 1})


def test_each_class_of_shapes_has_its_own_winner(monkeypatch):
    """On a GPU: of one trial that is of all rows, one of text queries, one of training."""
    asked, won = [], {ALL_ROWS: "cudnn", TEXT_QUERIES: "triton", TRAINING: "sdpa"}

    def shared(request, folder, once):
        asked.append((request.module.rpartition(".")[2], request.kind, once))
        best = won[request.kind] if "attention" in request.module else request.candidates[0]
        best = "split" if request.kind == TEXT_ROWS else best
        return _trial.Trial(((best, 0.1),))

    monkeypatch.setattr(_trial, "shared", shared)
    monkeypatch.setattr(registry, "_lacks", lambda *anything: None)
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    calls = {backend.name: backend.call for backend in OPS["joint_attention"].backends}

    ops = bind("auto", "cuda", torch.bfloat16, case=CASE)
    assert ops.joint_attention is calls["cudnn"]
    assert ops.text_query_attention is calls["triton"]
    assert ops.text_row_linear is contracts.backend("linear", "split") is not ops.linear
    assert ops.text_row_ffn is contracts.backend("routed_ffn", "split") is not ops.routed_ffn
    few = [choice.op for choice in ops.table[len(OPS) :]]
    assert few == ["joint_attention, text queries", "linear, text rows", "routed_ffn, text rows"]
    assert re.search(r"^joint_attention, text queries +triton ", explain(ops), re.M)
    kinds = {(name, kind) for name, kind, _ in asked}
    tried = {(n, k) for n, op in OPS.items() if op.trials for k in op.trials.kinds}
    tried -= {("fp8_ffn", ALL_ROWS), ("fp8_ffn", TEXT_ROWS)}  # is of fp8 models alone
    tried -= {("rms_norm_silu", PIXELS)}  # is no model's, see test_one_op_alone
    assert kinds == {pair for pair in tried if pair[1] != TRAINING}

    asked.clear()
    ops = bind("auto", "cuda", torch.bfloat16, case=CASE, training=True, once=len)
    assert ops.joint_attention is ops.text_query_attention is calls["sdpa"]
    assert {(name, kind) for name, kind, _ in asked} == {p for p in tried if p[1] == TRAINING}
    assert {once for *_, once in asked} == {len} and len(ops.table) == len(OPS)

    asked.clear()
    bind("auto", "cuda", torch.bfloat16, "fp8", CASE)
    assert "routed_ffn" not in {name for name, *_ in asked}

    asked.clear()
    named = bind("joint_attention=sdpa", "cuda", torch.bfloat16, case=CASE)
    assert named.joint_attention is named.text_query_attention is calls["sdpa"]
    assert "joint_attention" not in {name for name, *_ in asked}


def test_a_compiler_is_no_running_kernel():
    """The limit of a candidate is for its kernels: while one is compiled the clock of patience
    runs."""
    from univigu_kernels import _triton

    heard = []
    x = torch.ones(3)

    class Kernel:
        def warmup(self, *args, grid, **options):
            heard.append(("warmup", grid, options))

        def __getitem__(self, grid):
            return lambda *args, **options: heard.append(("run", grid, options))

    with _triton.watched(lambda now: heard.append(now)):
        _triton.launch(Kernel(), (2,), x, num_warps=4)
    options = {"num_warps": 4}
    assert heard == ["compiling", ("warmup", (2,), options), "running", ("run", (2,), options)]
    heard.clear()
    _triton.launch(Kernel(), (2,), x, num_warps=4)
    assert heard == [("run", (2,), options)]


def test_errors_of_both_kinds_are_seen():
    """In the mean and in one element; within twice that of plain PyTorch all is right."""
    g = torch.Generator().manual_seed(0)
    truth = torch.randn(256, 1536, generator=g)
    plain = truth + 1e-3 * torch.randn(256, 1536, generator=g)
    similar = truth + 1.5e-3 * torch.randn(256, 1536, generator=g)
    assert _trial_child.fault([similar], [plain], [truth]) is None
    one = similar.clone()
    one[100, 7] += 0.1
    assert "largest error" in _trial_child.fault([one], [plain], [truth])
    assert "mean error" in _trial_child.fault([truth * 1.01], [plain], [truth])
    assert "gradient 1" in _trial_child.fault([similar, one], [plain, plain], [truth, truth])
    assert "mean error of nan" in _trial_child.fault([one * torch.nan], [plain], [truth])
