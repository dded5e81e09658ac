"""The one seam between the model and its kernels.

`bind` chooses a backend for every op ONCE and returns a frozen record of callables. There is no
per-call dispatch and no fallback: a request that cannot be met raises.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import (
    _trial,
    adaln,
    cross_attention,
    flow_step,
    fp8_ffn,
    fp8_linear,
    joint_attention,
    linear,
    qknorm_rope,
    residual_adaln,
    rms_norm,
    rms_norm_silu,
    rope3d,
    routed_ffn,
    vocab_loss,
    vocab_sample,
)
from ._checks import require
from ._fp8 import supports_triton_fp8
from ._libraries import versions
from ._spec import ALL_ROWS, TEXT_QUERIES, TEXT_ROWS, TRAINING, Backend, Case, Op
from ._trial import Once

_STEMS = (
    adaln,
    residual_adaln,
    rope3d,
    qknorm_rope,
    rms_norm,
    linear,
    joint_attention,
    cross_attention,
    routed_ffn,
    fp8_ffn,
    fp8_linear,
    vocab_sample,
    vocab_loss,
    flow_step,
    rms_norm_silu,
)
OPS: Mapping[str, Op] = {stem.OP.name: stem.OP for stem in _STEMS}
WRITERS = "adaln", "residual_adaln"  # of rows that the next product reads as e4m3
FOR_TEXT = {  # of `Ops`: the op, and its class of shapes, in steps that compute text rows alone
    "text_query_attention": ("joint_attention", TEXT_QUERIES),
    "text_row_linear": ("linear", TEXT_ROWS),
    "text_row_ffn": ("routed_ffn", TEXT_ROWS),
    "text_row_fp8_ffn": ("fp8_ffn", TEXT_ROWS),
}


@dataclass(frozen=True)
class Choice:
    """What `bind` chose for one op; `rejected` holds (backend, reason) of the ones before it, or,
    after a trial, of all that have no time in `times`: (backend, seconds), the fastest first."""

    op: str
    backend: str
    rejected: tuple[tuple[str, str], ...]
    times: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Ops:
    """One callable per op, and the table of how they were chosen. text_query_attention: the
    joint_attention for queries that are text rows alone; text_row_linear, text_row_ffn and
    text_row_fp8_ffn: the linear, routed_ffn and fp8_ffn for text rows alone."""

    adaln: Callable
    residual_adaln: Callable
    rope3d: Callable
    qknorm_rope: Callable
    rms_norm: Callable
    linear: Callable
    joint_attention: Callable
    cross_attention: Callable
    routed_ffn: Callable
    fp8_ffn: Callable
    fp8_linear: Callable
    vocab_sample: Callable
    vocab_loss: Callable
    flow_step: Callable
    rms_norm_silu: Callable
    text_query_attention: Callable
    text_row_linear: Callable
    text_row_ffn: Callable
    text_row_fp8_ffn: Callable
    table: tuple[Choice, ...]
    precision: str = "bf16"


def _parse(request: str) -> dict[str, str]:
    """ "auto", a backend's name or "op=backend,..." -> {op: backend}; ops left out, or without that
    backend, are automatic."""
    if request == "auto":
        return {}
    having = {name: op for name, op in OPS.items() if request in (b.name for b in op.backends)}
    if having:
        return dict.fromkeys(having, request)

    names = dict.fromkeys(b.name for op in OPS.values() for b in op.backends)
    wanted = {}
    for item in request.split(","):
        name, equals, backend = (part.strip() for part in item.partition("="))
        require(
            bool(equals),
            "bind: request",
            f'"auto", one of {", ".join(names)}, or "op=backend,..."',
            repr(request),
            "Name backends one op at a time.",
        )
        require(
            name in OPS, "bind: op", f"one of {', '.join(OPS)}", repr(name), "Correct the name."
        )

        known = [b.name for b in OPS[name].backends]
        require(
            backend in known,
            f"bind: backend of {name}",
            f"one of {', '.join(known)}",
            repr(backend),
            "Correct the name.",
        )

        wanted[name] = backend

    return wanted


def _wanted(request: str) -> dict[str, str]:
    """What a request asks for, or UNIVIGU_KERNELS in the place of "auto"."""
    return _parse(os.environ.get("UNIVIGU_KERNELS", "auto") if request == "auto" else request)


def _lacks(op: Op, backend: Backend, device, dtype, precision: str) -> str | None:
    reason = backend.supports(device, dtype)
    if reason is None and precision == "fp8" and op.name in WRITERS and backend.name == "triton":
        reason = supports_triton_fp8(device, dtype)  # an A100's compiler has no e4m3
    if reason is None and precision == "fp8" and not backend.writes_fp8:
        return "writes no fp8"
    return reason


def _choose(op: Op, wanted: str | None, device, dtype, precision) -> tuple[Backend, Choice]:
    rejected = []
    for backend in op.backends:
        if wanted not in (None, backend.name):
            rejected.append((backend.name, f"{wanted} was requested"))
            continue

        reason = _lacks(op, backend, device, dtype, precision)
        types = (device.type,) if backend.auto_on is None else backend.auto_on
        if reason is None and wanted is None and device.type not in types:
            where = f"on {', '.join(types)} alone" if types else "where a trial finds it fastest"
            reason = f"auto takes it {where}"

        if reason is None:
            return backend, Choice(op.name, backend.name, tuple(rejected))
        rejected.append((backend.name, reason))

    supported = [b.name for b in op.backends if not _lacks(op, b, device, dtype, precision)]
    missing = dict(rejected)[wanted]
    raise ValueError(
        f"bind: {op.name} must be run by a backend that supports {dtype} on {device}; "
        f"got required={wanted}, supported={', '.join(supported)}, missing={missing}, "
        f"device={device}. Request a supported backend, or change the dtype or device."
    )


def _cache_folder() -> Path | None:
    """Where trials are remembered; None where the user has no home."""
    try:
        folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:
        return None
    return Path(folder) / "univigu"


def _by_preference(op: Op, names: Sequence[str]) -> Backend:
    """The first of the named ones that "auto" would take on a GPU, or the first of all."""
    able = [backend for backend in op.backends if backend.name in names]
    usual = [b for b in able if b.auto_on is None or "cuda" in b.auto_on]
    return (usual or able)[0]


def _tried(op: Op, kinds: Sequence[str], precision: str) -> list[str]:
    """The kinds for which a trial chooses the op's backend."""
    if op.trials is None or precision not in op.trials.precisions:
        return []
    return [kind for kind in kinds if kind in op.trials.kinds]


