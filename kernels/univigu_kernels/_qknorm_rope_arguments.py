"""The arguments of qknorm_rope: their check, and where a call keeps k and v.

Legend   as in qknorm_rope.py.
"""

from typing import NamedTuple

from torch import Tensor

from ._checks import require, wants_gradients
from ._rotary import Rotary, check_rotary


class Into(NamedTuple):
    """Where k and v of a call are kept, in inference.

    v_BLD: the rows of v; a strided view is fine.
    k_BLHK, v_BLHK: views that get k and v, of their dtype; a row's heads lie side by side.
    """

    v_BLD: Tensor
    k_BLHK: Tensor
    v_BLHK: Tensor

    def keep(self, k_BLHK: Tensor) -> Tensor:
        """Copies this k and v to their views and returns that of k."""
        self.v_BLHK.copy_(self.v_BLD.unflatten(-1, self.v_BLHK.shape[2:]))
        return self.k_BLHK.copy_(k_BLHK)


def check_into(q: Tensor, k: Tensor, heads: int, into: Into) -> None:
    (B, L, D), what = q.shape, "qknorm_rope"
    require(
        into.v_BLD.shape == q.shape and into.v_BLD.dtype == q.dtype,
        f"{what}: into.v_BLD",
        f"[{B}, {L}, {D}] and {q.dtype}, as q",
        (list(into.v_BLD.shape), into.v_BLD.dtype),
        "Pass the projections of the same rows.",
    )

    for name, view in (("k_BLHK", into.k_BLHK), ("v_BLHK", into.v_BLHK)):
        fits = view.shape == (B, L, heads, D // heads) and view.dtype == q.dtype
        require(
            fits and view.stride()[2:] == (D // heads, 1),
            f"{what}: into.{name}",
            f"[{B}, {L}, {heads}, {D // heads}], {q.dtype}, its heads side by side",
            (list(view.shape), view.dtype, view.stride()),
            "Pass a slice of rows of a contiguous cache.",
        )

    require(
        not wants_gradients(q, k, into.v_BLD),
        f"{what}: into",
        "None where gradients are wanted",
        "views",
        "Call it under torch.no_grad().",
    )


def check(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    into: Into | None,
) -> None:
    what = "qknorm_rope"
    require(
        q.ndim == 3 and q.shape == k.shape and q.dtype == k.dtype,
        f"{what}: q and k",
        "two tensors of one shape [B, L, D] and one dtype",
        (list(q.shape), list(k.shape), q.dtype, k.dtype),
        "Pass the projections of the same rows.",
    )

    width = q.shape[2]

    require(
        weight_q.shape == weight_k.shape == (width,) and weight_q.dtype == weight_k.dtype,
        f"{what}: weight_q and weight_k",
        f"[{width}] and of one dtype",
        (list(weight_q.shape), list(weight_k.shape), weight_q.dtype, weight_k.dtype),
        "The norm spans all heads.",
    )
    require(
        heads > 0 and width % heads == 0,
        f"{what}: heads",
        f"a divisor of the width {width}",
        heads,
        "Take heads from the model's configuration.",
    )

    check_rotary(what, q.shape[1], width // heads, rotary)
    if into is not None:
        check_into(q, k, heads, into)
