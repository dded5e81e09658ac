"""rms_norm_silu: RMSNorm over the channels of pixels, then SiLU: what stands before nearly every
convolution of the VAE.

Formula  n = x / max(|x|, 1e-12) * sqrt(C) * gamma, |x| over the C channels of a pixel;
         y = n * sigmoid(n)
Gradient none: the VAE is frozen.
Dtypes   any float in, fp32 arithmetic (fp64 for fp64), one rounding at the end.
Saved    nothing.
Bytes    4 per number: bf16 in and out; 8 in fp32.
Bound    memory: 8 FLOP per 4 bytes.
Triton   a program holds all channels of a run of neighbouring pixels, which lie side by side in
         memory, so each number is read once. The layout stays that of the convolutions around it.
CPU      a block of pixels is read twice, the second time from cache; sums over channels are sums of
         vectors of pixels, so no lane waits for another.
Given up torch's own goes through memory seven times: a norm that strides over channels, clamp,
         division, two products, SiLU.
Legend   B samples, C channels, P pixels of all frames.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._compiled import built, supports_cpu
from ._problems import normal, whole
from ._spec import PIXELS, Backend, Op, Trials
from ._triton import configuration, launch, operator, supports_triton, tl, triton

LEAST = 1e-12  # of |x|, as in F.normalize


def check(x: Tensor, gamma: Tensor) -> None:
    require(
        x.ndim >= 3 and gamma.shape == x.shape[1:2],
        "rms_norm_silu: x and gamma",
        "[B, C, ...] and [C]",
        (list(x.shape), list(gamma.shape)),
        "Flatten gamma.",
    )


def rms_norm_silu_reference(x_BCP: Tensor, gamma_C: Tensor) -> Tensor:
    """x [B, C, ...], gamma [C] -> the shape and dtype of x."""
    dtype = compute_dtype(x_BCP)
    return rms_norm_silu_eager(x_BCP.to(dtype), gamma_C.to(dtype)).to(x_BCP.dtype)


def rms_norm_silu_eager(x_BCP: Tensor, gamma_C: Tensor) -> Tensor:
    """As `rms_norm_silu_reference`, every step in the dtype of x."""
    check(x_BCP, gamma_C)
    gamma = gamma_C.view(-1, *[1] * (x_BCP.ndim - 2))
    return F.silu(F.normalize(x_BCP, dim=1) * len(gamma_C) ** 0.5 * gamma)


def supports_wide(device: torch.device, dtype: torch.dtype) -> str | None:
    """In bf16 and fp16 its steps would each be rounded."""
    return None if dtype in (torch.float32, torch.float64) else "needs float32 or float64"


@triton.jit
def _rms_norm_silu(
    x,
    gamma,
    y,
    pixels,
    LEAST: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    b, c = tl.program_id(1).to(tl.int64), tl.arange(0, BLOCK_C)[:, None]
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[None]
    at, inside = (b * C + c) * pixels + p, (c < C) & (p < pixels)

    x_cp = tl.load(x + at, inside, other=0.0).to(tl.float32)
    g_c = tl.load(gamma + c, c < C, other=0.0).to(tl.float32)
    norm_p = tl.maximum(tl.sqrt(tl.sum(x_cp * x_cp, 0)), LEAST)

    n_cp = x_cp * (tl.sqrt(C * 1.0) / norm_p)[None] * g_c
    y_cp = n_cp / (1 + tl.exp(-n_cp))
    tl.store(y + at, y_cp.to(y.dtype.element_ty), inside)


def options(C: int) -> dict[str, int]:
    """At least 32 pixels, a line of memory in fp32; 64 numbers a thread with 384 channels."""
    channels = 1 << (C - 1).bit_length()
    pixels = max(32, 4096 // channels)
    warps = min(8, max(4, channels * pixels // 2048))
    chosen = {"BLOCK_C": channels, "BLOCK_P": pixels, "num_warps": warps}
    return configuration("rms_norm_silu", chosen)


def _forward(x: Tensor, gamma: Tensor) -> Tensor:
    (B, C), pixels = x.shape[:2], x.shape[2:].numel()
    x, gamma, y = x.contiguous(), gamma.contiguous(), x.new_empty(x.shape)
    chosen = options(C)
    grid = triton.cdiv(pixels, chosen["BLOCK_P"]), B
    launch(_rms_norm_silu, grid, x, gamma, y, pixels, LEAST=LEAST, C=C, **chosen)
    return y


forward_op = operator("univigu::rms_norm_silu", _forward)
forward_op.register_fake(lambda x, gamma: x.new_empty(x.shape))


def rms_norm_silu_triton(x_BCP: Tensor, gamma_C: Tensor) -> Tensor:
    """As `rms_norm_silu_reference`, in one launch."""
    check(x_BCP, gamma_C)
    return forward_op(x_BCP, gamma_C)


def rms_norm_silu_cpu(x_BCP: Tensor, gamma_C: Tensor) -> Tensor:
    """As `rms_norm_silu_reference`, in one pass over memory."""
    check(x_BCP, gamma_C)
    return torch.ops.univigu_C.rms_norm_silu(x_BCP, gamma_C)


if built():

    @torch.library.register_fake("univigu_C::rms_norm_silu")
    def _(x, gamma):
        return x.new_empty(x.shape)


def rehearse(case) -> None:
    """The launches of Wan's VAE on meta tensors, in fp32: its widths, at one of its sizes."""
    for channels in (96, 192, 384):
        x = torch.empty(1, channels, 4, 240, 416, device="meta")
        _forward(x, x[0, :, 0, 0, 0])


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    return (randn(2, 24, 3, 5, 7), randn(24)), {}


def small_problems(case, kind, device, dtype):
    """Widths that are no power of two, pixels that fill no block, a pixel of zeros, and one whose
    squares are small."""
    randn = normal(device, dtype)
    problems = []
    for channels, pixels in ((96, (3, 7, 11)), (384, (1, 5, 33)), (16, (4, 64, 64))):
        x = randn(2, channels, *pixels)
        x[:, :, 0, 0, 0] = 0
        x[:, :, 0, 1, 1] *= 1e-6
        leaves, name = [x, randn(channels)], f"{channels} channels of {pixels} pixels"
        problems.append(whole(name, rms_norm_silu_reference, leaves, (), {}, None))
    return problems


def real_problem(case, kind, device, dtype):
    """Four frames of 240 x 416 pixels at the VAE's widest picture, of `case`'s C channels."""
    randn = normal(device, dtype)
    leaves = randn(1, case["C"], 4, 240, 416), randn(case["C"])
    problem = whole("its own shape", rms_norm_silu_reference, [*leaves], (), {}, None)
    return problem, lambda call: call(*leaves)


OP = Op(
    name="rms_norm_silu",
    backends=(
        Backend("triton", rms_norm_silu_triton, supports_triton, auto_on=()),
        Backend("cpu", rms_norm_silu_cpu, supports_cpu),
        Backend("eager", rms_norm_silu_eager, supports_wide, auto_on=("cuda",)),
        Backend("reference", rms_norm_silu_reference),
    ),
    example=example,
    bytes=lambda c: 4 * 96 * 256 * c["B"] * c["V"],  # a video row is 256 pixels of one frame in 4
    flops=lambda c: 8 * 96 * 256 * c["B"] * c["V"],
    differentiable=False,
    rehearse=rehearse,
    trials=Trials((PIXELS,), ("bf16",), small_problems, real_problem),
)