def _choose_by_trial(
    op: Op, kind: str, device, dtype, precision, case: Case, once: Once | None = None
) -> tuple[Backend, Choice]:
    """The fastest backend at `case` among those that a trial found right; the reference is tried
    where the op says so. Where no trial could be held the usual one is taken, and the table says
    why."""
    candidates = op.backends if op.trials.reference else op.backends[:-1]
    candidates = [b for b in candidates if b.kinds is None or kind in b.kinds]
    lacks = {b.name: _lacks(op, b, device, dtype, precision) for b in candidates}
    able = tuple(name for name, reason in lacks.items() if reason is None)
    if len(able) < 2:
        return _choose(op, None, device, dtype, precision)

    asked = op.module, kind, dict(case), str(device), str(dtype).removeprefix("torch.")
    request = _trial.Request(*asked, able)
    trial = _trial.shared(request, _cache_folder(), once)
    lacks |= dict(trial.rejected + trial.untried)

    if trial.times:
        best = next(b for b in op.backends if b.name == trial.times[0][0])
    elif trial.untried:
        best = _by_preference(op, [name for name, _ in trial.untried])
        warnings.warn(
            f"bind: {op.name} is run by {best.name} without a trial: {trial.untried[0][1]}",
            stacklevel=3,
        )
    else:
        best = op.backends[-1]
    rejected = tuple((name, reason) for name, reason in lacks.items() if reason)
    return best, Choice(op.name, best.name, rejected, trial.times)


