"""e4m3 for those that write it and those that read it: adaln and residual_adaln quantise rows,
fp8_linear and fp8_ffn multiply what is quantised.

Legend   D in, F out.
"""

import torch
from torch import Tensor

from ._card import lacks_nvidia
from ._checks import compute_dtype, require
from ._spec import Reason
from ._triton import supports_triton

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
FP8_CAPABILITY = (8, 9)  # the oldest whose tensor cores take e4m3
LONG_SUM = 2048  # above it a tensor core's 13 bits would lose more than bf16's rounding does


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> (x_fp8 [..., D] e4m3fn, scale [...] fp32), x ~ x_fp8 * scale."""
    x = x.float()
    scale = x.abs().amax(-1) / FP8_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale[..., None]).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def quantize_weight(weight_FD: Tensor) -> tuple[Tensor, Tensor]:
    """weight [F, D] -> (w_fp8 [F, D], scale [F] fp32), one scale per output channel."""
    return quantize_rows(weight_FD)


def product_reference(
    x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype
) -> Tensor:
    """x_fp8 [..., D], x_scale [...], w_fp8 [F, D], w_scale [F], bias [F] or None -> [..., F]."""
    dtype = compute_dtype(x_scale)
    y = x_fp8.to(dtype) @ w_fp8.to(dtype).T
    y = y * x_scale[..., None] * w_scale.to(dtype)
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(out_dtype)


def supports_triton_fp8(device: torch.device, dtype: torch.dtype) -> Reason:
    """What the Triton backend lacks, or None. fp32 results would show a tensor core's 13 bits."""
    reason = supports_triton(device, dtype)
    if reason or device.type != "cuda":
        return reason
    if reason := lacks_nvidia(device, FP8_CAPABILITY):
        return reason
    return "needs float16 or bfloat16 on a GPU" if dtype == torch.float32 else None


def forbid_fp8_gradient(what: str, out_dtype: torch.dtype, inputs) -> None:
    require(
        out_dtype != FP8 or not any(t is not None and t.requires_grad for t in inputs),
        f"{what}: out_dtype",
        "a differentiable dtype where gradients are wanted",
        out_dtype,
        "Call it under torch.no_grad().",
    )


def forbid_fp8(what: str, out_dtype: torch.dtype) -> None:
    if out_dtype == FP8:
        raise ValueError(
            f"{what}: out_dtype must be float32 or bfloat16 in the backend cpu; got {out_dtype}. "
            f"Request {what}=reference."
        )
