"""The one seam between the model and its kernels.

`bind` chooses a backend for every op ONCE and returns a frozen record of callables. There is no
per-call dispatch and no fallback: a request that cannot be met raises.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from . import (
    adaln,
    cross_attention,
    flow_step,
    fp8_linear,
    joint_attention,
    linear,
    qknorm_rope,
    residual_adaln,
    rms_norm,
    rope3d,
    routed_ffn,
    vocab_loss,
    vocab_sample,
)
from ._checks import require
from ._spec import Backend, Op
from ._triton import triton_version

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
    fp8_linear,
    vocab_sample,
    vocab_loss,
    flow_step,
)
OPS: Mapping[str, Op] = {stem.OP.name: stem.OP for stem in _STEMS}


@dataclass(frozen=True)
class Choice:
    """What `bind` chose for one op; `rejected` holds (backend, reason) of the ones before it."""

    op: str
    backend: str
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Ops:
    """One callable per op, and the table of how they were chosen."""

    adaln: Callable
    residual_adaln: Callable
    rope3d: Callable
    qknorm_rope: Callable
    rms_norm: Callable
    linear: Callable
    joint_attention: Callable
    cross_attention: Callable
    routed_ffn: Callable
    fp8_linear: Callable
    vocab_sample: Callable
    vocab_loss: Callable
    flow_step: Callable
    table: tuple[Choice, ...]


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


def _choose(op: Op, wanted: str | None, device, dtype) -> tuple[Backend, Choice]:
    rejected = []
    for backend in op.backends:
        if wanted not in (None, backend.name):
            rejected.append((backend.name, f"{wanted} was requested"))
            continue
        reason = backend.supports(device, dtype)
        types = backend.auto_on or (device.type,)
        if reason is None and wanted is None and device.type not in types:
            reason = f"auto takes it on {', '.join(types)} alone"
        if reason is None:
            return backend, Choice(op.name, backend.name, tuple(rejected))
        rejected.append((backend.name, reason))
    supported = [b.name for b in op.backends if b.supports(device, dtype) is None]
    missing = dict(rejected)[wanted]
    raise ValueError(
        f"bind: {op.name} must be run by a backend that supports {dtype} on {device}; "
        f"got required={wanted}, supported={', '.join(supported)}, missing={missing}, "
        f"device={device}. Request a supported backend, or change the dtype or device."
    )


def bind(request: str = "auto", device="cpu", dtype: torch.dtype = torch.float32) -> Ops:
    """Chooses a backend per op for one device and one activation dtype.

    `request` is "auto" (the first supported backend of each op), the name of a backend for all ops
    that have it ("reference", "triton"), or a list such as "adaln=reference,joint_attention=sdpa";
    ops that it doesn't cover are automatic. The environment variable
    UNIVIGU_KERNELS takes the place of "auto". Raises ValueError on an unknown name and on a request
    that the device or the dtype does not allow.
    """
    if request == "auto":
        request = os.environ.get("UNIVIGU_KERNELS", "auto")
    wanted, device = _parse(request), torch.device(device)
    chosen = {name: _choose(op, wanted.get(name), device, dtype) for name, op in OPS.items()}
    calls = {name: backend.call for name, (backend, _) in chosen.items()}
    return Ops(**calls, table=tuple(choice for _, choice in chosen.values()))


def explain(ops: Ops | None = None, device="cpu", dtype: torch.dtype = torch.float32) -> str:
    """The table of `ops`, or of what bind("auto", device, dtype) would choose."""
    table = (ops or bind("auto", device, dtype)).table
    rows = [("op", "backend", "rejected")]
    for choice in table:
        reasons = "; ".join(f"{name}: {why}" for name, why in choice.rejected)
        rows.append((choice.op, choice.backend, reasons or "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
    return "\n".join([*lines, f"triton {triton_version() or 'not installed'}"])
