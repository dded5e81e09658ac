"""What a training says about itself: metrics.jsonl, TensorBoard, Weights & Biases, rates, curves.

metrics.jsonl holds an object a line, each with its "step". Once training has begun nothing here
ends it: what cannot be written is reported once and counted. No tensor library is imported until
it is needed.
"""

import errno
import json
import math
import os
import sys
import time
from collections.abc import Collection
from contextlib import contextmanager
from pathlib import Path

from engine.errors import UsageError, require
from engine.files.writing import replacing
from engine.result import peak_memory


def _parse(line: bytes) -> dict | None:
    """A record, or None of a line that a kill or a full disk left torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole else None


def read(folder: str | Path) -> list[dict]:
    """The records of folder/metrics.jsonl; torn lines are left out."""
    lines = (Path(folder) / "metrics.jsonl").read_bytes().splitlines()
    return [record for record in map(_parse, lines) if record is not None]


def _numbers(record: dict) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _drop_later(path: Path, step: int) -> None:
    """Removes the records of later steps, and torn lines, from the file at once or not at all."""
    if not path.exists():
        return
    text = path.read_bytes()
    records = [(line, _parse(line)) for line in text.splitlines()]
    kept = b"".join(line + b"\n" for line, record in records if record and record["step"] <= step)
    if kept == text:
        return
    with replacing(path) as fresh:
        fresh.write_bytes(kept)


class Lines:
    """metrics.jsonl, a whole line or none. It is opened for every line, so that writing goes on
    when a full disk has room again."""

    def __init__(self, folder: Path, resume_step: int):
        self.path = folder / "metrics.jsonl"

    def write(self, record: dict) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        line = (json.dumps(finite) + "\n").encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            if (written := file.write(line)) < len(line):  # the disk is full from here on
                file.truncate(end)
                got = f"{os.strerror(errno.ENOSPC)} ({written} of {len(line)} bytes)"
                raise OSError(errno.ENOSPC, got, str(self.path))

    def close(self, failed: bool) -> None:
        """Every line is on its way already."""


class TensorBoard:
    """folder/tensorboard; a resumed run hides the later points of the one before."""

    def __init__(self, folder: Path, resume_step: int):
        module = require("torch.utils.tensorboard", "train", "tensorboard")
        self.writer = module.SummaryWriter(folder / "tensorboard", purge_step=resume_step + 1)

    def write(self, record: dict) -> None:
        for name, value in _numbers(record).items():
            self.writer.add_scalar(name, value, record["step"])
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Wandb:
    """Project univigu, a run for each start, in one group for each folder. What else it should know
    (WANDB_MODE, WANDB_ENTITY ...) is in its own environment variables."""

    def __init__(self, folder: Path, resume_step: int):
        wandb = require("wandb", "wandb")
        name = folder.resolve().name
        try:
            self.run = wandb.init(
                project="univigu", group=name, name=f"{name}-from-{resume_step}", dir=folder
            )
        except wandb.Error as error:
            raise UsageError(
                f"metrics: wandb could not start ({str(error).rstrip('.')}). "
                "Run wandb login, or set WANDB_MODE=offline."
            ) from error

    @contextmanager
    def _as_oserror(self):
        try:
            yield
        except Exception as error:  # what the client of a service raises is not foreseeable
            raise ConnectionError(f"wandb: {error!r}") from error

    def write(self, record: dict) -> None:
        with self._as_oserror():
            self.run.log(_numbers(record), step=record["step"])

    def close(self, failed: bool) -> None:
        with self._as_oserror():
            self.run.finish(exit_code=int(failed))


LOG_TO = {"tensorboard": TensorBoard, "wandb": Wandb}


class Metrics:
    """Where one process, rank 0, writes its records: always folder/metrics.jsonl.

    log_to: names in LOG_TO of what gets them too.
    resume_step: the step of the checkpoint that training goes on from; what a killed run wrote
        after it is dropped, so 0 starts over.
    lost: writes that failed.

    Errors, before training: UsageError for a name that is not in LOG_TO
    and where wandb cannot start; MissingPackage.
    """

    def __init__(self, folder: str | Path, log_to: Collection[str] = (), resume_step: int = 0):
        self.folder, self.lost, self.sinks = Path(folder), 0, []
        for name in log_to:
            if name not in LOG_TO:
                known = ", ".join(LOG_TO)
                raise UsageError(f"metrics: log_to must be of {known}; got {name!r}.")
        with self._counted():
            self.folder.mkdir(parents=True, exist_ok=True)
        for sink in (*(LOG_TO[name] for name in log_to), Lines):
            with self._counted():
                self.sinks.append(sink(self.folder, resume_step))
        with self._counted():
            _drop_later(self.folder / "metrics.jsonl", resume_step)

    @contextmanager
    def _counted(self):
        try:
            yield
        except OSError as error:
            if not self.lost:
                print(
                    f"metrics: {self.folder} must be writable; got {error}. Training goes on.",
                    file=sys.stderr,
                )
            self.lost += 1

    def write(self, record: dict) -> None:
        """record: "step", an int, and values that JSON has; numbers go to every sink. A number that
        is not finite is null in metrics.jsonl."""
        for sink in self.sinks:
            with self._counted():
                sink.write(record)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for sink in self.sinks:
            with self._counted():
                sink.close(failed=kind is not None)


class Meter:
    """Rates between two readings. What is added and `peak` (FLOP/s, None where unknown) are of the
    same devices: all of them, or this rank's."""

    def __init__(self, device: str = "cpu", peak: float | None = None):
        self.device, self.peak = str(device), peak
        self._begin(time.perf_counter())

    def _begin(self, now: float) -> None:
        self.since, self.samples, self.rows, self.flops, self.waited = now, 0, 0, 0, 0.0

    def add(self, samples: int, rows: int, flops: float, waited: float) -> None:
        """One step: samples, the joint rows of all of them, FLOPs by `engine.planning.train_flops`,
        and the seconds that it waited for its batch."""
        self.samples += samples
        self.rows += rows
        self.flops += flops
        self.waited += waited

    def read(self) -> dict[str, float]:
        """Since the last reading, or since the start: samples_per_s, tokens_per_s (joint rows), mfu
        (where the peak is known) and data_wait, shares of 1; and, where the system knows it,
        peak_memory in bytes. Read it when the step's results have been: a device that is still at
        work makes rates too high."""
        now = time.perf_counter()
        seconds = now - self.since
        rates = {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.rows / seconds,
            "data_wait": self.waited / seconds,
        }
        if (held := peak_memory(self.device)) is not None:
            rates["peak_memory"] = float(held)
        if self.peak is not None:
            rates["mfu"] = self.flops / seconds / self.peak
        self._begin(now)
        return rates


