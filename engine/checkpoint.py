"""Training state on disk: a crash, a full disk or a flipped bit costs at most the last interval.

    <folder>/step-00000500/tensors.safetensors   parameters, average and moments
                           state.json            the step and the two configurations
                           manifest.json         size and SHA-256 of the two

A save writes all of it into step-00000500.writing, the manifest last, syncs files and folder, and
commits by one rename. The newest two whole checkpoints are kept. What a killed save or removal left
ends in .writing or .removing: the loader does not see it and the next save removes it. The loader
checks the hashes before it reads a tensor, and takes the newest checkpoint that is whole.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import struct
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

from engine.errors import Cancelled, ModelFileError

FORMAT = 1
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum_buffer",)}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


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
    """Within it SIGTERM and SIGINT only append their number to the list it yields; a second SIGINT
    interrupts at once. Outside the main thread, where Python allows no handlers, it does nothing.
    """
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
    """Every tensor of the state under its name; moments exist from the first step on."""
    named = dict(state.model.named_parameters())
    tensors = {f"model.{name}": p.detach() for name, p in named.items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.items()}
    for optimizer in state.optimizers:
        for name, p in named.items():
            moments = optimizer.state.get(p, {})
            tensors |= {f"{key}.{name}": value for key, value in moments.items()}
    return tensors | {"skipped": state.skipped}


def _steps(folder: Path) -> dict[int, Path]:
    """The committed checkpoints by step, the newest first."""
    names = os.listdir(folder) if folder.is_dir() else []
    found = {int(n[5:]): folder / n for n in names if re.fullmatch(r"step-\d{8,}", n)}
    return dict(sorted(found.items(), reverse=True))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, chunks) -> dict:
    """Writes and syncs one file. -> its entry in the manifest, hashed from what was meant to be
    written."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: dict[str, torch.Tensor]):
    """The chunks of a safetensors file of contiguous CPU tensors: its library's writer would copy
    them all once more and turn a full disk into an error that is no OSError."""
    header, end = {}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        entry = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for x in tensors.values():
        yield memoryview(x.reshape(-1).view(torch.uint8).numpy())


