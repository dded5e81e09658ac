"""Load, convert and save models: from any published layout, to one of ours.

Read: official Uni-ViGU checkpoints (.pth, .safetensors), diffusers Wan folders, original Wan
folders and files, our own folders and training checkpoints, in the forms of `engine.weights.forms`
and `engine.weights.quantised`. Written: config.json and stock-named safetensors.

Names, shapes and dtypes are all checked against the architecture before a byte of data is read.
Then one parameter at a time is read, quantised where precision="fp8" asks for it, and placed: the
peak is the model plus the largest tensor.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from engine import fp8
from engine.config import ModelConfig
from engine.errors import ModelFileError, UsageError, listed
from engine.files.hashes import check_hashes, parts_of
from engine.files.manifest import check_sizes
from engine.files.tensors import Entry, check_finite, checked, entries_of
from engine.model import UniViGU
from engine.weights.adapters import read_sampling
from engine.weights.architecture import open_model
from engine.weights.checkpoints import is_checkpoint
from engine.weights.files import (
    CODES,
    DTYPES,
    FLOATS,
    FP8_CODE,
    find_model,
    model_folder,
)
from engine.weights.forms import say
from engine.weights.merge import merged
from engine.weights.names import (
    INV_FREQ,
    precision_of,
    stock_names,
    to_stock,
)
from engine.weights.writer import write_folder
from univigu_kernels import Ops, bind, quantize_weight

SHARD_BYTES = 4 * 2**30


def load_model(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str | Ops = "auto",
    precision: str | None = None,
    case: Mapping[str, int] | None = None,
    once: Callable[[str, Callable[[], str]], str] | None = None,
    lora: Sequence[tuple[str | os.PathLike, float]] = (),
    verify: bool = False,
) -> UniViGU:
    """Loads a model; its architecture is inferred from names, shapes and the config, if any.

    path: our folder, a diffusers or original Wan folder, a pipeline folder (transformer/ is used)
        or its id in Hugging Face's cache, a training checkpoint, or one .safetensors, .pth or .bin
        file, as trainers and ComfyUI write them: nested, with prefixes, in FP8. A Wan model gets a
        new text branch: copies of the video feed-forward, time embedder and final table, seeded
        N(0, 0.02) embeddings [256384, D], a zero text head. Torch files are read with
        weights_only=True: code in them is refused, not run.
    device: where the parameters go.
    dtype: of matmuls and attention; norms, tables and the time path stay fp32.
    kernels: a request to `univigu_kernels.bind`, or what it returned.
    precision: "bf16" means not quantised, in any dtype; "fp8" what engine.fp8 says; None what the
        file holds, which is fp8 for a saved fp8 model.
    case: samples B, video rows V, text rows T and context rows C of runs to come; on a GPU the
        backends of attention and feed-forward layers are then chosen by a trial.
    once: as in `univigu_kernels.bind`.
    lora: paths and scales of adapters, added to the file's weights before those are rounded to
        dtype or quantised.
    verify: compare all bytes of the model and its adapters with the SHA-256 beside them first;
        files that have none are named on stderr. Sizes are always compared.

    Errors: ModelFileError for a file that is absent, damaged or does not match, and for NaN and
    infinity; UsageError for arguments, "bf16" of an fp8 file among them.
    """
    _require_float(dtype, "load_model")
    path = find_model(path)
    if verify:
        check_hashes(sources(path, lora))
    cfg, stock, stored, precision = _checked(path, dtype, precision, "load_model")
    stock = merged(stock, lora, path)
    case = None if case is None else {**case, **cfg.case}

    if isinstance(kernels, str):
        kernels = bind(kernels, device, dtype, precision, case, once=once)
    model = _empty(cfg, dtype, precision, kernels)

    if precision != stored:
        stock = _quantised(stock, model)

    state = {}
    for name, like in model.state_dict().items():
        parts = [stock[part] for part in stock_names(name)]
        state[name] = _assemble(parts, like, device)
        check_finite(state[name], listed(part.key for part in parts), path)
    model.load_state_dict(state, assign=True)
    return model


def save_pretrained(
    model: UniViGU,
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a folder: config.json, and safetensors with stock names.

    path: the folder. A model of ours in it is replaced once everything new is on disk.
    dtype: as in `load_model`; None keeps every tensor as it is.
    max_shard_bytes: the most data in one file.

    Errors: UsageError where `path` holds a model that is not ours; it is left alone.
    """
    stock = entries_of(to_stock(model.state_dict(), model.cfg))
    _save(stock, model.cfg, Path(path), dtype, max_shard_bytes)


