"""metrics.jsonl across kills, full disks and resumes; what TensorBoard and wandb get; rates; the
picture."""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.errors import MissingPackage, UsageError
from engine.train import metrics
from engine.train.metrics import Meter, Metrics


def record(step: int, **more) -> dict:
    return {"step": step, "loss": 1 / step, "lr": 1e-3} | more


def fill(folder, *steps: int, resume_step: int = 0) -> None:
    with Metrics(folder, resume_step=resume_step) as log:
        for step in steps:
            log.write(record(step))


def steps(folder) -> list[int]:
    return [r["step"] for r in metrics.read(folder)]


def test_every_line_is_on_disk_before_the_next(tmp_path):
    with Metrics(tmp_path / "run") as log:
        for step in (20, 40):
            log.write(record(step, clips=[3, 5], note="a"))
            lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
            assert json.loads(lines[-1]) == record(step, clips=[3, 5], note="a")
        assert log.lost == 0


def test_numbers_that_are_not_finite_are_null(tmp_path):
    with Metrics(tmp_path) as log:
        log.write(record(20, loss=float("nan"), grad_norm=float("inf")))
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(line, parse_constant=pytest.fail)
    assert strict == {"step": 20, "loss": None, "lr": 1e-3, "grad_norm": None}


@pytest.mark.parametrize("resume_step, left", [(60, [20, 40, 60]), (50, [20, 40]), (0, [])])
def test_resume_drops_what_came_after_the_checkpoint(tmp_path, resume_step, left):
    fill(tmp_path, 20, 40, 60, 80)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 100, "lo')  # killed while it wrote
    fill(tmp_path, resume_step + 20, resume_step=resume_step)
    assert steps(tmp_path) == [*left, resume_step + 20]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(left) + 1
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_leaves_a_file_alone_that_needs_nothing(tmp_path):
    fill(tmp_path, 20, 40)
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    fill(tmp_path, resume_step=40)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before and steps(tmp_path) == [20, 40]


def test_torn_lines_are_left_out(tmp_path):
    fill(tmp_path, 20, 40)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"st\n[1]\n\xff\n{"a": 1}\n' + whole + whole[:9])
    assert steps(tmp_path) == [20, 40]


