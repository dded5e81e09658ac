"""What a trial asks of routed_ffn and fp8_ffn: a tail, rows of one modality alone, a row of NaN;
then the model's own shape.

Legend   as in _spec; L = V + T joint rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._fp8 import FP8, quantize_rows, quantize_weight
from ._problems import compared_rows, normal, only_at, whole, with_gradients
from ._products import feed_forward
from ._spec import ALL_ROWS, TEXT_ROWS, TRAINING, Case, Problem, Trials

SMALL = (("a tail", 3, 137, 5), ("no video rows", 2, 0, 37), ("no text rows", 2, 37, 0))  # B, V, T


def _experts(randn: Callable, D: int, hidden: tuple[int, int]) -> list[Tensor]:
    """up_weight [F, D], up_bias [F], down_weight [D, F], down_bias [D] of the video's expert, then
    of the text's."""

    def weight(rows: int, columns: int) -> Tensor:
        return randn(rows, columns) / columns**0.5

    return [x for rows in hidden for x in (weight(rows, D), randn(rows), weight(D, rows), randn(D))]


def _with_leaves(expert: type, call: Callable) -> Callable:
    """`call` with the tensors of both experts one by one, as gradients want them."""

    def flat(h: Tensor, *rest) -> Tensor:
        *leaves, video_rows = rest
        return call(h, expert(*leaves[:4]), expert(*leaves[4:]), video_rows)

    return flat


def _small(
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

    return [*(problem(*shape) for shape in SMALL), beside_nan()]


def _sizes(case: Case, kind: str) -> tuple[int, int, int, int, int]:
    """B, V, T, D and F of the model's own shape; text rows alone have no video."""
    B, V, T, D, hidden = (case[letter] for letter in "BVTDF")
    return B, 0 if kind == TEXT_ROWS else V, T, D, hidden


def _real(
    expert: type, reference: Callable, case: Case, kind: str, device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    B, V, T, D, hidden = _sizes(case, kind)
    randn = normal(device, dtype)
    h, weights = randn(B, V + T, D), _experts(randn, D, (hidden, hidden))
    rows = compared_rows(V + T, V, device)
    video = int((rows < V).sum())

    dense = randn(B, V + T, D) if kind == TRAINING else None
    sparse = None if dense is None else only_at(rows, dense)

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


def _fp8_problem(name, expert: type, reference, h, weights, V, rows, video, dtype) -> Problem:
    """Returns (the problem, the call to be timed). The truth takes the hidden rows unrounded: a
    backend may scale them as it likes before it rounds, if it errs no more than the reference."""
    values, scale = quantize_rows(h)
    stored, dequantised = [], []
    for x in weights:
        parts = quantize_weight(x) if x.ndim == 2 else (x,)
        stored += parts
        dequantised.append(parts[0].float() * parts[1][:, None] if x.ndim == 2 else x)
    experts = expert(*stored[:6]), expert(*stored[6:])

    def timed(call: Callable) -> Tensor:
        return call(values, scale, *experts, V, dtype)

    def run(call: Callable) -> list[Tensor]:
        return [timed(call)[:, rows]]

    def plain(wide: torch.dtype) -> list[Tensor]:
        if wide == dtype:
            some = values.view(torch.uint8)[:, rows].view(FP8)  # e4m3 has no index of its own
            return [reference(some, scale[:, rows], *experts, video, dtype)]
        leaves = [x.to(wide) for x in dequantised]
        parts = (values.to(wide)[:, rows] * scale[:, rows, None].to(wide)).tensor_split([video], 1)
        halves = zip(parts, (leaves[:4], leaves[4:]), strict=True)
        return [torch.cat([feed_forward(part, *half) for part, half in halves], 1)]

    return Problem(name, run, plain), timed


def _small_fp8(
    expert: type, reference, case: Case, kind: str, device, dtype: torch.dtype
) -> list[Problem]:
    randn, D = normal(device, dtype), 64

    def problem(name: str, B: int, V: int, T: int) -> Problem:
        h, weights = randn(B, V + T, D), _experts(randn, D, (144, 80))
        rows = torch.arange(V + T, device=device)
        return _fp8_problem(name, expert, reference, h, weights, V, rows, V, dtype)[0]

    return [problem(*shape) for shape in SMALL]


def _real_fp8(
    expert: type, reference, case: Case, kind: str, device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    B, V, T, D, hidden = _sizes(case, kind)
    randn = normal(device, dtype)
    h, weights = randn(B, V + T, D), _experts(randn, D, (hidden, hidden))
    rows = compared_rows(V + T, V, device)
    video = int((rows < V).sum())
    made = expert, reference, h, weights, V, rows, video, dtype
    return _fp8_problem("the model's shape", *made)


def routed_trials(expert: type, reference: Callable) -> Trials:
    made = expert, reference
    kinds = ALL_ROWS, TEXT_ROWS, TRAINING
    return Trials(kinds, ("bf16",), partial(_small, *made), partial(_real, *made))


def fp8_trials(expert: type, reference: Callable) -> Trials:
    made = expert, reference
    kinds = ALL_ROWS, TEXT_ROWS
    return Trials(kinds, ("fp8",), partial(_small_fp8, *made), partial(_real_fp8, *made))
