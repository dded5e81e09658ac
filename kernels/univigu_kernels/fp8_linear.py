"""fp8_linear: y = (x_fp8 @ w_fp8^T) * x_scale * w_scale + bias, with e4m3 operands.

Scales   one per activation row and one per output channel: scale = amax / 448, 1 for a zero row.
Gradient none here: a training recipe quantises its own operands for each of the three GEMMs.
Dtypes   e4m3 in, fp32 accumulate and scales, `out_dtype` out (one rounding; backend "torch" rounds
         the bias to it too). Tensor cores of sm_89 and sm_90 sum fp8 products in 13 bits, towards
         zero: simulated, a sum of 1536 loses 0.1%, one of 13,824 loses 1%. Sums over more than
         2048 therefore go to fp32 every 512 (0.04%), for one wait and 64 additions a thread.
Saved    nothing.
Bytes    D + 4 per row in, 2F per row out in bf16, D*F for the weight.
Bound    tensor cores above 300 rows on an H100 (590 FLOP per byte), weight bandwidth below.
Given up e4m3 keeps 3 mantissa bits: 2.7% RMS error per row, 3.7% per product (Gaussian data).
Legend   M rows, D in, F out.
"""

import torch
from torch import Tensor

from ._card import card_of
from ._checks import require
from ._fp8 import (
    FP8,
    LONG_SUM,
    product_reference,
    quantize_rows,
    quantize_weight,
    supports_triton_fp8,
)
from ._gemm import first_full, gemm_options, product, quarters, swizzled, tile_count
from ._products import check_scaled_mm, scaled_product, supports_scaled_mm
from ._spec import TEXT_ROWS, Backend, Op, joint_rows
from ._split import few_rows_product
from ._triton import launch, operator, tl, triton


def check(x_fp8, x_scale, w_fp8, w_scale) -> None:
    require(
        x_fp8.dtype == FP8 and w_fp8.dtype == FP8,
        "fp8_linear: x_fp8 and w_fp8",
        "float8_e4m3fn",
        (x_fp8.dtype, w_fp8.dtype),
        "Use quantize_rows and quantize_weight.",
    )
    require(
        x_scale.shape == x_fp8.shape[:-1] and w_scale.shape == w_fp8.shape[:1],
        "fp8_linear: x_scale and w_scale",
        "one number per row and per output channel",
        (list(x_scale.shape), list(w_scale.shape)),
        "Use the scales that came with the operands.",
    )


def fp8_linear_reference(
    x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype
) -> Tensor:
    """x_fp8 [..., D], x_scale [...], w_fp8 [F, D], w_scale [F], bias [F] or None -> [..., F]."""
    check(x_fp8, x_scale, w_fp8, w_scale)
    return product_reference(x_fp8, x_scale, w_fp8, w_scale, bias, out_dtype)


@triton.jit
def _fp8_linear(
    x,
    w,
    x_scale,
    w_scale,
    bias,
    y,
    rows,
    D,
    F,
    x_row,
    w_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROMOTE: tl.constexpr,
    BIAS: tl.constexpr,
):
    i, j = swizzled(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(F, BLOCK_N), GROUP)
    m = (i * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    n = (j * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)

    acc = product(
        x + m * x_row,
        w + n * w_row,
        1,
        m < rows,
        n < F,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        PROMOTE,
    )

    row_scale = tl.load(x_scale + m, m < rows, other=0.0)
    parts = quarters(acc, BLOCK_M, BLOCK_N)
    for part in tl.static_range(4):
        n = j * BLOCK_N + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        y_tile = parts[part] * row_scale[:, None] * tl.load(w_scale + n, n < F, other=0.0)[None, :]
        if BIAS:
            y_tile += tl.load(bias + n, n < F, other=0.0).to(tl.float32)[None, :]
        at = (m * F)[:, None] + n[None, :]
        tl.store(y + at, y_tile.to(y.dtype.element_ty), (m < rows)[:, None] & (n < F)[None, :])


def _configuration(x: Tensor, rows: int, columns: int, long_sum: bool) -> dict[str, int]:
    """128 x 128 with 4 warps, two blocks to a multiprocessor, where one accumulator is enough; 8
    warps hold the two of a long sum. 64 x 64 where those tiles are too few to go round."""
    if card_of(x.device).instruction == "mma":
        sizes = [gemm_options(128, 128, 64, 8, 4)]
    else:
        large = gemm_options(128, 128, 128, 8, 4) if long_sum else gemm_options(128, 128, 128, 4, 3)
        sizes = [large, gemm_options(64, 64, 128, 4, 4)]
    return first_full("fp8_linear", x, sizes, (rows,), (columns,))


def _forward(
    x_fp8: Tensor,
    x_scale: Tensor,
    w_fp8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    D, F = x_fp8.shape[-1], w_fp8.shape[0]
    x, w = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_fp8.reshape(-1, D), w_fp8))
    scales = x_scale.reshape(-1).contiguous(), w_scale.contiguous()

    y = x.new_empty(*x_fp8.shape[:-1], F, dtype=out_dtype)
    rows, long_sum = x.shape[0], D > LONG_SUM
    options = _configuration(x, rows, F, long_sum)

    launch(
        _fp8_linear,
        (tile_count((rows,), (F,), options),),
        x,
        w,
        *scales,
        scales[1] if bias is None else bias.contiguous(),
        y,
        rows,
        D,
        F,
        x.stride(0),
        w.stride(0),
        EVEN_K=D % options["BLOCK_K"] == 0,
        PROMOTE=512 if long_sum else 0,
        BIAS=bias is not None,
        **options,
    )
    return y