def convert(
    source: str | os.PathLike | UniViGU,
    target: str | os.PathLike,
    dtype: torch.dtype | None = None,
    precision: str | None = None,
    lora: Sequence[tuple[str | os.PathLike, float]] = (),
    verify: bool = False,
) -> None:
    """Writes what `load_model` takes as `save_pretrained` does, one tensor in memory at a time.

    source: as the path of load_model, or a model.
    dtype: None keeps that of every tensor in the file; scaled FP8 of others becomes float32.
    precision, lora, verify: as in load_model.

    Errors: as load_model, and UsageError where a number does not fit in float16.
    """
    if not isinstance(source, UniViGU):
        source = find_model(source)
    if verify:
        check_hashes(sources(source, lora))

    cfg, stock, stored, precision = _checked(source, torch.float32, precision, "convert")
    if not isinstance(source, UniViGU):
        stock = {name: checked(entry, source) for name, entry in stock.items()}
    stock = merged(stock, lora, source)
    for path in (path for path, _ in lora if read_sampling(path) is not None):
        say(f"{path}: weights do not hold how it is sampled. Say it in pipeline.json beside them.")

    if precision != stored:
        stock = _quantised(stock, _empty(cfg, torch.float32, precision))
    _save(stock, cfg, Path(target), dtype, SHARD_BYTES)


def sources(
    path: Path | UniViGU, lora: Sequence[tuple[str | os.PathLike, float]] = ()
) -> list[str | os.PathLike]:
    """The folders and files of a model and its adapters whose hashes are to be checked. Those of a
    training checkpoint always are, when it is read."""
    plain = not isinstance(path, UniViGU) and not is_checkpoint(path)
    return [*([model_folder(path)] if plain else []), *(adapter for adapter, _ in lora)]


def pipeline_sources(
    folder: Path, transformer_path: str | os.PathLike | None = None
) -> list[str | os.PathLike]:
    """The same of a pipeline, with its own transformer or another."""
    if transformer_path is None:
        return list(parts_of(folder))
    others = [part for part in parts_of(folder) if part.name != "transformer"]
    return [*others, *sources(find_model(transformer_path))]


def _checked(
    path: Path | UniViGU, dtype: torch.dtype, precision: str | None, what: str
) -> tuple[ModelConfig, dict[str, Entry], str, str]:
    """Returns the architecture, the file's entries, its precision and the one wanted."""
    if precision not in (None, "bf16", "fp8"):
        raise UsageError(
            f"{what}: precision must be bf16 or fp8; got {precision!r}. "
            "Leave it out to take what the file holds."
        )
    if isinstance(path, UniViGU):
        cfg, stock = path.cfg, entries_of(to_stock(path.state_dict(), path.cfg))
    else:
        cfg, stock = open_model(path)

    stored = precision_of(stock)
    if (stored, precision) == ("fp8", "bf16"):
        raise UsageError(
            f"{what}: precision must be fp8 for {path}, whose weights are e4m3; got 'bf16'. "
            "Use precision='fp8', or the unquantised model."
        )
    _check(stock, _empty(cfg, dtype, stored), path)
    if not isinstance(path, UniViGU):
        check_sizes(model_folder(path))
    return cfg, stock, stored, precision or stored