SERIES = {  # key: (label, colour) of the upper panel
    "loss": ("total", "#555555"),
    "loss_video": ("video: squared error of the velocity", "#1f77b4"),
    "loss_text": ("text: per token", "#d95f02"),
    "loss_match": ("matching: half the square of its direction", "#7570b3"),
    "loss_score": ("score: squared error of the velocity", "#66a61e"),
}


def _points(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return [step for step, _ in found], [value for _, value in found]


def _skipped(records: list[dict]) -> list[int]:
    """Steps at which the count of skipped ones grew."""
    steps, counts = _points(records, "skipped")
    before = [0, *counts]
    return [step for step, was, now in zip(steps, before, counts, strict=False) if now > was]


def _line(axes, records: list[dict], key: str, **style) -> None:
    steps, values = _points(records, key)
    if steps:
        axes.plot(steps, values, marker="." if len(steps) < 30 else None, **style)


def _scale(axes, records: list[dict], keys: Collection[str]) -> None:
    """Logarithmic with plain numbers at the ticks, unless a value is negative. A text loss is 0
    where no sample of the step had one; it is left out."""
    values = [value for key in keys for value in _points(records, key)[1] if value]
    if not values or min(values) < 0:
        return
    ticker = require("matplotlib.ticker", "train")
    axes.set_yscale("log", nonpositive="mask")
    steps = (1, 2, 5) if max(values) < 300 * min(values) else (1,)
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=steps))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _mark(axes, skipped: list[int]) -> None:
    """A red line at each of these steps."""
    label = f"step skipped: not finite ({len(skipped)})"
    height = {"ymin": 0, "ymax": 1, "transform": axes.get_xaxis_transform()}
    axes.vlines(skipped, **height, color="#c00000", linewidth=0.8, label=label)


def plot_losses(records: list[dict], title: str):
    """Losses, learning rate and gradient norm by optimizer step, and what was skipped, as a figure
    of matplotlib outside of pyplot. Errors: MissingPackage."""
    Figure = require("matplotlib.figure", "train").Figure
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 1])
    loss, rate, norm = panels

    for key, (label, color) in SERIES.items():
        _line(loss, records, key, label=label, color=color, linewidth=1.2)
    _line(rate, records, "lr", color="#555555", linewidth=1.2)
    _line(norm, records, "grad_norm", color="#555555", linewidth=0.9)
    _scale(loss, records, SERIES)
    _scale(norm, records, ["grad_norm"])

    skipped = _skipped(records)
    for axes in panels if skipped else ():
        _mark(axes, skipped)
    loss.legend(frameon=False)

    labels = ("loss", "learning rate", "gradient norm\nbefore clipping")
    for axes, label in zip(panels, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.25, which="both")
    norm.set_xlabel("optimizer step")
    loss.set_title(title, loc="left")
    return figure


def plot(folder: str | Path) -> Path:
    """Draws folder/metrics.jsonl as folder/loss.png, whose path it returns. Errors: OSError;
    UsageError without a record; MissingPackage without matplotlib."""
    folder = Path(folder)
    records = read(folder)
    if not records:
        raise UsageError(f"plot: {folder}/metrics.jsonl must hold a record; got none. Train first.")
    plot_losses(records, folder.resolve().name).savefig(folder / "loss.png", dpi=120)
    return folder / "loss.png"
