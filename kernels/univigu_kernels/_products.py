"""Products of the vendor's library for the feed-forward operations: bf16 with bias and GELU in the
epilogue, e4m3 with a scale per row and per channel.

Legend   B samples, V video rows of a sample, D in, F out.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ._card import lacks_nvidia
from ._checks import require, segments
from ._fp8 import FP8_CAPABILITY, LONG_SUM
from ._spec import Reason

STREAM_BOUND = 2, 12  # before this torch, what `supports_scaled_mm` says of compute capability 8.9


def supports_cublaslt(device: torch.device, dtype: torch.dtype) -> Reason:
    """What the GELU epilogue lacks, or None. In float32 its tanh has not been compared."""
    if device.type != "cuda":
        return "needs a CUDA device (elsewhere PyTorch's epilogue takes the GELU of erf)"
    if reason := lacks_nvidia(device):
        return reason
    half = dtype in (torch.float16, torch.bfloat16)
    return None if half else "needs float16 or bfloat16"


def supports_scaled_mm(device: torch.device, dtype: torch.dtype) -> Reason:
    """What torch._scaled_mm with a scale per row lacks, or None. On compute capability 8.9 torch
    before 2.12 is reported to launch it on the default stream whichever is current (its issue
    177651), where a captured graph loses it."""
    if reason := lacks_nvidia(device, FP8_CAPABILITY):
        return reason
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < STREAM_BOUND and lacks_nvidia(device, (9, 0)):
        return "needs torch 2.12 on compute capability 8.9"
    return None if dtype == torch.bfloat16 else "needs bfloat16"


def expert_rows(experts: tuple, video_rows: int, *tensors: Tensor) -> Iterator[tuple]:
    """Cuts tensors [B, L, ...] into runs of rows that a product takes as one matrix
    -> (the video or the text expert, one view [rows, ...] of each tensor).

    One expert's rows of a sample lie together; those of all samples do only where no row is the
    other expert's (samples that lie apart are then copied). Runs without rows are left out.
    """
    B, L = tensors[0].shape[:2]
    if video_rows in (0, L):
        tensors = tuple(t.flatten(0, 1)[None] for t in tensors)
        B, L, video_rows = 1, B * L, B * video_rows
    parts = zip(*(segments(t, video_rows) for t in tensors), strict=True)
    for expert, part in zip(experts, parts, strict=True):
        for sample in range(B) if part[0].shape[1] else ():
            yield expert, *(t[sample] for t in part)


def feed_forward(h: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """One expert by plain PyTorch, in h's dtype: h [..., D] -> [..., D]."""
    return F.linear(F.gelu(F.linear(h, up, up_bias), approximate="tanh"), down, down_bias)


def _aligned(bias: Tensor) -> Tensor:
    """Bias [F] for an epilogue, which wants it contiguous and reads 16 bytes at a time: PyTorch
    leaves the second unchecked (its pull request 194497: "misaligned address")."""
    offset = bias.storage_offset() * bias.element_size()
    if bias.is_contiguous() and offset % 16 == 0:
        return bias
    return bias.clone(memory_format=torch.contiguous_format)


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x weight^T + bias), the tanh approximation: x [rows, D], weight [F, D] -> [rows, F].

    On CUDA one kernel, which rounds once. Where cuBLASLt is switched off, takes one row alone or
    finds no kernel, PyTorch itself runs a product and the same GELU after it, two roundings.
    """
    if x.device.type == "cpu":  # there _addmm_activation takes the GELU of erf, 5e-4 away
        return F.gelu(F.linear(x, weight, bias), approximate="tanh")
    return torch._addmm_activation(_aligned(bias), x, weight.T, use_gelu=True)


def experts_cublaslt(h: Tensor, video: tuple, text: tuple, video_rows: int) -> Tensor:
    """Both experts, one after the other, into the slices of one y [B, L, D], without gradients.
    h [B, L, D]; an expert is (up_weight, up_bias, down_weight, down_bias)."""
    y = h.new_empty(h.shape)
    for expert, x_rows, y_rows in expert_rows((video, text), video_rows, h, y):
        up_weight, up_bias, down_weight, down_bias = expert
        hidden = product_gelu(x_rows, up_weight, up_bias)
        torch.addmm(_aligned(down_bias), hidden, down_weight.T, out=y_rows)
    return y


def check_scaled_mm(what: str, sizes: tuple[int, ...], out_dtype: torch.dtype) -> None:
    require(
        all(size % 16 == 0 for size in sizes) and out_dtype == torch.bfloat16,
        f"{what}: D, F and out_dtype",
        "multiples of 16 and bfloat16 for torch._scaled_mm",
        (*sizes, out_dtype),
        "Use another backend.",
    )


def scaled_product(
    x_fp8: Tensor,
    x_scale: Tensor,
    w_fp8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """x_fp8 [rows, D], x_scale [rows], w_fp8 [F, D], w_scale [F], bias [F] or None -> [rows, F] in
    bf16, in `out` where one is given. Long sums leave the tensor core's 13 bits on the way."""
    operands = x_fp8.contiguous(), w_fp8.contiguous().t()
    options = {
        "scale_a": x_scale.reshape(-1, 1).contiguous(),
        "scale_b": w_scale.reshape(1, -1).contiguous(),
        "bias": None if bias is None else _aligned(bias.to(torch.bfloat16)),
        "out_dtype": torch.bfloat16,
        "use_fast_accum": x_fp8.shape[-1] <= LONG_SUM,
    }
    if out is None:  # meta tensors, by whose rules a test goes, have no form with `out`
        return torch._scaled_mm(*operands, **options)
    return torch._scaled_mm(*operands, **options, out=out)
