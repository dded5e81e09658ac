"""Errors in one format, and the dtype in which a reference computes."""

import torch
from torch import Tensor


def require(holds: bool, subject: str, rule: str, got: object, step: str) -> None:
    """Raises ValueError `<op>: <tensor> must be <rule>; got <got>. <step>` unless `holds`.

    `subject` is `<op>: <tensor>`. Where a check runs many times in a step, return before the words
    are made: they take longer than the check.
    """
    if not holds:
        raise ValueError(f"{subject} must be {rule}; got {got}. {step}")


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 stays float64, everything else is computed in float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def segments(x: Tensor, video_rows: int) -> tuple[Tensor, Tensor]:
    """Views of the video rows and the text rows of x [B, L, ...].

    By `split`, whose gradient is one concatenation; two slices each fill a zeroed tensor of L rows
    and add, a quarter of a small model's training step on a CPU.
    """
    return x.split([video_rows, x.shape[1] - video_rows], 1)


def check_video_rows(what: str, video_rows: int, rows: int) -> None:
    require(
        0 <= video_rows <= rows,
        f"{what}: video_rows",
        f"between 0 and the {rows} joint rows",
        video_rows,
        "Pass the number of leading video rows.",
    )


def check_modulation(what: str, name: str, mod: Tensor, batch: int, width: int) -> None:
    """`mod` is [1 or B, 1 or 2, D]: per sample and per modality, or shared."""
    shape = tuple(mod.shape)
    if len(shape) == 3 and shape[0] in (1, batch) and shape[1] in (1, 2) and shape[2] == width:
        return
    require(
        False,
        f"{what}: {name}",
        f"[1 or {batch}, 1 or 2, {width}]",
        list(shape),
        "Index 0 of dim 1 is video, 1 is text.",
    )


def wants_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def readable(x: Tensor) -> bool:
    """Whether a check may look at values: on a device it would wait; a compiler's and a dry run's
    tensors have none."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()
