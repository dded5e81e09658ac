"""What must not end a benchmark: a tool's error, a peer's settings, a limit of time. Nothing here
needs a GPU; what only one has is a stand-in."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bench import infer, train
from bench.harness import models, record, rivals, run

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


@pytest.mark.parametrize(
    "fault, limit, why, measured",
    [
        ("time.sleep(600)", 15, "ran past the time limit", ["one", "one", "two"]),
        ("raise KeyError(5)", 300, "said: KeyError: 5", ["one", "one", "two", "three", "three"]),
    ],
)
def test_what_a_child_measured_outlives_it(fault, limit, why, measured, tmp_path, monkeypatch):
    """Also of the case that it did not finish."""
    (tmp_path / "bench").mkdir()  # bench has no __init__.py: this folder is a part of it
    (tmp_path / "bench" / "stub.py").write_text(STUB.format(fault=fault))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(record, "machine", lambda device: {})
    child = run.child
    monkeypatch.setattr(run, "child", lambda *a, **o: ([], None) if "roof" in a else child(*a, **o))
    found = run.run("stub", QUICK, 1, limit=limit, say=lambda line: None)
    assert [row["case"] for row in found["rows"]] == measured
    (reason,) = [text for said, text in found["refused"].items() if said.startswith("two")]
    assert why in reason
