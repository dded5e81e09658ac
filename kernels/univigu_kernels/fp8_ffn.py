"""fp8_ffn: routed_ffn with e4m3 operands in both of its products.

Formula  y = down(q(gelu(up(h)))): h comes with a scale per row, weights with one per output
         channel; q gives each 128 columns of a hidden row the scale amax / 448 (1 where all are 0).
Gradient none here, as fp8_linear.
Library  torch._scaled_mm (backend "torch") takes one scale a row, so q there gives a whole hidden
         row amax / 448, and a = up(h) comes out of the first product in bf16: one rounding more.
         e4m3 keeps its 3 bits down to amax / 28,672 of a row, and nothing below amax / 458,752: a
         row with numbers so far apart is worse off than with a scale per 128 columns.
Dtypes   e4m3 in, fp32 accumulation, scales, bias and gelu (tanh), `out_dtype` out: two roundings,
         to e4m3 and to `out_dtype`. A tensor core's sums of fp8 products (13 bits) go to fp32
         every 128 columns in the second product, in the first as in fp8_linear.
Saved    nothing.
Bytes    D + 4 per row in, 2(F + F/32) for hidden rows out and in, 2D out in bf16; 4DF for the
         experts.
Bound    tensor cores: 4DF FLOP per row, at twice the rate of bf16.
Given up a scale per hidden row would need the row's amax, which spans F/128 tiles: another launch
         or atomics. A scale per 128 columns needs neither and is finer, for 1/32 more bytes and,
         in the second product, a multiply-add per 128 products (DeepGEMM's scheme). e4m3 itself
         costs 2.7% RMS error per operand (Gaussian data). The library has no epilogue with GELU and
         scales: a goes through memory (4F bytes a row) and a kernel of ours between the products.
Legend   B samples, L joint rows [video ; text], V video rows, D width, F hidden width.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._card import card_of
from ._checks import check_video_rows, compute_dtype, require, segments
from ._fp8 import (
    FP8,
    LONG_SUM,
    product_reference,
    quantize_rows,
    quantize_weight,
    supports_triton_fp8,
)
from ._fp8_ffn import GROUP_COLUMNS, fp8_ffn_down, fp8_ffn_up
from ._gelu_rows import gelu_quantized
from ._gemm import first_full, gemm_options, tile_count
from ._problems_ffn import fp8_trials
from ._products import check_scaled_mm, expert_rows, scaled_product, supports_scaled_mm
from ._rows import packed
from ._spec import TEXT_ROWS, Backend, Op, Reason, joint_rows
from ._split import few_rows_product
from ._triton import launch, operator, supports_triton


class Fp8Expert(NamedTuple):
    """up_weight [F, D] e4m3, up_scale [F] fp32, up_bias [F], down_weight [D, F] e4m3, down_scale
    [D] fp32, down_bias [D]; weight ~ fp8 weight * scale[:, None]."""

    up_weight: Tensor
    up_scale: Tensor
    up_bias: Tensor
    down_weight: Tensor
    down_scale: Tensor
    down_bias: Tensor


def check(h: Tensor, h_scale: Tensor, video: Fp8Expert, text: Fp8Expert, video_rows: int) -> None:
    require(
        h.ndim == 3 and h.shape[:2] == h_scale.shape,
        "fp8_ffn: h_fp8 and h_scale",
        "[B, L, D] and [B, L]",
        (list(h.shape), list(h_scale.shape)),
        "Pass both results of adaln, residual_adaln or quantize_rows.",
    )

    check_video_rows("fp8_ffn", video_rows, h.shape[1])

    for name, expert in (("video", video), ("text", text)):
        hidden, width = expert.up_weight.shape
        expected = [(hidden, width), (hidden,), (hidden,), (width, hidden), (width,), (width,)]
        require(
            width == h.shape[2] and [tuple(t.shape) for t in expert] == expected,
            f"fp8_ffn: {name} expert",
            f"[F, {h.shape[2]}], [F], [F], [{h.shape[2]}, F], [D], [D]",
            [list(t.shape) for t in expert],
            "Pass an Fp8Expert: weight, scale and bias of up, then of down.",
        )

    dtypes = {t.dtype for t in (h, *video[::3], *text[::3])}
    require(
        dtypes == {FP8},
        "fp8_ffn: h_fp8 and the experts' weights",
        "float8_e4m3fn",
        sorted(map(str, dtypes)),
        "Use quantize_rows and quantize_weight.",
    )


def _rounded(hidden: Tensor) -> Tensor:
    """hidden [..., F] as its e4m3 values and their scales give it back."""
    padded = F.pad(hidden, (0, -hidden.shape[-1] % GROUP_COLUMNS))
    values, scale = quantize_rows(padded.unflatten(-1, (-1, GROUP_COLUMNS)))
    values = values.to(hidden.dtype) * scale[..., None].to(hidden.dtype)
    return values.flatten(-2)[..., : hidden.shape[-1]]


def _feed_forward(h: Tensor, h_scale: Tensor, expert: Fp8Expert, out_dtype) -> Tensor:
    dtype = compute_dtype(h_scale)
    a = product_reference(h, h_scale, *expert[:3], dtype)
    y = _rounded(F.gelu(a, approximate="tanh")) @ expert.down_weight.to(dtype).T
    y = y * expert.down_scale.to(dtype) + expert.down_bias.to(dtype)
    return y.to(out_dtype)


def fp8_ffn_reference(
    h_fp8_BLD: Tensor,
    h_scale_BL: Tensor,
    video: Fp8Expert,
    text: Fp8Expert,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """h [B, L, D] e4m3 with a scale per row [B, L] fp32 -> y [B, L, D] in `out_dtype`."""
    check(h_fp8_BLD, h_scale_BL, video, text, video_rows)
    if video_rows in (0, h_fp8_BLD.shape[1]):
        return _feed_forward(h_fp8_BLD, h_scale_BL, video if video_rows else text, out_dtype)
    rows = (segments(t, video_rows) for t in (h_fp8_BLD, h_scale_BL))
    experts = zip(*rows, (video, text), strict=True)
    return torch.cat([_feed_forward(*part, out_dtype) for part in experts], 1)


def _up_options(h: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> dict[str, int]:
    """Tiles as wide as a group of hidden columns. 8 warps take 126 registers, so two blocks fit a
    multiprocessor and the epilogue of one runs under the other's products; a long sum needs 218."""
    long_sum = h.shape[-1] > LONG_SUM
    if card_of(h.device).instruction == "mma":
        sizes = [gemm_options(128, GROUP_COLUMNS, 64, 8, 4)]
    else:
        sizes = [gemm_options(128, GROUP_COLUMNS, 128, 8, 4 if long_sum else 3)]
        sizes += [gemm_options(64, GROUP_COLUMNS, 128, 4, 4)]
    chosen = first_full("fp8_ffn_up", h, sizes, rows, columns)
    even = h.shape[-1] % chosen["BLOCK_K"] == 0
    return {**chosen, "EVEN_K": even, "PROMOTE": 512 if long_sum else 0}


