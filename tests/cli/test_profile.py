"""`univigu profile` on the embedded model: one step, its table, its trace and its memory; and
`univigu warm`, which has nothing to do on a CPU."""

import json
import shlex
from functools import partial

import pytest
import torch
from contracts import DEVICE

from engine import load_model, sample
from engine.cli import clip, main, profile
from engine.cli.sampling import Loading
from engine.config import EMBEDDED, PipelineConfig
from engine.planning import Job
from engine.result import FIRST

SIZE = {"num_frames": 9, "height": 64, "width": 64, "text_rows": 16, "context_rows": 16}


@pytest.fixture(scope="module")
def model():
    return load_model(EMBEDDED, DEVICE)


@pytest.mark.parametrize("mode", ["t2v", "t2vt", "v2t"])
def test_one_step_is_profiled(model, mode, tmp_path, monkeypatch):
    calls = []
    step = sample.Step.__call__

    def counted(self, kind):
        recording = torch.autograd._profiler_enabled()
        calls.append((kind.video, kind.text, recording))
        return step(self, kind)

    monkeypatch.setattr(sample.Step, "__call__", counted)
    job = Job(mode=mode, **SIZE, dtype="float32", device=torch.device(DEVICE).type)
    found = profile.profile(model, job, tmp_path / "new")
    kind = mode != "v2t", mode != "t2v"
    assert calls == [(*kind, False)] * profile.WARM + [(*kind, True)]
    assert sum(k.share for k in found.kernels) == pytest.approx(1)
    times = [k.milliseconds for k in found.kernels]
    assert times == sorted(times, reverse=True) and times[-1] > 0
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {"trace.json", "kernels.md", "memory.json"}
    assert (tmp_path / "new" / "kernels.md").read_text() == found.table() + "\n"
    assert found.table(rows=3).count("\n") == 4
    record = json.loads((tmp_path / "new" / "memory.json").read_text())
    assert record["allocated"] == found.memory
    moments = [moment for moment, _ in found.memory]
    assert moments[0] == 0 and moments == sorted(moments)
    assert json.loads((tmp_path / "new" / "trace.json").read_text())["traceEvents"]


def test_a_frozen_step_computes_text_rows_alone(model, tmp_path):
    def peak(cache):
        job = Job(mode="v2t", **SIZE | {"height": 128}, dtype="float32", video_cache=cache)
        found = profile.profile(model, job, tmp_path)
        return max(held for _, held in found.memory) - found.memory[0][1]

    assert peak("frozen") == peak(4) < 0.9 * peak("exact")


def test_a_kernel_name_fits_the_table():
    kernel = profile.Kernel("a|b" * 40, 2, 1.0, 1.0)
    row = profile.Profile("cuda", [kernel], []).table().splitlines()[-1]
    assert row.replace("\\|", "").count("|") == 5 and "…" in row and "100.0%" in row


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        return main(shlex.split(f"profile {line}")), *capsys.readouterr()

    return run


def test_command(run, tmp_path):
    code, out, err = run("--task v2t --video-cache frozen --output-path a --text-rows 8")
    assert code == 0, err
    table, peak, folder = out.splitlines()[:-2], *out.splitlines()[-2:]
    assert folder == "a" and peak.startswith("peak ")
    assert table == (tmp_path / "a" / "kernels.md").read_text().splitlines()[: len(table)]


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_random_weights_of_a_preset(run, tmp_path, precision):
    size = "--num-frames 1 --height 32 --width 32 --text-rows 4 --guidance-scale 1"
    code, out, err = run(f"--preset tiny {size} --precision {precision} --kernels reference")
    assert code == 0, err
    assert (tmp_path / "profile-out" / "trace.json").exists()


@pytest.mark.parametrize("mode", ["t2v", "t2vt"])
def test_whole_clips_by_stage(run, tmp_path, monkeypatch, mode):
    monkeypatch.setattr(clip, "ROUNDS", 1)
    monkeypatch.setattr(clip, "WAYS", {"2 steps": {"num_inference_steps": 2}})
    code, out, err = run(f"--clip --mode {mode} --num-frames 5 --height 32 --width 32")
    assert code == 0, err
    *table, folder = out.splitlines()
    written = {path.name for path in (tmp_path / folder).iterdir()}
    assert written == {"clip.mp4", "clip.json", "stages.md", "stages.json"}
    assert table == (tmp_path / folder / "stages.md").read_text().splitlines()

    sidecar = json.loads((tmp_path / folder / "clip.json").read_text())
    assert sidecar["shape"] == [5, 32, 32, 3] and (sidecar["caption"] is None) == (mode == "t2v")
    (seconds,) = json.loads((tmp_path / folder / "stages.json").read_text())["2 steps"]
    assert {*seconds} == {*clip.STAGES, FIRST} and min(seconds.values()) > 0
    until = seconds["encode"] + seconds["steps"]
    assert until < seconds[FIRST] < until + seconds["decode"] + 0.01


def test_clips_take_turns_after_a_round_that_does_not_count():
    order = []

    def call(name):
        order.append(name)
        return {"steps": len(order)}

    found = clip.in_turns({name: partial(call, name) for name in "ab"}, 3)
    assert "".join(order) == "abababab"
    assert found == {"a": [{"steps": n} for n in (3, 5, 7)], "b": [{"steps": n} for n in (4, 6, 8)]}
    assert clip.medians(found["b"]) == {"steps": 6}


@pytest.mark.parametrize(
    "line, words",
    [
        ("--clip --mode v2t", ["--clip", "t2v or t2vt", "v2t"]),
        ("--clip --preset tiny", ["--clip", "whole pipeline", "--preset tiny"]),
        ("--preset tiny --model-path x", ["--preset", "--model-path", "both"]),
        ("--preset huge", ["preset", "huge"]),
        ("--num-frames 8", ["num_frames", "5 or 9"]),
        ("--text-rows -1", ["--text-rows", "-1"]),
        ("--task t2vt --text-rows 0", ["--text-rows", "at least 1"]),
        ("--video-cache never", ["--video-cache", "never"]),
        ("--kernels nonsense", ["--kernels", "nonsense"]),
    ],
)
def test_bad_input_writes_nothing(run, tmp_path, line, words):
    code, out, err = run(line)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert [word for word in words if word not in err] == []
    assert list(tmp_path.iterdir()) == []


def test_warm_says_that_a_cpu_has_nothing_to_compile(capsys):
    assert main(shlex.split("warm --mode v2t --video-cache frozen --device cpu")) == 0
    assert capsys.readouterr().out == "nothing to compile on cpu\n"


@pytest.mark.parametrize("line", ["--batch 0", "--video-cache warm", "--mode t2x"])
def test_warm_refuses_bad_flags(line, capsys):
    assert main(["warm", *line.split()]) == 2
    assert capsys.readouterr().err.startswith("univigu: ")


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_warm_takes_a_model_without_its_weights(precision):
    loading = Loading(device="cpu", precision=precision)
    found = loading.shape_of_model(PipelineConfig().case)
    loaded = load_model(EMBEDDED, precision=precision)
    assert found.cfg == loaded.cfg and found.ops.precision == precision
    assert all(x.is_meta for x in found.state_dict().values())
    shapes = [{k: (x.shape, x.dtype) for k, x in m.state_dict().items()} for m in (found, loaded)]
    assert shapes[0] == shapes[1]
