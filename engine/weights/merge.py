"""Adapters applied: to a model that runs, and to a file's tensors on their way into a model.

W = base + sum of scale * (factor * up @ down + diff), in fp32, rounded once to the dtype of W.
A running model's W is written in place, so that captured steps read it where they did; its base is
kept, and nothing is ever subtracted: rounded sums, as of bf16, do not give every weight back.
"""

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial, wraps
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from engine.config import PipelineConfig, SamplingConfig
from engine.errors import UsageError, listed
from engine.files.tensors import Entry
from engine.fp8 import FP8
from engine.model import UniViGU
from engine.schedule import said_by
from engine.weights.adapters import Adapter, Delta, read_adapter
from engine.weights.architecture import open_model
from engine.weights.files import FP8_CODE
from engine.weights.names import stock_names, to_stock
from univigu_kernels import quantize_weight

Weighted = Sequence[tuple[float, Delta]]


def shapes_of(model: UniViGU) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's tensors, by stock names."""
    state = to_stock(model.state_dict(), model.cfg)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def merged(
    stock: dict[str, Entry], lora: Iterable[tuple[str | Path, float]], source: Path
) -> dict[str, Entry]:
    """A file's entries, those that adapters change with the change added on reading.

    stock: by stock names. A changed entry keeps its dtype and reads as fp32 or fp64, so that the
        sum is rounded once, by whoever puts it into a dtype.
    lora: paths and scales of adapters, which add up.
    source: the path of `stock`, for errors.

    Errors: as of `read_adapter`; UsageError for weights that are stored in fp8.
    """
    shapes = {name: entry.shape for name, entry in stock.items()}
    adapters = [(check_scale(scale), read_adapter(path, shapes)) for path, scale in lora]
    changed = {name for _, adapter in adapters for name in adapter.deltas}
    _refuse_fp8([name for name in changed if stock[name].dtype == FP8_CODE], source)

    def read(entry: Entry, weighted: Weighted) -> Tensor:
        return _sum(entry.read(), [weighted])

    found = dict(stock)
    for name in changed:
        weighted = [(scale, a.deltas[name]) for scale, a in adapters if name in a.deltas]
        found[name] = replace(stock[name], read=partial(read, stock[name], weighted))
    return found


def check_scale(scale: float) -> float:
    if isinstance(scale, bool) or not isinstance(scale, Real) or not math.isfinite(scale):
        raise UsageError(f"lora: a scale must be a finite number; got {scale!r}. 1 is all of it.")
    return float(scale)


class Gate:
    """Runs pass together; a change waits for them, and later ones wait for it."""

    def __init__(self):
        self._turn = threading.Condition()
        self._running: Counter[int] = Counter()  # runs by their threads
        self._changing = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """A run. One that is started within another of its thread, as by a callback, passes."""
        me = threading.get_ident()
        with self._turn:
            self._turn.wait_for(lambda: self._running[me] or not self._changing)
            self._running[me] += 1
        try:
            yield
        finally:
            with self._turn:
                self._running[me] -= 1
                self._turn.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """A change. Errors: UsageError within a run of the same thread, which it would wait for."""
        with self._turn:
            if self._running[threading.get_ident()]:
                raise UsageError(
                    "lora: adapters must be changed between two runs; got a call within one, from "
                    "its callback. Change them before the run, or from another thread."
                )
            self._turn.wait_for(lambda: not self._changing)
            self._changing = True
        try:
            with self._turn:
                self._turn.wait_for(lambda: not self._running.total())
            yield
        finally:
            with self._turn:
                self._changing = False
                self._turn.notify_all()


def running(call: Callable) -> Callable:
    """A method of a pipeline whose weights stay as they are while it runs. Calls of several threads
    run beside each other, but where steps are captured, whose tensors they share: there they take
    turns."""

    @wraps(call)
    def run(pipe, *args, **kwargs):
        turn = nullcontext() if pipe.graphs is None else pipe.turn
        with pipe.adapters.gate.running(), turn:
            return call(pipe, *args, **kwargs)

    return run


