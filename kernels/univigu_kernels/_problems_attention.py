"""What a trial asks of joint and of cross attention: a tail, lengths with 0, NaN in the padding,
few queries, few keys; then the model's own shape.

Legend   as in _spec; L = V + T joint rows.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._attention import attend_reference
from ._problems import compared_rows, normal, only_at, whole, with_gradients
from ._spec import ALL_ROWS, TEXT_QUERIES, TRAINING, Case, Problem, Trials

TOGETHER = 64  # rows that plain attention takes at a time: [B, H, 64, L] scores


def _joint_small(
    reference: Callable, case: Case, kind: str, device: torch.device, dtype: torch.dtype
) -> list[Problem]:
    """A tail; lengths with 0; NaN in the padding; few queries. In training all have lengths on the
    device, elsewhere those that have any have them on the host."""
    randn, H, K = normal(device, dtype), 2, case["K"]
    training = kind == TRAINING

    def problem(name, B, V, T, lengths, queries=None, nan=False, **options) -> Problem:
        L = V + T
        qkv = [randn(B, rows, H, K) for rows in (queries or L, L, L)]
        if training and lengths is None:
            lengths = [T] * B
        if lengths is not None:
            options["text_lengths"] = torch.tensor(lengths, device=device if training else "cpu")
        if nan:
            for x in qkv:
                for sample, length in enumerate(lengths):
                    x[sample, x.shape[1] - (T - length) :] = torch.nan
        cotangent = randn(*qkv[0].shape) if training else None
        return whole(name, reference, qkv, (V,), options, cotangent)

    return [
        problem("a tail", 1, 200, 37, None),
        problem("lengths with 0", 3, 70, 37, [37, 0, 5], video_sees_text=False),
        problem("NaN in the padding", 2, 150, 40, [7, 33], nan=True),
        problem("few queries", 2, 700, 20, [20, 11], queries=20),
    ]


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, do: Tensor | None) -> list[Tensor]:
    """o, and with do the gradients of q, k and v, TOGETHER rows of q at a time."""
    if do is None:
        return [torch.cat([attend_reference(rows, k, v) for rows in q.split(TOGETHER, 1)], 1)]

    outputs, dq, dk, dv = [], [], torch.zeros_like(k), torch.zeros_like(v)
    for rows, cotangent in zip(q.split(TOGETHER, 1), do.split(TOGETHER, 1), strict=True):
        o, *gradients = with_gradients(attend_reference, (rows, k, v), (), {}, cotangent)
        outputs.append(o)
        dq.append(gradients[0])
        dk += gradients[1]
        dv += gradients[2]
    return [torch.cat(outputs, 1), torch.cat(dq, 1), dk, dv]


def _at_rows(
    qkv: tuple[Tensor, Tensor, Tensor],
    rest: tuple,
    options: dict,
    rows: Tensor,
    end: int,
    cotangent: Tensor | None,
) -> tuple[Problem, Callable[[Callable], list[Tensor]]]:
    """The real problem call(*qkv, *rest, **options), of which these rows of the queries and the
    keys before `end` are compared, with a cotangent the gradients too; and what is timed."""
    q, k, v = qkv
    sparse = None if cotangent is None else only_at(rows, cotangent)

    def attempt(call: Callable, do: Tensor | None) -> list[Tensor]:
        if do is None:
            return [call(*qkv, *rest, **options)]
        return with_gradients(call, qkv, rest, options, do)

    def run(call: Callable) -> list[Tensor]:
        found = attempt(call, sparse)
        keys = [x[:, :end] for x in found[2:]]
        return [x[:, rows] for x in found[:2]] + keys

    def plain(wide: torch.dtype) -> list[Tensor]:
        do = None if cotangent is None else cotangent[:, rows].to(wide)
        return _plain_attention(*(x.to(wide) for x in (q[:, rows], k[:, :end], v[:, :end])), do)

    return Problem("the model's shape", run, plain), lambda call: attempt(call, cotangent)


def _joint_real(
    case: Case, kind: str, device: torch.device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    """All rows as queries, or the text's alone, or forward and backward with a quarter of the text
    as padding, whose lengths lie on the device."""
    B, V, T, H, K = (case[letter] for letter in "BVTHK")
    randn, L = normal(device, dtype), V + T
    q, k, v = (randn(B, L, H, K) for _ in range(3))
    if kind == TEXT_QUERIES:
        q = q[:, V:]
    options, end, cotangent = {}, L, None
    if kind == TRAINING:
        end, cotangent = L - T // 4, randn(*q.shape)
        options = {"text_lengths": torch.full((B,), T - T // 4, device=device)}
    first = L - q.shape[1]
    rows = compared_rows(end - first, max(0, V - first), device)
    return _at_rows((q, k, v), (V,), options, rows, end, cotangent)


def joint_attention_trials(reference: Callable) -> Trials:
    kinds = ALL_ROWS, TEXT_QUERIES, TRAINING
    return Trials(kinds, ("bf16", "fp8"), partial(_joint_small, reference), _joint_real)


def _cross_small(
    reference: Callable, case: Case, kind: str, device: torch.device, dtype: torch.dtype
) -> list[Problem]:
    """A tail; few queries; few keys, the last of which counts often where no gradient is wanted."""
    randn, H, K = normal(device, dtype), 2, case["K"]
    training = kind == TRAINING

    def problem(name, B, L, C, **options) -> Problem:
        qkv = [randn(B, rows, H, K) for rows in (L, C, C)]
        cotangent = randn(*qkv[0].shape) if training else None
        return whole(name, reference, qkv, (), options, cotangent)

    often = {} if training else {"repeats": 473}
    return [
        problem("a tail", 2, 237, 177),
        problem("few queries", 2, 20, 512),
        problem("few keys", 2, 150, 40, **often),
    ]


def _cross_real(
    case: Case, kind: str, device: torch.device, dtype: torch.dtype
) -> tuple[Problem, Callable[[Callable], object]]:
    """All rows against all of the context. Sampling is timed with a short prompt's keys too, of
    which the last stands for the padding."""
    B, V, T, C, H, K = (case[letter] for letter in "BVTCHK")
    randn, L = normal(device, dtype), V + T
    q, k, v = (randn(B, rows, H, K) for rows in (L, C, C))
    cotangent = randn(*q.shape) if kind == TRAINING else None
    rows = compared_rows(L, V, device)
    problem, attempt = _at_rows((q, k, v), (), {}, rows, C, cotangent)

    def timed(call: Callable) -> None:
        attempt(call)
        if cotangent is None:
            few = min(64, C)
            call(q, k[:, :few], v[:, :few], C - few + 1)

    return problem, timed


def cross_attention_trials(reference: Callable) -> Trials:
    kinds = ALL_ROWS, TRAINING
    return Trials(kinds, ("bf16", "fp8"), partial(_cross_small, reference), _cross_real)