def _quantised(stock: dict[str, Entry], model: UniViGU) -> dict[str, Entry]:
    """Entries whose weights are quantised on reading, wherever the fp8 `model` has them so."""

    def weight(entry: Entry) -> torch.Tensor:
        return quantize_weight(entry.read())[0]

    def scale(entry: Entry) -> torch.Tensor:
        return quantize_weight(entry.read())[1]

    for name, like in to_stock(model.state_dict(), model.cfg).items():
        if like.dtype == fp8.FP8:
            entry = stock[name]
            made = Entry(entry.key, entry.shape, FP8_CODE, partial(weight, entry))
            scales = Entry(f"{entry.key}_scale", entry.shape[:1], "F32", partial(scale, entry))
            stock = stock | {name: made, f"{name}_scale": scales}
    return stock


def _check(stock: dict[str, Entry], model: UniViGU, path: Path) -> None:
    """ModelFileError that lists what is missing, unexpected, mis-shaped or of another dtype."""
    expected = to_stock(model.state_dict(), model.cfg)
    shared = [(stock[name], like) for name, like in expected.items() if name in stock]

    wrong = {
        "missing": [name for name in expected if name not in stock and name != INV_FREQ],
        "unexpected": [entry.key for name, entry in stock.items() if name not in expected],
        "mis-shaped": [
            f"{entry.key} {list(entry.shape)} instead of {list(like.shape)}"
            for entry, like in shared
            if entry.shape != like.shape
        ],
        "not floating point": [
            f"{entry.key} {entry.dtype}"
            for entry, like in shared
            if entry.dtype not in FLOATS and like.dtype != fp8.FP8
        ],
        f"not {FP8_CODE}": [
            f"{entry.key} {entry.dtype}"
            for entry, like in shared
            if entry.dtype != FP8_CODE and like.dtype == fp8.FP8
        ],
    }

    if any(wrong.values()):
        got = "; ".join(f"{kind} {len(n)}: {listed(n)}" for kind, n in wrong.items() if n)
        raise ModelFileError(
            f"{path}: tensors must be exactly those of {model.cfg}; got {got}. "
            "Check that the file is complete and its model supported."
        )


class _NoInit(TorchFunctionMode):
    """torch.nn.init does nothing: drawing values on meta imports torch._dynamo, which takes 3 s."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return func(*args, **kwargs)


def _empty(
    cfg: ModelConfig, dtype: torch.dtype, precision: str = "bf16", ops: Ops | None = None
) -> UniViGU:
    """The model without data: names, shapes and dtypes."""
    ops = ops or bind("reference", "cpu", dtype, precision=precision)
    with _NoInit():
        model = UniViGU(cfg, device="meta", dtype=dtype, kernels=ops)
    return fp8.quantize(model) if precision == "fp8" else model


def _assemble(parts: list[Entry], like: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Reads the parts of one parameter into their rows of a new tensor, in its dtype."""
    whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    for rows, entry in zip(whole.chunk(len(parts)), parts, strict=True):
        rows.copy_(entry.read())
    return whole


def _save(
    stock: dict[str, Entry],
    cfg: ModelConfig,
    path: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> None:
    if max_shard_bytes < 1:
        raise UsageError(
            f"save: max_shard_bytes must be positive; got {max_shard_bytes}. Use {SHARD_BYTES}."
        )
    stock, precision = stock | entries_of(to_stock({}, cfg)), precision_of(stock)  # adds inv_freq
    dtypes = {name: DTYPES[entry.dtype] for name, entry in stock.items()}
    if dtype is not None:
        _require_float(dtype, "save")
        like = to_stock(_empty(cfg, dtype, precision).state_dict(), cfg)
        dtypes = {name: tensor.dtype for name, tensor in like.items()}
    config = asdict(cfg) if precision == "bf16" else asdict(cfg) | {"precision": precision}
    write_folder(stock, dtypes, config, path, max_shard_bytes)


def _require_float(dtype: torch.dtype, what: str) -> None:
    if dtype not in CODES:
        raise UsageError(
            f"{what}: dtype must be float64, float32, float16 or bfloat16; got {dtype}. "
            "Use torch.bfloat16."
        )