class Adapters:
    """The adapters of a model, and the weights from before them.

    loaded: by name; their factors are in host memory.
    scales: of those that act, in the order in which they are added.
    base: by our names, what loaded adapters change, as it was without them: in host memory, as many
        bytes as those tensors have on the device (`bytes`). An adapter of all of Wan's matrices in
        the blocks of a 14B model in bf16 costs 28 GB there, one of attention alone 17 GB.
    source: the file of the weights, from which what is held in fp8 is read again: kept in the
        file's dtype, summed, and quantised again.
    fused: how adapters that are now part of the weights say that the model is sampled.
    """

    def __init__(self, source: str | Path | None = None):
        self.source = source
        self.loaded: dict[str, Adapter] = {}
        self.default: dict[str, float] = {}
        self.scales: dict[str, float] = {}
        self.base: dict[str, Tensor] = {}
        self.fused: list[tuple[str, SamplingConfig]] = []
        self.gate = Gate()

    @property
    def said(self) -> dict[str, dict[str, float]]:
        """What a result's settings say of them; nothing where none acts."""
        return {"adapters": dict(self.scales)} if self.scales else {}

    @property
    def sampling(self) -> list[tuple[str, SamplingConfig]]:
        """Who of those that act says how the model is sampled, and what; the last added first."""
        acting = [(name, self.loaded[name]) for name, scale in self.scales.items() if scale]
        said = [(f"adapter {name}", a.sampling) for name, a in acting if a.sampling is not None]
        return said[::-1] + self.fused

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.base.values())

    def load(self, model: UniViGU, path: str | Path, name: str | None, scale: float) -> str:
        """Reads an adapter and adds it to those that act. -> its name."""
        scale = check_scale(scale)
        with self.gate.changing():
            name = self._free_name(Path(path)) if name is None else name
            if not isinstance(name, str) or not name or name in self.loaded:
                raise UsageError(
                    f"lora: adapter_name must be a new one; got {name!r} beside "
                    f"{listed(self.loaded) or 'none'}. Choose another, or delete_adapters first."
                )
            adapter = read_adapter(path, shapes_of(model))
            self._keep(model, adapter)
            self.loaded[name], self.default[name] = adapter, scale
            self._apply(model, self.scales | {name: scale})
        return name

    def set(self, model: UniViGU, names: str | Sequence[str], scales=None) -> None:
        """Has these act and no others. scales: one for all, one each, or None: as loaded."""
        names = [names] if isinstance(names, str) else list(names)
        if not isinstance(scales, (list, tuple)):
            scales = [scales] * len(names)
        if len(scales) != len(names) or len(set(names)) != len(names):
            raise UsageError(
                f"lora: adapter_weights must be one for each of the adapters, which are named once;"
                f" got {len(scales)} for {listed(names)}. Give one number for all, or a list."
            )
        given = [None if scale is None else check_scale(scale) for scale in scales]
        with self.gate.changing():
            self._check_loaded(names)
            pairs = zip(names, given, strict=True)
            self._apply(model, {n: self.default[n] if s is None else s for n, s in pairs})

    def delete(self, model: UniViGU, names: Iterable[str] | None = None) -> None:
        """Takes adapters away, None: all, and the base weights that no other changes out of
        memory."""
        with self.gate.changing():
            names = list(self.loaded if names is None else names)
            self._check_loaded(names)
            self._apply(model, {n: s for n, s in self.scales.items() if n not in names})
            self._forget(names, model)

    def fuse(self, model: UniViGU) -> None:
        """Makes what acts now part of the weights, for good: base and adapters are forgotten, and
        the source too where it is no longer what fp8 weights were made from."""
        with self.gate.changing():
            state = model.state_dict()
            if any(state[name].dtype == FP8 for name in self.base):
                self.source = None
            self.fused = self.sampling
            self._forget(list(self.loaded), model)

    def again(self, model: UniViGU | None) -> None:
        """Applies the same to a model that was moved, or is in another dtype."""
        if self.loaded:
            with self.gate.changing():
                self._apply(model, self.scales)

    def _free_name(self, path: Path) -> str:
        stem = path.stem if path.suffix in (".safetensors", ".pth", ".pt", ".bin") else path.name
        number = 2
        name = stem
        while name in self.loaded:
            name, number = f"{stem}-{number}", number + 1
        return name

    def _check_loaded(self, names: list[str]) -> None:
        if unknown := [name for name in names if name not in self.loaded]:
            raise UsageError(
                f"lora: adapters must be loaded; got {listed(unknown)} beside "
                f"{listed(self.loaded) or 'none'}. Call load_lora_weights first."
            )

    def _keep(self, model: UniViGU, adapter: Adapter) -> None:
        """Copies to the host what an adapter will change and no other has changed yet."""
        state = model.state_dict()
        new = {name: state[name] for name in _changed(state, adapter) if name not in self.base}
        narrow = [name for name, tensor in new.items() if tensor.dtype == FP8]
        kept = {} if not narrow else self._from_source(narrow)
        for name, tensor in new.items():
            kept.setdefault(name, tensor.to("cpu", copy=True))
        self.base |= kept

    def _from_source(self, names: list[str]) -> dict[str, Tensor]:
        """The weights that fp8 was made from, which no stack holds, in the file's dtype."""
        if self.source is None:
            _refuse_fp8(names, "the model")
        stock = open_model(Path(self.source))[1]
        entries = {name: stock[stock_names(name)[0]] for name in names}
        _refuse_fp8([n for n, entry in entries.items() if entry.dtype == FP8_CODE], self.source)
        return {name: entry.read() for name, entry in entries.items()}

    @torch.no_grad()
    def _apply(self, model: UniViGU, scales: dict[str, float]) -> None:
        """Computes all that any loaded adapter changes from the base, and writes it in place. What
        an error leaves between two states the next call puts right."""
        state = model.state_dict()
        active = [(scale, self.loaded[name].deltas) for name, scale in scales.items()]
        for name, base in self.base.items():
            parts = stock_names(name)
            weighted = [[(s, deltas[p]) for s, deltas in active if p in deltas] for p in parts]
            tensor = state[name]
            total = _sum(base.to(tensor.device), weighted)
            if tensor.dtype == FP8:
                total, scale = quantize_weight(total)
                state[f"{name}_scale"].copy_(scale)
            tensor.copy_(total)
        self.scales = scales

    def _forget(self, names: list[str], model: UniViGU) -> None:
        for name in names:
            for known in (self.loaded, self.default, self.scales):
                known.pop(name, None)
        state = model.state_dict()
        changed = {name for a in self.loaded.values() for name in _changed(state, a)}
        self.base = {name: base for name, base in self.base.items() if name in changed}


