"""What a trial asks of linear: a tail, no bias, a sum that is worth splitting, a row of NaN; then
the model's own projections of text rows, into q, k and v and back.

Legend   as in _spec.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._problems import normal, whole
from ._spec import TEXT_ROWS, Case, Problem, Trials


def _leaves(randn: Callable, rows: tuple[int, ...], D: int, F: int) -> list[Tensor]:
    return [randn(*rows, D), randn(F, D) / D**0.5, randn(F)]


def _small(reference: Callable, case: Case, kind: str, device, dtype: torch.dtype) -> list[Problem]:
    randn = normal(device, dtype)

    def problem(name: str, rows: tuple[int, ...], D: int, F: int, biased: bool = True) -> Problem:
        leaves = _leaves(randn, rows, D, F)
        return whole(name, reference, leaves if biased else leaves[:2], (), {}, None)

    def beside_nan() -> Problem:
        x, *rest = _leaves(randn, (1, 150), 64, 80)
        x[:, -1] = torch.nan

        def run(call: Callable, cast=lambda t: t) -> list[Tensor]:
            return [call(*map(cast, (x, *rest)))[:, :-1]]

        return Problem("a row of NaN", run, lambda wide: run(reference, lambda t: t.to(wide)))

    return [
        problem("a tail", (3, 47), 72, 144),
        problem("no bias", (2, 37), 64, 80, biased=False),
        problem("a long sum", (1, 130), 4136, 192),
        beside_nan(),
    ]


def _real(
    reference: Callable, case: Case, kind: str, device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    rows, D, randn = (case["B"], case["T"]), case["D"], normal(device, dtype)
    products = [_leaves(randn, rows, D, columns) for columns in (3 * D, D)]

    def run(call: Callable, cast=lambda t: t) -> list[Tensor]:
        return [call(*map(cast, leaves)) for leaves in products]

    def plain(wide: torch.dtype) -> list[Tensor]:
        return run(reference, lambda t: t.to(wide))

    return Problem("the model's shape", run, plain), run


def linear_trials(reference: Callable) -> Trials:
    made = partial(_small, reference), partial(_real, reference)
    return Trials((TEXT_ROWS,), ("bf16", "fp8"), *made, reference=True)
