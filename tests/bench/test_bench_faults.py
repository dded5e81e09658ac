"""What must not end a benchmark: a tool's error, a peer's settings, a limit of time. Nothing here
needs a GPU; what only one has is a stand-in."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import infer, train
from bench.harness import children, groups, models, record, report, rivals, run
from univigu_kernels import explain

QUICK = models.default("cpu", quick=True)
ASKED = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu".split(",")
GOOD = "1980 MHz, 3201 MHz, 1980 MHz, 120.5 W, 700.00 W, 40"


@pytest.mark.parametrize(
    "shown, code, found",
    [
        (GOOD, 0, dict(zip(ASKED, GOOD.split(", "), strict=True))),
        (
            "No devices were found",
            6,
            {"nvidia-smi": "ended with 6 and said: No devices were found"},
        ),
        ("1980 MHz, 40", 0, {"nvidia-smi": "ended with 0 and said: 1980 MHz, 40"}),
        ("", 0, {"nvidia-smi": "ended with 0 and said: nothing"}),
    ],
)
def test_what_nvidia_smi_cannot_say_ends_no_case(shown, code, found, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{shown}'\nexit {code}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(record, "is_cuda", lambda device: True)
    properties = SimpleNamespace(uuid="0-0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert record.state("cuda") == found


@pytest.mark.parametrize("older", [False, True])
def test_torchao_leaves_the_compiler_alone(older, monkeypatch):
    """Its search for tiles would be that of every kernel that is compiled afterwards."""
    asked = {}

    def config(granularity, set_inductor_config=True):
        asked.update(set_inductor_config=set_inductor_config)
        return asked

    def without(granularity):
        return asked

    module = ModuleType("torchao.quantization")
    module.Float8DynamicActivationFloat8WeightConfig = without if older else config
    module.PerRow, module.quantize_ = (
        (lambda: None),
        lambda model, config: asked.update(used=config),
    )
    monkeypatch.setitem(sys.modules, "torchao", ModuleType("torchao"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    w, scale = torch.ones(4, 8), torch.ones(4)
    call = rivals._torchao_linear((w, scale, w, scale, torch.zeros(4), torch.float32), {})
    assert call().shape == (4, 4) and asked.pop("used") is asked
    assert asked == ({} if older else {"set_inductor_config": False})


@pytest.mark.parametrize("make", [infer.diffusers_run, train.diffusers_step])
def test_on_a_gpu_diffusers_is_compiled_block_by_block(make, monkeypatch):
    """Thirty blocks as one graph take the compiler a minute, each time."""
    pytest.importorskip("diffusers")
    seen, whole, model = [], [], models.diffusers_model(QUICK, torch.float32)
    for block in model.blocks:
        block.compile = lambda block=block, **options: seen.append((block, options))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: whole.append(args))
    for module in (infer, train):
        monkeypatch.setattr(module, "diffusers_model", lambda s, dtype: model)
    monkeypatch.setattr(models, "is_cuda", lambda device: True)
    make(QUICK, torch.float32, *([True] if make is infer.diffusers_run else []))
    assert not whole and len(model.blocks) == QUICK.cfg.layers
    assert seen == [(block, {"dynamic": False}) for block in model.blocks]


STUB = """
import time
from bench.harness.groups import Group

def cases(setting):
    return [(case, "float32") for case in ("one", "two", "three")]

def measure(case, dtype, setting):
    for number in range(2):
        yield Group(case, dtype, more={{"number": number}}, times={{"engine": [1.0, 1.0]}})
        if case == "two":
            {fault}
"""


def stub(path: Path, monkeypatch, text: str) -> None:
    """A benchmark of this name."""
    (path / "bench").mkdir()  # bench has no __init__.py: this folder is a part of it
    (path / "bench" / "stub.py").write_text(text)
    monkeypatch.syspath_prepend(path)
    monkeypatch.setenv("PYTHONPATH", str(path))
    monkeypatch.delitem(sys.modules, "bench.stub", raising=False)
    monkeypatch.setattr(record, "machine", lambda device: {})
    child = children.child
    monkeypatch.setattr(
        children, "child", lambda *a, **o: ([], None) if "roof" in a else child(*a, **o)
    )


@pytest.mark.parametrize(
    "fault, limit, why, measured",
    [
        ("time.sleep(600)", 30, "ran past the time limit", ["one", "one", "two"]),
        ("raise KeyError(5)", 300, "said: KeyError: 5", ["one", "one", "two", "three", "three"]),
    ],
)
def test_what_a_child_measured_outlives_it(fault, limit, why, measured, tmp_path, monkeypatch):
    """Also of the case that it did not finish."""
    stub(tmp_path, monkeypatch, STUB.format(fault=fault))
    found = run.run("stub", QUICK, 1, limit=limit, say=lambda line: None)
    assert [row["case"] for row in found["rows"]] == measured
    (reason,) = [text for said, text in found["refused"].items() if said.startswith("two")]
    assert why in reason


def test_what_was_measured_is_told_while_it_goes_on(tmp_path, monkeypatch):
    stub(tmp_path, monkeypatch, STUB.format(fault="raise KeyError(5)"))
    tables = []
    found = run.run("stub", QUICK, 1, say=lambda line: None, save=tables.append)
    assert [len(table["rows"]) for table in tables] == [0, 1, 2, 3, 4, 5]
    assert len(found["rows"]) == 5
    (running,) = tables[1]["refused"].items()
    assert running == ("one, float32, process 1 of 1", "had not ended when this was written")
    assert not any("had not ended" in why for why in found["refused"].values())


def test_a_written_result_is_whole_at_any_moment(tmp_path):
    """A reader that has the file open keeps the one it opened."""
    path = report.write_json({"rows": [1]}, tmp_path / "a")
    with path.open() as opened:
        report.write_json({"rows": list(range(9))}, tmp_path / "a")
        assert json.load(opened) == {"rows": [1]}
    assert json.loads(path.read_text()) == {"rows": list(range(9))}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


HANGING = """
import os, time
from bench.harness.groups import Group