def _shaped(x_fp8, x_scale, w_fp8, w_scale, bias, out_dtype) -> Tensor:
    return x_fp8.new_empty(*x_fp8.shape[:-1], w_fp8.shape[0], dtype=out_dtype)


forward_op = operator("univigu::fp8_linear", _forward)
forward_op.register_fake(_shaped)


def fp8_linear_triton(
    x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype
) -> Tensor:
    """As `fp8_linear_reference`, in one launch."""
    check(x_fp8, x_scale, w_fp8, w_scale)
    return forward_op(x_fp8, x_scale, w_fp8, w_scale, bias, out_dtype)


def fp8_linear_torch(
    x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype
) -> Tensor:
    """As `fp8_linear_reference` by torch._scaled_mm: bf16 out, D and F multiples of 16."""
    check(x_fp8, x_scale, w_fp8, w_scale)
    F, D = w_fp8.shape
    check_scaled_mm("fp8_linear", (D, F), out_dtype)
    y = scaled_product(x_fp8.reshape(-1, D), x_scale.reshape(-1), w_fp8, w_scale, bias)
    return y.view(*x_fp8.shape[:-1], F)


def _split(
    x_fp8: Tensor,
    x_scale: Tensor,
    w_fp8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    scales = x_scale.reshape(-1), w_scale
    rows = x_fp8.reshape(-1, x_fp8.shape[-1])
    y = few_rows_product(rows, w_fp8, bias, scales, out_dtype=out_dtype)
    return y.view(*x_fp8.shape[:-1], len(w_fp8))


split_op = operator("univigu::split_fp8_linear", _split)
split_op.register_fake(_shaped)


def fp8_linear_split(
    x_fp8: Tensor, x_scale: Tensor, w_fp8: Tensor, w_scale: Tensor, bias: Tensor | None, out_dtype
) -> Tensor:
    """As `fp8_linear_reference`, split along the sum: for few rows."""
    check(x_fp8, x_scale, w_fp8, w_scale)
    return split_op(x_fp8, x_scale, w_fp8, w_scale, bias, out_dtype)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: both projections of a feed-forward layer
    for all rows, and for the text rows alone."""
    for rows in (case["V"] + case["T"], case["T"]):
        for D, F in ((case["D"], case["F"]), (case["F"], case["D"])):
            x, w = (torch.empty(n, D, device="meta", dtype=FP8) for n in (case["B"] * rows, F))
            x_scale, w_scale = (torch.empty(t.shape[0], device="meta") for t in (x, w))
            bias = torch.empty(F, device="meta", dtype=torch.bfloat16)
            _forward(x, x_scale, w, w_scale, bias, torch.bfloat16)
            if rows == case["T"]:
                _split(x, x_scale, w, w_scale, bias, torch.bfloat16)


def example(device, dtype, generator):
    x = torch.randn(2, 7, 32, generator=generator)
    weight = torch.randn(48, 32, generator=generator)
    bias = torch.randn(48, generator=generator)
    operands = (*quantize_rows(x), *quantize_weight(weight), bias)
    return (*(t.to(device) for t in operands), dtype), {}


OP = Op(
    name="fp8_linear",
    backends=(
        Backend("triton", fp8_linear_triton, supports_triton_fp8, auto_on=("cuda",)),
        Backend("torch", fp8_linear_torch, supports_scaled_mm),
        Backend("split", fp8_linear_split, supports_triton_fp8, auto_on=(), kinds=(TEXT_ROWS,)),
        Backend("reference", fp8_linear_reference),
    ),
    example=example,
    bytes=lambda c: joint_rows(c) * (c["D"] + 4 + 2 * c["F"]) + c["D"] * c["F"] + 4 * c["F"],
    flops=lambda c: 2 * joint_rows(c) * c["D"] * c["F"],
    differentiable=False,
    rehearse=rehearse,
)