def _down_options(hidden: Tensor, rows: tuple[int, int], width: int, F: tuple[int, int]):
    """8 warps hold the tile's sum and the product that is to be scaled and added to it (4 warps, or
    128 x 256, spill 240 accesses)."""
    if card_of(hidden.device).instruction == "mma":
        sizes = [gemm_options(128, 128, 64, 8, 4)]
    else:
        sizes = [gemm_options(128, 128, 128, 8, 4), gemm_options(64, 64, 128, 4, 4)]
    chosen = first_full("fp8_ffn_down", hidden, sizes, rows, (width, width))
    even = all(depth % chosen["BLOCK_K"] == 0 for depth in F)
    return {**chosen, "EVEN_K": even, "COLUMNS": GROUP_COLUMNS}


def _forward(
    h: Tensor,
    h_scale: Tensor,
    video_up: Tensor,
    video_up_scale: Tensor,
    video_up_bias: Tensor,
    video_down: Tensor,
    video_down_scale: Tensor,
    video_down_bias: Tensor,
    text_up: Tensor,
    text_up_scale: Tensor,
    text_up_bias: Tensor,
    text_down: Tensor,
    text_down_scale: Tensor,
    text_down_bias: Tensor,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    h, video_up, video_down, text_up, text_down = map(
        packed, (h, video_up, video_down, text_up, text_down)
    )
    vectors = video_up_scale, text_up_scale, video_up_bias, text_up_bias
    ends = video_down_scale, text_down_scale, video_down_bias, text_down_bias

    (B, L, D), F = h.shape, (video_up.shape[0], text_up.shape[0])
    sizes, rows = (B, video_rows, L - video_rows, D, *F), (B * video_rows, B * (L - video_rows))

    hidden = h.new_empty(B, L, max(F))
    scale = h.new_empty(-(-max(F) // GROUP_COLUMNS), B, L, dtype=torch.float32)
    options = _up_options(h, rows, F)
    launch(
        fp8_ffn_up, (tile_count(rows, F, options),), h, h_scale.contiguous(), video_up, text_up,
        *(t.contiguous() for t in vectors), hidden, scale, *sizes, *h.stride()[:2],
        video_up.stride(0), text_up.stride(0), max(F), **options,
    )  # fmt: skip

    y = h.new_empty(B, L, D, dtype=out_dtype)
    options = _down_options(hidden, rows, D, F)
    launch(
        fp8_ffn_down, (tile_count(rows, (D, D), options),), hidden, scale, video_down, text_down,
        *(t.contiguous() for t in ends), y, *sizes, max(F), video_down.stride(0),
        text_down.stride(0), **options,
    )  # fmt: skip
    return y


def _shaped(h, *rest) -> Tensor:
    return h.new_empty(h.shape, dtype=rest[-1])


forward_op = operator("univigu::fp8_ffn", _forward)
forward_op.register_fake(_shaped)


def fp8_ffn_triton(
    h_fp8_BLD: Tensor,
    h_scale_BL: Tensor,
    video: Fp8Expert,
    text: Fp8Expert,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `fp8_ffn_reference`, in two launches."""
    check(h_fp8_BLD, h_scale_BL, video, text, video_rows)
    return forward_op(h_fp8_BLD, h_scale_BL, *video, *text, video_rows, out_dtype)


def fp8_ffn_torch(
    h_fp8_BLD: Tensor,
    h_scale_BL: Tensor,
    video: Fp8Expert,
    text: Fp8Expert,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `fp8_ffn_reference` but for a scale per hidden row, by torch._scaled_mm, three launches a
    run of rows: bf16 out, D and F multiples of 16."""
    check(h_fp8_BLD, h_scale_BL, video, text, video_rows)
    sizes = h_fp8_BLD.shape[2], video.up_weight.shape[0], text.up_weight.shape[0]
    check_scaled_mm("fp8_ffn", sizes, out_dtype)
    y = h_fp8_BLD.new_empty(h_fp8_BLD.shape, dtype=out_dtype)
    runs = expert_rows((video, text), video_rows, h_fp8_BLD, h_scale_BL, y)
    for expert, x, x_scale, y_rows in runs:
        hidden = gelu_quantized(scaled_product(x, x_scale, *expert[:3]))
        scaled_product(*hidden, *expert[3:], out=y_rows)
    return y


def _split(
    h: Tensor,
    h_scale: Tensor,
    video_up: Tensor,
    video_up_scale: Tensor,
    video_up_bias: Tensor,
    video_down: Tensor,
    video_down_scale: Tensor,
    video_down_bias: Tensor,
    text_up: Tensor,
    text_up_scale: Tensor,
    text_up_bias: Tensor,
    text_down: Tensor,
    text_down_scale: Tensor,
    text_down_bias: Tensor,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    video = video_up, video_up_scale, video_up_bias, video_down, video_down_scale, video_down_bias
    text = text_up, text_up_scale, text_up_bias, text_down, text_down_scale, text_down_bias

    y = h.new_empty(h.shape, dtype=out_dtype)
    for expert, x, x_scale, y_rows in expert_rows((video, text), video_rows, h, h_scale, y):
        up, up_scale, up_bias, down, down_scale, down_bias = expert
        a = few_rows_product(x, up, up_bias, (x_scale, up_scale), out_dtype=out_dtype)
        hidden, scale = gelu_quantized(a)
        few_rows_product(hidden, down, down_bias, (scale, down_scale), out=y_rows)
    return y


split_op = operator("univigu::split_fp8_ffn", _split)
split_op.register_fake(_shaped)


def fp8_ffn_split(
    h_fp8_BLD: Tensor,
    h_scale_BL: Tensor,
    video: Fp8Expert,
    text: Fp8Expert,
    video_rows: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `fp8_ffn_torch`, its products split along the sums."""
    check(h_fp8_BLD, h_scale_BL, video, text, video_rows)
    return split_op(h_fp8_BLD, h_scale_BL, *video, *text, video_rows, out_dtype)


def supports_torch(device: torch.device, dtype: torch.dtype) -> Reason:
    """What torch._scaled_mm, or the kernel between its two products, lacks; or None."""
    return supports_scaled_mm(device, dtype) or supports_triton(device, dtype)


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: all rows, and the text rows alone, those
    of a step of v2t over a cached video."""
    B, V, T, D, F = (case[name] for name in "BVTDF")

    def empty(*shape, dtype=torch.float32):
        return torch.empty(*shape, device="meta", dtype=dtype)

    def linear(*shape):
        bias = empty(shape[0], dtype=torch.bfloat16)
        return empty(*shape, dtype=FP8), empty(shape[0]), bias

    expert = Fp8Expert(*linear(F, D), *linear(D, F))
    for video_rows in (V, 0):
        L = video_rows + T
        h = empty(B, L, D, dtype=FP8)
        _forward(h, empty(B, L), *expert, *expert, video_rows, torch.bfloat16)
    gelu_quantized(empty(V, F, dtype=torch.bfloat16))
    h = empty(B, T, D, dtype=FP8)
    _split(h, empty(B, T), *expert, *expert, 0, torch.bfloat16)


def example(device, dtype, generator):
    """Whole numbers up to 7 as operands of the first product: sums are exact in a tensor core's 13
    bits too, so hidden rows round to e4m3 the same way everywhere."""

    def whole(*shape):
        x = torch.randint(-7, 8, shape, generator=generator).double()
        x[..., 0] = 7
        return x

    def expert(hidden):
        up, down = whole(hidden, 32) / 32, torch.randn(32, hidden, generator=generator)
        biases = (torch.randn(n, generator=generator).to(dtype) for n in (hidden, 32))
        parts = *quantize_weight(up), next(biases), *quantize_weight(down), next(biases)
        return Fp8Expert(*(t.to(device) for t in parts))

    h = quantize_rows(whole(2, 29, 32) / 8)
    return (*(t.to(device) for t in h), expert(144), expert(48), 24, dtype), {}


OP = Op(
    name="fp8_ffn",
    backends=(
        Backend("triton", fp8_ffn_triton, supports_triton_fp8, auto_on=("cuda",)),
        Backend("torch", fp8_ffn_torch, supports_torch, auto_on=()),
        Backend("split", fp8_ffn_split, supports_triton_fp8, auto_on=(), kinds=(TEXT_ROWS,)),
        Backend("reference", fp8_ffn_reference),
    ),
    example=example,
    bytes=lambda c: (
        joint_rows(c) * (3 * c["D"] + 4 + 2 * c["F"] + c["F"] // 16) + 4 * c["D"] * c["F"]
    ),
    flops=lambda c: 4 * joint_rows(c) * c["D"] * c["F"],
    differentiable=False,
    rehearse=rehearse,
    trials=fp8_trials(Fp8Expert, fp8_ffn_reference),
)