SILENCE = 15

def cases(setting):
    return [("one", "float32"), ("two", "float32")]

def measure(case, dtype, setting, without=()):
    group = Group(case, dtype)
    for name in ("first", "bad", "last"):
        if name in without:
            continue
        yield name
        if name == "bad" and case == "one":
            {fault}
        group.times[name] = [1.0]
        yield group
"""


@pytest.mark.parametrize(
    "fault, why", [("time.sleep(600)", "was silent for 15 s"), ("os._exit(7)", "ended with 7")]
)
def test_a_case_is_measured_without_the_implementation_that_ends_it(
    fault, why, tmp_path, monkeypatch
):
    stub(tmp_path, monkeypatch, HANGING.format(fault=fault))
    found = run.run("stub", QUICK, 1, say=lambda line: None)
    rows = [(row["case"], row["implementation"]) for row in found["rows"]]
    two = [("two", name) for name in ("first", "bad", "last")]
    assert rows == [("one", "first"), ("one", "last"), *two]
    ((name, said),) = found["refused"].items()
    assert name == "one, float32: bad" and why in said


ALONE = """
import os, time
from pathlib import Path

def cases(setting):
    return [("one", "float32")]

def measure(case, dtype, setting):
    Path({path!r}).write_text(str(os.getpid()))
    time.sleep(600)
    yield
"""


def test_a_child_ends_with_its_parent(tmp_path):
    """Also where that is killed and can say nothing."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "stub.py").write_text(ALONE.format(path=str(tmp_path / "pid")))
    program = "from bench.harness import models, run; s = models.default('cpu', True)"
    program += "; run.run('stub', s, 1)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])

    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": paths}
    )

    until = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    child = Path("/proc") / (tmp_path / "pid").read_text()
    assert child.exists()

    parent.kill()
    parent.wait()
    until = time.monotonic() + 10
    while child.exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not child.exists()


@pytest.mark.parametrize("once", [False, True])
def test_a_group_is_told_while_its_rounds_go_on(once, monkeypatch):
    """Cut to whole rounds; in the first, what had its turn."""
    monkeypatch.setattr(groups, "TELL", 0.0)
    told = groups.timed(
        groups.Group("case", "float32"),
        {"a": int, "b": int},
        {"a": None, "b": None},
        {},
        1.0,
        QUICK,
        rounds=1 if once else None,
    )
    counts = [{name: len(times) for name, times in group.times.items()} for group in told]
    firsts = [{"a": 1}, {"a": 1, "b": 1}]
    both = {"a": 2, "b": 2}
    assert counts == [*firsts, *([firsts[1]] if once else [firsts[1], both, both])]


def test_a_report_names_the_kernels_that_were_bound():
    """It once named those of a choice without the model's shape: Triton's, where a trial had bound
    cuDNN."""
    said = []
    ask = children.Children("infer", run.encoded(QUICK), 300.0, said.append)
    for name in ("infer", "train"):
        (table,) = ask("the choice of kernels", "kernels", name, "bfloat16")
        training = name == "train"
        assert table == explain(models.bound(QUICK, torch.bfloat16, training)).splitlines()
    assert not ask.failed


def test_kernels_are_bound_for_the_setting(monkeypatch):
    asked = []
    monkeypatch.setattr(models, "bind", lambda *given, **named: asked.append(named))
    models.bound(QUICK, torch.bfloat16, training=True)
    ((case, training),) = [tuple(named.values()) for named in asked]
    assert training and set("BVTCDHKF") == case.keys()
    assert (case["V"], case["T"], case["F"]) == (
        QUICK.video_rows,
        QUICK.text_rows,
        QUICK.cfg.ffn_dim,
    )
