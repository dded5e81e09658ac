"""qknorm_rope: RMSNorm of q and of k over the full width, then the rotary embedding per head.

Formula  n = x * rsqrt(mean(x^2) + eps) * weight over D = H*K, before the split into heads; then
         rope3d(n). RMSNorm over all heads at once is Wan's, not the per-head norm of others.
Gradient with r = rsqrt(...), g = weight * unrotate(dout): dx = r*g - r^3 * x * mean(g * x);
         dweight = sum_rows unrotate(dout) * x * r
Dtypes   any float in, fp32 statistics and rotation (fp64 for fp64), one rounding at the end.
Saved    q, k and one fp32 number per row and tensor.
Bytes    8D per row: bf16 q and k, in and out. Backward 12D: q, k, their gradients in, dq, dk out.
Bound    memory: 14 FLOP per 8 bytes.
Triton   one launch for q and k, which stay where they are in the packed projections. Pairs are
         parted and joined in registers; angles come from the tables of the axes, a few KiB. While
         a row is worked on, the next two are under way to shared memory.
CPU      the angles of a row are gathered once for all heads of q and k. dweight: a partial sum per
         64 rows, then one over those in order, so that any number of threads gives the same bits.
CUDA     one launch for q and k; a row stays in the registers of a block's warps, a thread's heads
         share its angles. dweight: a partial sum per block, then one over those in order.
Given up nothing.
Legend   B samples, L joint rows [video ; text], D width, H heads, K head_dim.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype, require
from ._compiled import built, supports_cpu, supports_cuda
from ._qknorm_rope import _qknorm_rope_backward, _qknorm_rope_forward
from ._rotary import Rotary, check_rotary, example_rotary, rotary_tables, rotate
from ._rows import packed, row_sizes, tiles_of
from ._spec import Backend, Op, joint_rows
from ._triton import configuration, launch, operator, supports_triton


def check(q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, heads: int, rotary) -> None:
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


def _norm_rope(x: Tensor, weight: Tensor, heads: int, rotary: Rotary, eps: float) -> Tensor:
    dtype = compute_dtype(x)
    x_BLD = F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), eps)
    x_BLHK = x_BLD.unflatten(-1, (heads, x.shape[-1] // heads))
    return rotate(x_BLHK, rotary).to(x.dtype)


def qknorm_rope_reference(
    q_BLD: Tensor,
    k_BLD: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q, k [B, L, D] (strided views are fine), weights [D] -> q, k [B, L, H, K] in their dtype."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary)
    q_BLHK = _norm_rope(q_BLD, weight_q, heads, rotary, eps)
    return q_BLHK, _norm_rope(k_BLD, weight_k, heads, rotary, eps)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << (n - 1).bit_length()


def _sizes(kernel: str, tables, tile: int, channels: int, *streams: Tensor) -> dict[str, int]:
    """Returns the compile-time sizes of a launch, tiles as in `row_configuration`, `channels` a
    thread. 16 lanes span the 128 channels of a head, so the heads that a thread holds share its
    angles."""
    (B, L, D), (t, h, _, text) = streams[0].shape, tables
    pairs, heads = text.shape[1], D // (2 * text.shape[1])
    sizes = {"P_T": t.shape[1], "P_H": h.shape[1], "H": heads, "K": 2 * pairs}
    padded = {"HEADS": power_of_two(heads), "PAIRS": power_of_two(pairs)}
    warps = padded["HEADS"] * padded["PAIRS"] // (16 * channels)
    row = 2 * padded["PAIRS"] * (padded["HEADS"] + 2)  # angles take less than two heads
    chosen = row_sizes(B * L, tile, 3, row, *streams) | {"num_warps": min(16, max(1, warps))}
    return sizes | padded | configuration(kernel, chosen)


def _forward(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    t: Tensor,
    h: Tensor,
    w: Tensor,
    text: Tensor,
    grid: Sequence[int],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k [B, L, H, K], rstd [2, B, L] fp32."""
    B, L, D = q.shape
    K = 2 * text.shape[1]
    q, k = packed(q), packed(k)
    tables = tuple(table.contiguous() for table in (t, h, w, text))

    q_out, k_out = (q.new_empty(B, L, D // K, K) for _ in range(2))
    rstd = q.new_empty(2, B, L, dtype=torch.float32)

    options = _sizes("qknorm_rope_forward", tables, 8, 32, q)
    video_rows = math.prod(grid)

    launch(
        _qknorm_rope_forward,
        (sum(tiles_of(video_rows, L, options["ROWS"])), B, 2),
        q,
        k,
        weight_q.contiguous(),
        weight_k.contiguous(),
        q_out,
        k_out,
        rstd,
        *tables,
        video_rows,
        L,
        *grid[1:],
        *q.stride()[:2],
        *k.stride()[:2],
        eps,
        **options,
    )

    return q_out, k_out, rstd


def _backward(
    q: Tensor,
    k: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    t: Tensor,
    h: Tensor,
    w: Tensor,
    text: Tensor,
    rstd: Tensor,
    dq_out: Tensor,
    dk_out: Tensor,
    grid: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns dq, dk [B, L, D], dweight_q, dweight_k."""
    B, L, D = q.shape
    q, k = packed(q), packed(k)
    tables = tuple(table.contiguous() for table in (t, h, w, text))

    dq, dk = (q.new_empty(B, L, D) for _ in range(2))

    video_rows = math.prod(grid)
    options = _sizes("qknorm_rope_backward", tables, 64, 16, q, dq_out)
    tiles = sum(tiles_of(video_rows, L, options["ROWS"]))
    dweight = q.new_empty(2, B, tiles, D, dtype=torch.float32)

    launch(
        _qknorm_rope_backward,
        (tiles, B, 2),
        q,
        k,
        weight_q.contiguous(),
        weight_k.contiguous(),
        rstd,
        dq_out.contiguous(),
        dk_out.contiguous(),
        dq,
        dk,
        dweight,
        *tables,
        video_rows,
        L,
        *grid[1:],
        *q.stride()[:2],
        *k.stride()[:2],
        **options,
    )

    return dq, dk, *(partial.sum((0, 1)).to(weight_q.dtype) for partial in dweight)


forward_op = operator("univigu::qknorm_rope", _forward)
backward_op = operator("univigu::qknorm_rope_backward", _backward)


@forward_op.register_fake
def _(q, k, weight_q, weight_k, t, h, w, text, grid, eps):
    B, L, D = q.shape
    K = 2 * text.shape[1]
    q_out, k_out = (q.new_empty(B, L, D // K, K) for _ in range(2))
    return q_out, k_out, q.new_empty(2, B, L, dtype=torch.float32)


@backward_op.register_fake
def _(q, k, weight_q, weight_k, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, weight_q, weight_k))


def _save(ctx, inputs, output):
    *tensors, ctx.grid, _ = inputs
    ctx.save_for_backward(*tensors, output[2])


def _differentiate(ctx, dq_out, dk_out, _):
    return *backward_op(*ctx.saved_tensors, dq_out, dk_out, ctx.grid), *[None] * 6


forward_op.register_autograd(_differentiate, setup_context=_save)


def qknorm_rope_triton(
    q_BLD: Tensor,
    k_BLD: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """As `qknorm_rope_reference`, q and k in one launch. The tables are constants: they get no
    gradient."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary)
    grid, *tables = rotary
    return forward_op(q_BLD, k_BLD, weight_q, weight_k, *tables, grid, eps)[:2]


def qknorm_rope_compiled(
    q_BLD: Tensor,
    k_BLD: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """As `qknorm_rope_reference` in fp32 and bf16, on CUDA in fp16 too. The tables are constants:
    they get no gradient."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary)
    grid, *tables = rotary
    q_BLHK, k_BLHK, _ = torch.ops.univigu_C.qknorm_rope(
        q_BLD, k_BLD, weight_q, weight_k, *tables, *grid, eps
    )
    return q_BLHK, k_BLHK


if built():

    @torch.library.register_fake("univigu_C::qknorm_rope")
    def _(q, k, weight_q, weight_k, t, h, w, text, frames, height, width, eps):
        B, L, D = q.shape
        K = 2 * text.shape[1]
        q_out, k_out = (q.new_empty(B, L, D // K, K) for _ in range(2))
        return q_out, k_out, q.new_empty(B, L, 2, dtype=torch.float32)

    @torch.library.register_fake("univigu_C::qknorm_rope_backward")
    def _(q, k, weight_q, weight_k, *rest):
        return tuple(x.new_empty(x.shape) for x in (q, k, weight_q, weight_k))

    def _save_compiled(ctx, inputs, output):
        *tensors, ctx.frames, ctx.height, ctx.width, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])

    def _differentiate_compiled(ctx, dq_out, dk_out, _):
        grid = ctx.frames, ctx.height, ctx.width
        gradients = torch.ops.univigu_C.qknorm_rope_backward(
            *ctx.saved_tensors, dq_out, dk_out, *grid
        )
        return *gradients, *[None] * 8

    torch.library.register_autograd(
        "univigu_C::qknorm_rope", _differentiate_compiled, setup_context=_save_compiled
    )


def rehearse(case) -> None:
    """Every launch at the real shapes, on meta tensors: q and k inside packed bf16 projections."""
    B, V, L, D = case["B"], case["V"], case["V"] + case["T"], case["D"]
    grid = (V // 1560, 30, 52)  # 480x832
    q, k, _ = torch.empty(B, L, 3 * D, dtype=torch.bfloat16, device="meta").chunk(3, -1)
    weights = torch.empty(2, D, device="meta").unbind()
    tables = rotary_tables(grid, case["T"], case["K"], "meta")[1:]
    q_out, k_out, rstd = _forward(q, k, *weights, *tables, grid, 1e-6)
    _backward(q, k, *weights, *tables, rstd, q_out, k_out, grid)


def example(device, dtype, generator):
    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    q, k, _ = randn(2, 29, 96).chunk(3, -1)
    weights = 1 + 0.3 * randn(2, 32)
    return (q, k, *weights, 2, example_rotary(device, dtype)), {}


OP = Op(
    name="qknorm_rope",
    backends=(
        Backend("triton", qknorm_rope_triton, supports_triton, auto_on=("cuda",)),
        # Behind Triton until it is measured beside it on a GPU: the faster one goes first.
        Backend("cuda", qknorm_rope_compiled, supports_cuda),
        Backend("cpu", qknorm_rope_compiled, supports_cpu),
        Backend("reference", qknorm_rope_reference),
    ),
    example=example,
    bytes=lambda c: 8 * joint_rows(c) * c["D"],
    flops=lambda c: 14 * joint_rows(c) * c["D"],
    rehearse=rehearse,
)
