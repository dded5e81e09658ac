"""What every operation declares: its backends, example inputs, real shapes, bytes and FLOPs.

Legend of a case: B samples, V video rows, T text rows, C context rows, D width, H heads,
K head_dim, F hidden width of an expert, N vocabulary rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

Case = Mapping[str, int]
Reason = str | None

_SIZE = {"B": 1, "V": 32760, "T": 256, "C": 512, "K": 128, "N": 256000}
CASES: dict[str, Case] = {
    "wan2.1-1.3b/480x832x81": {**_SIZE, "D": 1536, "H": 12, "F": 8960},
    "wan2.1-14b/480x832x81": {**_SIZE, "D": 5120, "H": 40, "F": 13824},
}


def supports_any(device: torch.device, dtype: torch.dtype) -> Reason:
    """The predicate of a reference: plain PyTorch runs on every device, in every float dtype."""
    return None


@dataclass(frozen=True)
class Backend:
    """One way to run an op. `supports(device, dtype)` returns None, or what the backend needs.
    auto_on: device types on which "auto" takes it; None: all that it supports; (): only by request,
    or where a trial finds it fastest. writes_fp8: its results may be what an fp8 product reads.
    kinds: classes of shapes that a trial takes it for; None: all of the op's.
    """

    name: str
    call: Callable
    supports: Callable[[torch.device, torch.dtype], Reason] = supports_any
    auto_on: tuple[str, ...] | None = None
    writes_fp8: bool = True
    kinds: tuple[str, ...] | None = None


# Classes of shapes for which a trial finds the fastest backend, each for itself.
ALL_ROWS, TEXT_QUERIES, TEXT_ROWS = "all rows", "text queries", "text rows"
TRAINING, PIXELS = "training", "pixels"


class Problem(NamedTuple):
    """What a trial asks of a backend. `run(call)` gives the tensors that are compared: the result,
    then gradients; `plain(dtype)` gives them by plain PyTorch in that dtype."""

    name: str
    run: Callable[[Callable], Sequence[Tensor]]
    plain: Callable[[torch.dtype], Sequence[Tensor]]


@dataclass(frozen=True)
class Trials:
    """How an op's backends are tried, for one of `kinds`.

    `small(case, kind, device, dtype)`: problems with what is rare in real ones. `real(...)`: a
    problem at the case's shape, of which few rows are compared, and `run(call)` to be timed there.
    precisions: of the models that run the op. reference: whether that is a candidate too, where it
    is one call of the vendor's library.
    """

    kinds: tuple[str, ...]
    precisions: tuple[str, ...]
    small: Callable[..., list[Problem]]
    real: Callable[..., tuple[Problem, Callable[[Callable], object]]]
    reference: bool = False


@dataclass(frozen=True)
class Op:
    """One operation. `backends` stand in order of preference; the reference is the last.

    `example(device, dtype, generator)` returns small `(args, kwargs)`; the generator is a CPU one.
    `bytes(case)` counts bf16 activations and weights over an fp32 residual stream, each touched
    once; `flops(case)` counts 2 per multiply-add. Both are for the forward pass.
    `rehearse(case)` makes every Triton launch of the op at the case's shapes, on meta tensors.
    `trials`: where the choice among backends is a timed trial on the user's card.
    """

    name: str
    backends: tuple[Backend, ...]
    example: Callable
    bytes: Callable[[Case], int]
    flops: Callable[[Case], int]
    differentiable: bool = True
    cases: Mapping[str, Case] = field(default_factory=lambda: CASES)
    rehearse: Callable[[Case], None] | None = None
    trials: Trials | None = None

    @property
    def reference(self) -> Callable:
        return self.backends[-1].call

    @property
    def module(self) -> str:
        """The one whose OP this is."""
        return self.example.__module__


def joint_rows(case: Case) -> int:
    """M = B*(V+T)."""
    return case["B"] * (case["V"] + case["T"])
