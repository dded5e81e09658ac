"""Training state on disk: a crash, a full disk or a flipped bit costs at most the last interval.

Masters, averages and moments, a rank's rows in a file of its own; any number of ranks can load
what any other saved. The loader checks the hashes before it reads a tensor, and takes the newest
checkpoint that is whole. See `engine.checkpoint.commit` for the files.
"""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import safe_open

from engine.checkpoint.commit import FilePart, commit, newest_whole
from engine.config import TrainConfig
from engine.errors import Cancelled, ModelFileError
from engine.files.tensors import CODES
from engine.parallel.liveness import Channel, LostRank
from engine.weights.checkpoints import read_record

MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum_buffer",)}
FREE = {"micro_batch_size", "recompute"}  # settings that change no mathematics
CHOICES = {"lr": ("lr", "muon_lr")}  # settings that a resumed run may change where it says so


class Interrupted(Cancelled):
    """A signal ended the run after its checkpoint was saved. exit_code: 128 + the signal."""

    def __init__(self, number: int, step: int):
        name = signal.Signals(number).name
        super().__init__(
            f"train: stopped by {name} after step {step}; the checkpoint is saved. "
            "Add --resume to go on."
        )
        self.exit_code = 128 + number


@contextmanager
def deferred_signals():
    """A context in which SIGTERM and SIGINT only append their number to the list it yields; a
    second SIGINT interrupts at once. Outside the main thread, where Python allows no handlers, it
    does nothing."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number, frame):
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def _tensors(state) -> dict[str, torch.Tensor]:
    """Every tensor of the state under its name, this rank's rows; moments exist from the first step
    on."""
    tensors = {f"model.{name}": p.detach() for name, p in state.masters.items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.items()}
    for optimizer in state.optimizers:
        for name, p in state.masters.items():
            moments = optimizer.state.get(p, {})
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    return tensors | {"skipped": state.skipped}


def _parameter(name: str) -> str:
    """The name of the parameter that has a tensor of the same shape under this name."""
    kind, _, parameter = name.partition(".")
    return "" if kind == "step" else parameter


def _part(state) -> FilePart | None:
    """What this rank saves: of several replicas the first one writes, and what is whole on every
    rank rank 0."""
    if state.world is None:
        return FilePart(0, 1, _tensors(state), {})
    mesh, rank = state.world.config, state.world.rank
    count = mesh.dp_shard * mesh.sp
    if rank % mesh.cfg or rank >= count * mesh.cfg:
        return None
    rows = {k: tuple(shard) for k, shard in state.sharding.shards.items() if k in state.masters}
    tensors = _tensors(state)
    if rank > 0:
        tensors = {name: x for name, x in tensors.items() if _parameter(name) in rows}
    return FilePart(rank // mesh.cfg, count, tensors, rows)


def _not_finite(state) -> str | None:
    """What of this rank's state is NaN or infinite, in words. Waits for the device once: its
    numbers are all there but AdamW's step counts, which may be on the host and are not looked at.
    """
    tensors = {
        name: x
        for name, x in _tensors(state).items()
        if x.is_floating_point() and not name.startswith("step.")
    }
    finite = torch.stack([x.isfinite().all() for x in tensors.values()]).tolist()
    bad = [name for name, fine in zip(tensors, finite, strict=True) if not fine]
    return f"{bad[0]} and {len(bad) - 1} more" if bad else None


def _channel(world) -> Channel:
    return Channel() if world is None else world.peers.channel()


class Saver:
    """The saves of one run, in step on all ranks of its `engine.parallel.World`. `save` copies the
    state on the caller's thread; one other thread hashes and writes. Never two in flight: the next
    save waits.

    A save that fails with an OSError (disk full, mount lost) on any rank fails on all. It leaves
    the last checkpoint as it is and the run going: the next `save` prints a line and tries again.
    Only where the last save failed does `wait`, and so the end of the `with` block, raise that
    error. Any other error of the writer is raised at the next `save` or `wait`.
    """

    def __init__(self, folder: Path, world=None):
        self.folder, self.trusted = folder, set()
        self.channel, self.saves = _channel(world), 0
        self.buffers: dict[str, torch.Tensor] = {}
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None:
            self.channel.hasten()
        self.pool.shutdown()
        if error is None:
            self.wait()
        elif self.pending is not None and self.pending.exception() is not None:
            self._report(self.pending.exception())

    def _report(self, error: BaseException) -> None:
        if self.channel.rank > 0 or isinstance(error, LostRank):
            return
        print(
            f"checkpoint: {self.folder} must take a checkpoint; got {error}. "
            "The last one is unharmed; make room before the next.",
            file=sys.stderr,
        )

    def wait(self) -> None:
        """Until nothing is in flight. Errors: the one of the save that was."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def save(self, state) -> None:
        """Begin to save `state`, which may change as soon as this returns. A state with NaN or
        infinity on any rank is not written: NonFinite on all of them, at the next `save` or `wait`.
        """
        try:
            self.wait()
        except OSError as error:
            self._report(error)

        part = _part(state)
        if part is not None:
            part = part._replace(tensors=self._copied(part.tensors))
        record = {
            "step": state.step,
            "data": state.data,
            "base": state.base,
            "teacher": state.teacher,
            "origin": state.origin,
            "train": asdict(state.config),
            "model": asdict(state.model.cfg),
            "networks": {name: asdict(net.cfg) for name, net in state.objective.networks.items()},
        }

        self.saves += 1
        self.pending = self.pool.submit(
            commit,
            self.folder,
            record,
            part,
            _not_finite(state),
            self.trusted,
            self.channel,
            self.saves,
        )

    def _copied(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.buffers.keys() != tensors.keys():
            self.buffers = {
                name: torch.empty(x.shape, dtype=x.dtype, device="cpu")
                for name, x in tensors.items()
            }
        torch._foreach_copy_(list(self.buffers.values()), list(tensors.values()))
        return dict(self.buffers)


def save_checkpoint(state, folder: Path) -> None:
    """One whole save into the checkpoint folder of a run. Errors: OSError."""
    with Saver(folder, state.world) as saver:
        saver.save(state)


def _check_settings(state, record: dict, path: Path, changed: Iterable[str]) -> str:
    """Returns what the run changes, as text; `steps` may grow. Errors: ModelFileError for a change
    that is not in CHOICES or not asked for."""
    stated = {name for choice in changed for name in CHOICES.get(choice, ())}
    notes = []

    settings = {"train": asdict(state.config), "model": asdict(state.model.cfg)}
    older = {"train": asdict(TrainConfig()), "model": {}}  # what a record says nothing of yet

    for what, ours in json.loads(json.dumps(settings)).items():
        theirs = json.loads(json.dumps(older[what])) | record[what]
        different = sorted(k for k in ours.keys() - FREE if theirs.get(k) != ours[k])
        grows = what == "train" and ours["steps"] > theirs["steps"]
        free = stated | {"steps"} if grows else stated
        if refused := [name for name in different if name not in free]:
            asked = [choice for choice, names in CHOICES.items() if {*names} & {*refused}]
            way = f"Add --resume-with {' '.join(asked)} to mean it, r" if asked else "R"
            raise ModelFileError(
                f"checkpoint: {what} settings must be those of {path}; "
                f"got another {', '.join(refused)}. "
                f"{way}esume with the same flags, or choose another --output-path."
            )
        notes += [f"{name} {ours[name]} instead of {theirs.get(name)}" for name in different]
    return ", ".join(notes)


def _check_base(state, record: dict, path: Path) -> None:
    if state.base != record["base"]:
        raise ModelFileError(
            f"checkpoint: the frozen parameters must be those of {path}; got others. "
            "Resume with the same --init-from or --preset, and the same --dtype."
        )


def _check_teacher(state, record: dict, path: Path) -> None:
    if state.teacher != record.get("teacher", ""):
        raise ModelFileError(
            f"checkpoint: the teacher must be that of {path}; got another. Resume with the same "
            "--teacher, and the same --dtype."
        )


def _moments(state, names: set[str]):
    """(optimizer, parameter, {key: name in the file}) of each parameter that has moments."""
    parameters = {p: name for name, p in state.masters.items()}
    for optimizer in state.optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            keys = {k: f"{k}.{parameters[p]}" for k in MOMENTS[type(optimizer).__name__]}
            if not names.isdisjoint(keys.values()):
                yield optimizer, p, keys


def _wanted(state, names: set[str]) -> dict[str, torch.Tensor]:
    """Name -> a tensor of the type and shape that it must have on this rank."""
    moments = tuple(f"{key}." for keys in MOMENTS.values() for key in keys)
    wanted = {k: v for k, v in _tensors(state).items() if not k.startswith(moments)}
    for _, p, keys in _moments(state, names):
        wanted |= {name: state.skipped if k == "step" else p for k, name in keys.items()}
    return wanted


def _read(state, path: Path, rows: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """This rank's rows of every tensor. rows: see `commit.FilePart`. Errors: ModelFileError."""
    files = sorted(path.glob("tensors-*.safetensors"))

    @cache
    def opened(index: int):
        return safe_open(files[index], framework="pt")

    names = set(opened(0).keys())
    wanted = _wanted(state, names)
    for name in sorted(wanted.keys() ^ names):
        got = "none" if name in wanted else "one that this model has not"
        raise ModelFileError(f"checkpoint: {path} must hold this model's {name}; got {got}.")
    shards = {} if state.sharding is None else state.sharding.shards
    found = {}
    for name, like in wanted.items():
        bounds, shard = rows.get(_parameter(name)), shards.get(_parameter(name))
        stored, total = opened(0).get_slice(name), list(like.shape)
        shape = stored.get_shape()
        if bounds:
            shape[0] = bounds[-1]
        if shard:
            total[0] = shard.rows
        rule, got = (CODES[like.dtype], total), (stored.get_dtype(), shape)
        if rule != got:
            raise ModelFileError(f"checkpoint: {path}: {name} must be {rule}; got {got}.")
        found[name] = _rows(opened, name, bounds, shard.start if shard else 0, like)
    return found


def _rows(
    opened: Callable, name: str, bounds: list[int] | None, start: int, like: torch.Tensor
) -> torch.Tensor:
    """The `len(like)` rows from `start` on, from the files that have them."""
    if not like.ndim:
        return opened(0).get_tensor(name)
    stop = start + len(like)
    pieces = [
        opened(index).get_slice(name)[max(first, start) - first : min(end, stop) - first]
        for index, (first, end) in enumerate(pairwise(bounds or [0, stop]))
        if max(first, start) < min(end, stop)
    ]
    return torch.cat(pieces) if pieces else torch.empty_like(like, device="cpu")


def _restore(state, tensors: dict[str, torch.Tensor]) -> None:
    for name, value in _tensors(state).items():
        kind = name.partition(".")[0]
        if kind in ("model", "ema", "skipped"):
            value.copy_(tensors[name])
    for optimizer, p, keys in _moments(state, set(tensors)):
        optimizer.state[p] = {k: tensors[name].to(p.device, copy=True) for k, name in keys.items()}
    if state.sharding is None:
        for name, master in state.masters.items():  # a bf16 model's are apart from its parameters
            p = state.parameter(name)
            if p is not master:
                p.copy_(master)


def load_checkpoint(
    state, folder: Path, required: bool = True, changed: Iterable[str] = ()
) -> None:
    """Restores the newest whole checkpoint of a run's folder into a state of the same model and
    configuration, on any number of ranks, all of which must call it; nothing is changed on any
    unless all of it fits on all. A folder without a checkpoint leaves the state as it is where none
    is required.

    changed: keys of CHOICES whose settings may differ. `steps` may always grow; rank 0 says on
        stderr what is another.

    Errors: ModelFileError."""
    channel = _channel(state.world)
    path = newest_whole(folder, channel, required)
    if path is not None:
        restore(state, path, channel, changed)


def restore(state, path: Path, channel: Channel, changed: Iterable[str] = ()) -> None:
    """Restores one checkpoint as `load_checkpoint` does, whose hashes are known to be right."""
    record, failed, notes = read_record(path), None, ""
    try:
        notes = _check_settings(state, record, path, changed)
        _check_base(state, record, path)
        _check_teacher(state, record, path)
        tensors = _read(state, path, record["rows"])
    except ModelFileError as error:
        failed = str(error)
    found = channel.hear("read", failed)
    failed = channel.tell("fits", found and next(filter(None, found), None))
    if failed is not None:
        raise ModelFileError(failed)

    if notes and channel.rank == 0:
        print(f"checkpoint: from step {record['step']} on with {notes}.", file=sys.stderr)
    with torch.no_grad():
        _restore(state, tensors)
    state.step, state.data = record["step"], record["data"]


load, save = load_checkpoint, save_checkpoint  # as in `checkpoint.load`