class Adaptable:
    """What a pipeline offers of its `Adapters`, by diffusers' names."""

    model: UniViGU
    adapters: Adapters
    config: PipelineConfig

    @property
    def sampling(self) -> list[tuple[str, SamplingConfig]]:
        """Who says how the model is sampled, and what: adapters that act, then pipeline.json."""
        return self.adapters.sampling + said_by(self.config)

    def load_lora_weights(self, path, adapter_name: str | None = None, scale: float = 1.0) -> str:
        """Add a LoRA to the network, beside those that act already. -> its name.

        path: a file of PEFT, diffusers, kohya, ComfyUI or a repack of Wan, or a folder with one.
        adapter_name: None: from the file's name.
        scale: of its change; 1 is as it was trained.

        Errors: ModelFileError for a file of which any key is not applied; UsageError, also for
        weights that the model's file holds in fp8. Nothing is changed then."""
        return self.adapters.load(self.model, path, adapter_name, scale)

    def set_adapters(self, adapter_names, adapter_weights=None) -> None:
        """Choose which loaded adapters act, in place, once the calls that run now are done. Between
        two requests of a server, and under captured steps, too.

        adapter_names: one name or a list; [] is the network without any.
        adapter_weights: a scale for all or one for each; None: those that they were loaded with.

        Errors: UsageError for an unknown name, or when called from a callback."""
        self.adapters.set(self.model, adapter_names, adapter_weights)

    def delete_adapters(self, adapter_names) -> None:
        """Take one adapter or a list of them away, also from memory. Errors: UsageError."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.adapters.delete(self.model, names)

    def unload_lora_weights(self) -> None:
        """Take all adapters away: the weights are then bit for bit those from before."""
        self.adapters.delete(self.model)

    def fuse_lora(self) -> None:
        """Make the adapters that act part of the network for good, and free what was kept to take
        them away again."""
        self.adapters.fuse(self.model)


def _changed(ours: Iterable[str], adapter: Adapter) -> list[str]:
    """Our parameters of which an adapter changes a part."""
    return [name for name in ours if any(part in adapter.deltas for part in stock_names(name))]


def _sum(base: Tensor, weighted: Sequence[Weighted]) -> Tensor:
    """The base and its changes in fp32, or in fp64 where it is. weighted: for each part of a stack,
    scales and changes."""
    wide = torch.promote_types(base.dtype, torch.float32)
    total = base.to(wide, copy=True, memory_format=torch.contiguous_format)
    for rows, changes in zip(total.chunk(len(weighted)), weighted, strict=True):
        for scale, delta in changes:
            delta.add_to(rows, scale)
    return total


def _refuse_fp8(names: Sequence[str], source: object) -> None:
    if names:
        raise UsageError(
            f"lora: weights to change must be there as they were before fp8; {source} has "
            f"{len(names)} in e4m3: {listed(sorted(names))}. Load the model that it was made from, "
            "with precision fp8."
        )