@pytest.fixture
def limited():
    """Sets how long a file may become, in bytes: a write past it is cut short, as on a full
    disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if size is None else size, hard))

    yield limit
    limit(None)


def test_a_full_disk_is_said_once_and_leaves_whole_lines(tmp_path, capsys, limited):
    with Metrics(tmp_path) as log:
        log.write(record(20))
        limited((tmp_path / "metrics.jsonl").stat().st_size + 10)
        log.write(record(40))
        log.write(record(60))
        limited(None)
        log.write(record(80))
        assert log.lost == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "must be writable; got [Errno 28]" in said
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [20, 80]


def test_a_full_disk_leaves_what_a_resume_would_have_dropped(tmp_path, capsys, limited):
    fill(tmp_path, 20, 40, 60)
    limited(10)
    with Metrics(tmp_path, resume_step=40) as log:
        limited(None)
        assert log.lost == 1 and steps(tmp_path) == [20, 40, 60]
    assert "File too large" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made_ends_nothing(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    with Metrics(tmp_path / "run") as log:
        log.write(record(20))
        assert log.lost >= 2
    assert capsys.readouterr().err.count("\n") == 1


def test_unknown_names_and_missing_packages_are_refused_first(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="log_to must be of tensorboard, wandb; got 'mlflow'"):
        Metrics(tmp_path / "run", ["tensorboard", "mlflow"])
    for package, extra in (("tensorboard", "train"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
        with pytest.raises(MissingPackage, match=rf"{package} must be .*extra `{extra}`"):
            Metrics(tmp_path, [package])
    assert not (tmp_path / "run").exists()


def points(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loader.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_the_numbers_once(tmp_path):
    pytest.importorskip("tensorboard")
    for resume_step, written in ((0, (20, 40, 60)), (40, (60, 80))):
        with Metrics(tmp_path, ["tensorboard"], resume_step) as log:
            for step in written:
                log.write(record(step, clips=[1], loss=float(step + resume_step)))
        assert log.lost == 0
    shown = points(tmp_path)
    assert set(shown) == {"loss", "lr"}
    assert shown["loss"] == [(20, 20.0), (40, 40.0), (60, 100.0), (80, 120.0)]


def test_wandb_offline_holds_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Metrics(tmp_path / "mine", ["wandb"], resume_step=10) as log:
        run = log.sinks[0].run
        assert (run.project, run.group, run.name) == ("univigu", "mine", "mine-from-10")
        for step in (20, 40, 60):  # wandb sends a step when the next one comes
            log.write(record(step, clips=[1]))
        shown = {name: run.summary[name] for name in run.summary.keys() if name[0] != "_"}
        assert run.step == 60 and shown == {"loss": 1 / 40, "lr": 1e-3}
    assert log.lost == 0 and steps(tmp_path / "mine") == [20, 40, 60]
    (file,) = (tmp_path / "mine").glob("wandb/offline-run-*/run-*.wandb")
    assert b"loss" in file.read_bytes()


def test_rates_are_those_of_the_interval():
    before = time.perf_counter()
    meter = Meter(peak=1e6)
    for samples, rows in ((2, 100), (3, 60)):
        meter.add(samples, rows, flops=5e3, waited=0.01)
    time.sleep(0.05)
    rates = meter.read()
    at_most = time.perf_counter() - before
    assert all(type(value) is float for value in rates.values())
    seconds = 5 / rates["samples_per_s"]
    assert 0.05 <= seconds <= at_most
    assert rates["tokens_per_s"] == pytest.approx(160 / seconds)
    assert rates["data_wait"] == pytest.approx(0.02 / seconds)
    assert rates["mfu"] == pytest.approx(1e4 / seconds / 1e6)
    meter.add(1, 10, 1.0, 0.0)
    time.sleep(0.01)
    again = meter.read()
    assert 0 < again["samples_per_s"] <= 1 / 0.01 and again["data_wait"] == 0
    assert again["tokens_per_s"] == pytest.approx(10 * again["samples_per_s"])


def test_no_mfu_where_the_peak_is_unknown():
    meter = Meter(peak=None)
    meter.add(1, 1, 1.0, 0.0)
    assert "mfu" not in meter.read()


def test_peak_memory_is_the_process_s_on_a_cpu():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")
    (high,) = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())
    peak = Meter("cpu").read()["peak_memory"]
    assert 0.9 * 1024 * int(high) <= peak <= 100 * 1024 * int(high)


@pytest.mark.gpu
def test_peak_memory_is_torch_s_on_a_gpu():
    held = torch.empty(10**8, dtype=torch.uint8, device="cuda")
    assert Meter(held.device).read()["peak_memory"] >= held.nbytes
    assert Meter(held.device).read()["peak_memory"] == torch.cuda.max_memory_allocated()


HISTORY = [
    {"step": 10, "loss": 4.0, "loss_video": 3.0, "loss_text": 1.0, "grad_norm": 2.0, "lr": 1e-4},
    {"step": 13, "skipped": 1, "clips": [1, 2]},
    {"step": 20, "loss": 2.5, "loss_video": 2.5, "loss_text": 0.0, "grad_norm": 1.0, "lr": 2e-4},
    {"step": 27, "skipped": 2.0, "loss": None},
    {"step": 30, "loss": 2.0, "loss_video": 1.0, "loss_text": 1.0, "skipped": 2, "lr": 1e-4},
]


def test_the_picture_holds_the_history():
    pytest.importorskip("matplotlib")
    figure = metrics.plot_losses(HISTORY, "my run")
    loss, rate, norm = figure.axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}

    assert curves == {
        "total": [[10, 4.0], [20, 2.5], [30, 2.0]],
        "video: squared error of the velocity": [[10, 3.0], [20, 2.5], [30, 1.0]],
        "text: per token": [[10, 1.0], [20, 0.0], [30, 1.0]],
    }

    assert [line.get_ydata().tolist() for line in rate.lines] == [[1e-4, 2e-4, 1e-4]]
    assert [line.get_ydata().tolist() for line in norm.lines] == [[2.0, 1.0]]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "linear", "log"]

    (marks,) = loss.collections
    assert [segment[0][0] for segment in marks.get_segments()] == [13, 27]
    assert "(2)" in marks.get_label() and loss.get_title(loc="left") == "my run"
    assert norm.get_xlabel() == "optimizer step"
    assert [axes.get_ylabel().split()[0] for axes in figure.axes] == [
        "loss",
        "learning",
        "gradient",
    ]


def test_negative_losses_are_drawn_on_a_linear_scale():
    pytest.importorskip("matplotlib")
    figure = metrics.plot_losses([{"step": 1, "loss": 1.0}, {"step": 2, "loss": -1.0}], "")
    assert figure.axes[0].get_yscale() == "linear" and not figure.axes[0].collections


def test_plot_writes_the_picture_without_pyplot(tmp_path):
    pytest.importorskip("matplotlib")
    fill(tmp_path, 20, 40)
    code = (
        "import sys; from engine.train.metrics import plot; print(plot(sys.argv[1]));"
        "sys.exit('matplotlib.pyplot' in sys.modules or 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path}/loss.png\n"), result.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_what_it_cannot_draw(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        metrics.plot(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1')
    with pytest.raises(UsageError, match="must hold a record; got none"):
        metrics.plot(tmp_path)
    fill(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackage, match="matplotlib must be .*extra `train`"):
        metrics.plot(tmp_path)
