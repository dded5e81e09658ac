"""What the problems of a trial share: random inputs, the rows that are compared, gradients.

Of a model's own shape 256 rows are compared. Its gradients are compared without the whole problem
in float32: the cotangent is zero but on the compared rows, so theirs is all that the other
gradients are made of.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._spec import Problem

COMPARED = 256  # rows of a real shape
TILE = 128  # the rows of most tiles; an edge of these is one of the smaller ones too


def normal(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """Calls randn with a generator of its own, so the process's generators are left alone."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return randn


def compared_rows(rows: int, edge: int, device: torch.device) -> Tensor:
    """At most COMPARED of them, in order: the first and last, those at the edge of the modalities,
    and the two at each of many edges of tiles, spread over all."""
    near = COMPARED // 8
    chosen = {*range(near), *range(rows - near, rows), *range(edge - near, edge + near)}

    tiles = range(TILE, rows, TILE)
    room = COMPARED - 4 * near
    step = -(-2 * len(tiles) // room) or 1
    chosen |= {row for start in tiles[::step] for row in (start - 1, start)}
    return torch.tensor(sorted(chosen & {*range(rows)}), dtype=torch.int64, device=device)


def only_at(rows: Tensor, dense: Tensor) -> Tensor:
    """dense [B, L, ...] on these rows, zeros elsewhere."""
    return torch.zeros_like(dense).index_copy_(1, rows, dense[:, rows])


def with_gradients(
    call: Callable, leaves: Sequence[Tensor], rest: tuple, options: dict, cotangent: Tensor
) -> list[Tensor]:
    """call(*leaves, *rest, **options) and the gradients of the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    with torch.enable_grad():
        result = call(*leaves, *rest, **options)
    wanted = {"allow_unused": True, "materialize_grads": True}  # an expert may have no rows
    gradients = torch.autograd.grad(result, leaves, cotangent.to(result.dtype), **wanted)
    return [result.detach(), *gradients]


def whole(
    name: str,
    reference: Callable,
    leaves: Sequence[Tensor],
    rest: tuple,
    options: dict,
    cotangent: Tensor | None,
) -> Problem:
    """A small problem: all of its results are compared, and with a cotangent all gradients."""

    def run(call: Callable, leaves=leaves) -> list[Tensor]:
        if cotangent is None:
            return [call(*leaves, *rest, **options)]
        return with_gradients(call, leaves, rest, options, cotangent)

    return Problem(name, run, lambda dtype: run(reference, [x.to(dtype) for x in leaves]))