def _text(record: dict) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def verify(path: Path) -> None:
    """Reads every byte of one checkpoint. Errors: ModelFileError that names what is damaged."""

    def damaged(what: str, rule: str, got: object) -> ModelFileError:
        return ModelFileError(f"checkpoint: {path.name}/{what} must {rule}; got {got}.")

    try:
        written = (path / "manifest.json").read_bytes()
        manifest = json.loads(written)
        files = manifest["files"]
        expected = {"format": FORMAT, "step": int(path.name[5:]), "files": files}
        if manifest != expected or written != _text(manifest):
            raise ValueError("another format, step or spelling")
        present = sorted(os.listdir(path))
        if present != sorted([*files, "manifest.json"]):
            raise damaged("", "hold what its manifest lists", ", ".join(present))
        for name, entry in files.items():
            size = (path / name).stat().st_size
            if size != entry["size"]:
                raise damaged(name, f"have {entry['size']} bytes", size)
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise damaged(name, "have the SHA-256 of its manifest", "another")
    except ModelFileError:
        raise
    except OSError as error:
        raise damaged(Path(error.filename or "").name, "be readable", error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged("manifest.json", "be as it was written", error) from error


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ModelFileError:
        return False
    return True


def _discard(path: Path) -> None:
    aside = path.with_name(path.name + ".removing")
    path.rename(aside)
    shutil.rmtree(aside)


def _commit(folder: Path, record: dict, tensors: dict[str, torch.Tensor], trusted: set) -> None:
    """Writes one checkpoint and removes those it replaces. trusted: paths that need no reading to
    be known as whole; the new one is added. Errors: OSError, with the last checkpoint unharmed."""
    if not folder.exists():
        folder.mkdir(parents=True)
        _sync(folder.parent)
    for leftover in (*folder.glob("*.writing"), *folder.glob("*.removing")):
        shutil.rmtree(leftover)
    step = record["step"]
    final = folder / f"step-{step:08d}"
    fresh = final.with_name(final.name + ".writing")
    fresh.mkdir()
    try:
        files = {
            "tensors.safetensors": _write(fresh / "tensors.safetensors", _safetensors(tensors)),
            "state.json": _write(fresh / "state.json", [_text(record)]),
        }
        manifest = {"format": FORMAT, "step": step, "files": files}
        _write(fresh / "manifest.json", [_text(manifest)])
        _sync(fresh)
        if final.exists():  # damaged, or of a run that was begun anew: a resumed one is past it
            _discard(final)
        fresh.rename(final)
    except OSError as error:
        error.filename = error.filename or str(fresh)  # a failed write does not name its file
        shutil.rmtree(fresh, ignore_errors=True)  # room on a full disk now, not at the next save
        raise
    _sync(folder)
    trusted.add(final)
    older = (p for s, p in _steps(folder).items() if s < step and (p in trusted or _is_whole(p)))
    kept = {final, next(older, final)}
    for path in _steps(folder).values():
        if path not in kept:
            _discard(path)


class Saver:
    """The saves of one run. `save` copies the state on the caller's thread; one other thread hashes
    and writes. Never two in flight: the next save waits.

    A save that fails with an OSError (disk full, mount lost) leaves the last checkpoint as it is
    and the run going: the next `save` prints a line and tries anew. Only where the last save failed
    does `wait`, and so the end of the `with` block, raise that error. Any other error of the writer
    is raised at the next `save` or `wait`.
    """

    def __init__(self, folder: Path):
        self.folder, self.trusted = folder, set()
        self.buffers: dict[str, torch.Tensor] = {}
        self.pool = ThreadPoolExecutor(1, "checkpoint")
        self.pending: Future | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.pool.shutdown()
        if error is None:
            self.wait()
        elif self.pending is not None and self.pending.exception() is not None:
            self._report(self.pending.exception())

    def _report(self, error: BaseException) -> None:
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
        """Begins to save `state`, which may change as soon as this returns."""
        try:
            self.wait()
        except OSError as error:
            self._report(error)
        tensors = _tensors(state)
        if self.buffers.keys() != tensors.keys():
            self.buffers = {
                name: torch.empty(x.shape, dtype=x.dtype, device="cpu")
                for name, x in tensors.items()
            }
        torch._foreach_copy_(list(self.buffers.values()), list(tensors.values()))
        record = {
            "step": state.step, "train": asdict(state.config), "model": asdict(state.model.cfg),
        }  # fmt: skip
        self.pending = self.pool.submit(
            _commit, self.folder, record, dict(self.buffers), self.trusted
        )


def save(state, folder: Path) -> None:
    """One whole save into the checkpoint folder of a run. Errors: OSError."""
    with Saver(folder) as saver:
        saver.save(state)


def _newest_whole(folder: Path) -> Path:
    """The newest checkpoint whose hashes are right; says on stderr which damaged ones it passed
    over. Errors: ModelFileError."""
    damaged = []
    for path in _steps(folder).values():
        try:
            verify(path)
        except ModelFileError as error:
            damaged.append(str(error))
            continue
        if damaged:
            print(f"{' '.join(damaged)} Resuming from {path.name} instead.", file=sys.stderr)
        return path
    got = " ".join(damaged)
    if not got:
        held = sorted(os.listdir(folder)) if folder.is_dir() else []
        got = f"{', '.join(held) or 'nothing'}."
    raise ModelFileError(
        f"checkpoint: {folder} must hold a whole checkpoint (step-00000500, ...); got {got} "
        "Leave out --resume and choose another --output-path."
    )


def _check_settings(state, record: dict, path: Path) -> None:
    for what, ours in (("train", asdict(state.config)), ("model", asdict(state.model.cfg))):
        different = sorted(k for k in ours if record[what].get(k) != ours[k])
        if different:
            raise ModelFileError(
                f"checkpoint: {what} settings must be those of {path}; "
                f"got another {', '.join(different)}. "
                "Resume with the same flags, or choose another --output-path."
            )


def _moments(state, tensors: dict[str, torch.Tensor]):
    """(optimizer, parameter, {key: name in the file}) of each parameter that has moments."""
    names = {p: name for name, p in state.model.named_parameters()}
    for optimizer in state.optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            keys = {k: f"{k}.{names[p]}" for k in MOMENTS[type(optimizer).__name__]}
            if not tensors.keys().isdisjoint(keys.values()):
                yield optimizer, p, keys


def load(state, folder: Path) -> None:
    """Restores the newest whole checkpoint of a run's folder into a state of the same model and
    configuration; nothing is changed unless all of it fits. Errors: ModelFileError."""
    path = _newest_whole(folder)
    record = json.loads((path / "state.json").read_text())
    _check_settings(state, record, path)
    tensors = load_file(path / "tensors.safetensors")
    prefixes = tuple(f"{key}." for keys in MOMENTS.values() for key in keys)
    ours = {k: v for k, v in _tensors(state).items() if not k.startswith(prefixes)}
    moments = list(_moments(state, tensors))
    wanted = dict(ours)
    for _, p, keys in moments:
        wanted |= {name: state.skipped if k == "step" else p for k, name in keys.items()}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        got = "none" if name in wanted else "one that this model has not"
        raise ModelFileError(f"checkpoint: {path} must hold this model's {name}; got {got}.")
    for name, x in tensors.items():
        rule, got = ((t.dtype, tuple(t.shape)) for t in (wanted[name], x))
        if rule != got:
            raise ModelFileError(f"checkpoint: {path}: {name} must be {rule}; got {got}.")
    with torch.no_grad():
        for name, value in ours.items():
            value.copy_(tensors[name])
        for optimizer, p, keys in moments:
            optimizer.state[p] = {
                k: tensors[name].to(p.device, copy=True) for k, name in keys.items()
            }
    state.step = record["step"]