def bind(
    request: str = "auto",
    device="cpu",
    dtype: torch.dtype = torch.float32,
    precision: str = "bf16",
    case: Case | None = None,
    training: bool = False,
    once: Once | None = None,
) -> Ops:
    """Chooses a backend per op for one device and one activation dtype.

    `request` is "auto" (the first supported backend of each op), the name of a backend for all ops
    that have it ("reference", "triton"), or a list such as "adaln=reference,joint_attention=sdpa";
    ops that it doesn't cover are automatic. The environment variable UNIVIGU_KERNELS takes the
    place of "auto". precision: "fp8" leaves out backends that cannot write fp8 where the next
    product reads it; "bf16": nothing is quantised.

    case: the model's B, V, T, C, D, H, K and F. On a CUDA device the automatic backends of
    attention and of the feed-forward layers are then those that a trial on this card found right
    and fastest, for each class of shapes: all rows; text rows alone, as queries or in a product (a
    library that was fastest with 33,016 rows filled 24 of 132 multiprocessors with 256 of them);
    or, with training, forward and backward with lengths on the device. Candidates run in a process
    of their own; what came out is remembered in $XDG_CACHE_HOME/univigu or ~/.cache/univigu.
    once(name, make): of several ranks one makes the text that all get; see
    `engine.parallel.World.once`.

    Raises ValueError on an unknown name and on a request that the device, the dtype or the
    precision does not allow.
    """
    require(
        precision in ("bf16", "fp8"),
        "bind: precision",
        "bf16 or fp8",
        repr(precision),
        "Correct the name.",
    )
    require(
        case is None or set("BVTCDHKF") <= case.keys(),
        "bind: case",
        "a mapping with B, V, T, C, D, H, K and F",
        case,
        "Pass samples, video, text and context rows, width, heads, head_dim and hidden width.",
    )
    wanted, device = _wanted(request), torch.device(device)
    kinds = (TRAINING,) if training else (ALL_ROWS, TEXT_QUERIES, TEXT_ROWS)
    on_card = case is not None and device.type == "cuda"

    chosen = {}
    for name, op in OPS.items():
        tried = _tried(op, kinds, precision) if on_card and name not in wanted else ()
        for kind in tried:
            chosen[name, kind] = _choose_by_trial(op, kind, device, dtype, precision, case, once)
        if kinds[0] not in tried:
            chosen[name, kinds[0]] = _choose(op, wanted.get(name), device, dtype, precision)

    usual = {name: found for (name, kind), found in chosen.items() if kind == kinds[0]}
    table = [choice for _, choice in usual.values()]
    calls = {name: backend.call for name, (backend, _) in usual.items()}
    for call, (name, kind) in FOR_TEXT.items():
        backend, choice = chosen.get((name, kind), usual[name])
        calls[call] = backend.call
        if (name, kind) in chosen:
            table.append(replace(choice, op=f"{name}, {kind}"))

    return Ops(**calls, table=tuple(table), precision=precision)


def bind_op(
    name: str,
    request: str,
    device,
    dtype: torch.dtype,
    kind: str,
    case: Case,
    once: Once | None = None,
) -> Callable:
    """One op alone, chosen as `bind` chooses it: of a part beside the model, in a dtype of its own.

    kind, case: the class of shapes, and the sizes, that a trial on a CUDA device would be of.

    Raises as `bind`.
    """
    op, wanted, device = OPS[name], _wanted(request).get(name), torch.device(device)
    if wanted is None and device.type == "cuda" and _tried(op, (kind,), "bf16"):
        return _choose_by_trial(op, kind, device, dtype, "bf16", case, once)[0].call
    return _choose(op, wanted, device, dtype, "bf16")[0].call


def explain(ops: Ops | None = None, device="cpu", dtype: torch.dtype = torch.float32) -> str:
    """The table of `ops`, or of what bind("auto", device, dtype) would choose, the times of trials,
    and the versions of the packages that could run."""
    table = (ops or bind("auto", device, dtype)).table
    rows = [("op", "backend", "times; rejected")]
    for choice in table:
        times = ", ".join(f"{name} {1000 * time:.3g} ms" for name, time in choice.times)
        reasons = [times] if times else []
        reasons += [f"{name}: {why}" for name, why in choice.rejected]
        rows.append((choice.op, choice.backend, "; ".join(reasons) or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    lines += [f"{name} {version or 'not installed'}" for name, version in versions().items()]
    return "\n".join(lines)
