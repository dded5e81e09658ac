"""What a trial asks of routed_ffn and fp8_ffn: a tail, rows of one modality alone, a row of NaN;
then the model's own shape.

Legend   as in _spec; L = V + T joint rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ._fp8 import FP8, quantize_rows, quantize_weight
from ._problems import compared_rows, normal, whole, with_gradients
from ._spec import TRAINING, Case, Problem


def _experts(randn: Callable, D: int, hidden: tuple[int, int]) -> list[Tensor]:
    """up_weight [F, D], up_bias [F], down_weight [D, F], down_bias [D] of the video's expert, then
    of the text's."""

    def weight(rows: int, columns: int) -> Tensor:
        return randn(rows, columns) / columns**0.5

    return [x for F in hidden for x in (weight(F, D), randn(F), weight(D, F), randn(D))]


def _with_leaves(expert: type, call: Callable) -> Callable:
    """`call` with the tensors of both experts one by one, as gradients want them."""

    def flat(h: Tensor, *rest) -> Tensor:
        *leaves, video_rows = rest
        return call(h, expert(*leaves[:4]), expert(*leaves[4:]), video_rows)

    return flat


def small_ffn(
    expert: type, reference: Callable, case: Case, kind: str, device, dtype: torch.dtype
) -> list[Problem]:
    """Experts of unequal width. A row of NaN, as padding may be, must stay alone in the results; it
    may not in the gradients of weights."""
    randn, D = normal(device, dtype), 64

    def problem(name: str, B: int, V: int, T: int) -> Problem:
        leaves = [randn(B, V + T, D), *_experts(randn, D, (144, 80))]
        cotangent = randn(B, V + T, D) if kind == TRAINING else None
        found = whole(name, _with_leaves(expert, reference), leaves, (V,), {}, cotangent)
        return found._replace(run=lambda call: found.run(_with_leaves(expert, call)))

    def beside_nan() -> Problem:
        h, (*weights,) = randn(1, 150, D), _experts(randn, D, (144, 80))
        h[:, -1] = torch.nan

        def run(call: Callable, cast=lambda x: x) -> list[Tensor]:
            flat = _with_leaves(expert, call)
            return [flat(cast(h), *map(cast, weights), 120)[:, :-1]]

        return Problem("a row of NaN", run, lambda wide: run(reference, lambda x: x.to(wide)))

    return [
        problem("a tail", 3, 137, 5),
        problem("no video rows", 2, 0, 37),
        problem("no text rows", 2, 37, 0),
        beside_nan(),
    ]


def real_ffn(
    expert: type, reference: Callable, case: Case, kind: str, device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    B, V, T, D, F = (case[letter] for letter in "BVTDF")
    randn = normal(device, dtype)
    h, weights = randn(B, V + T, D), _experts(randn, D, (F, F))
    rows = compared_rows(V + T, V, device)
    video = int((rows < V).sum())

    dense = randn(B, V + T, D) if kind == TRAINING else None
    sparse = None
    if dense is not None:
        sparse = torch.zeros_like(dense).index_copy_(1, rows, dense[:, rows])

    def attempt(call: Callable, do: Tensor | None) -> list[Tensor]:
        flat = _with_leaves(expert, call)
        if do is None:
            return [flat(h, *weights, V)]
        return with_gradients(flat, (h, *weights), (V,), {}, do)

    def run(call: Callable) -> list[Tensor]:
        found = attempt(call, sparse)
        return [x[:, rows] for x in found[:2]] + found[2:]

    def plain(wide: torch.dtype) -> list[Tensor]:
        flat = _with_leaves(expert, reference)
        leaves = [h[:, rows].to(wide), *(x.to(wide) for x in weights)]
        if dense is None:
            return [flat(*leaves, video)]
        return with_gradients(flat, leaves, (video,), {}, dense[:, rows].to(wide))

    return Problem("the model's shape", run, plain), lambda call: attempt(call, dense)


def _fp8_problem(name, expert: type, references, h, weights, V, rows, video, dtype) -> Problem:
    """references: of fp8_ffn, and of routed_ffn with its Expert for the truth, whose hidden rows
    are not rounded: how a backend scales them is its own affair, as long as it errs no more."""
    reference, (exact, exact_expert) = references
    values, scale = quantize_rows(h)
    stored, dequantised = [], []
    for x in weights:
        parts = quantize_weight(x) if x.ndim == 2 else (x,)
        stored += parts
        dequantised.append(parts[0].float() * parts[1][:, None] if x.ndim == 2 else x)
    experts = expert(*stored[:6]), expert(*stored[6:])

    def run(call: Callable) -> list[Tensor]:
        return [call(values, scale, *experts, V, dtype)[:, rows]]

    def plain(wide: torch.dtype) -> list[Tensor]:
        if wide == dtype:
            some = values.view(torch.uint8)[:, rows].view(FP8)  # e4m3 has no index of its own
            return [reference(some, scale[:, rows], *experts, video, dtype)]
        leaves = [x.to(wide) for x in dequantised]
        dequantised_rows = values.to(wide)[:, rows] * scale[:, rows, None].to(wide)
        return [_with_leaves(exact_expert, exact)(dequantised_rows, *leaves, video)]

    return Problem(name, run, plain)


def small_fp8_ffn(
    expert: type, references, case: Case, kind: str, device, dtype: torch.dtype
) -> list[Problem]:
    randn, D = normal(device, dtype), 64

    def problem(name: str, B: int, V: int, T: int) -> Problem:
        h, weights = randn(B, V + T, D), _experts(randn, D, (144, 80))
        rows = torch.arange(V + T, device=device)
        return _fp8_problem(name, expert, references, h, weights, V, rows, V, dtype)

    return [
        problem("a tail", 3, 137, 5),
        problem("no video rows", 2, 0, 37),
        problem("no text rows", 2, 37, 0),
    ]


def real_fp8_ffn(
    expert: type, references, case: Case, kind: str, device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    B, V, T, D, F = (case[letter] for letter in "BVTDF")
    randn = normal(device, dtype)
    h, weights = randn(B, V + T, D), _experts(randn, D, (F, F))
    rows = compared_rows(V + T, V, device)
    video = int((rows < V).sum())
    every = torch.arange(V + T, device=device)

    made = (expert, references, h, weights, V)
    problem = _fp8_problem("the model's shape", *made, rows, video, dtype)
    timed = _fp8_problem("", *made, every, V, dtype)
    return problem, timed.run
