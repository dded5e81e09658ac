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
Into     k and v go where they are wanted, such as the last rows of a cache that attention reads:
         nobody copies them afterwards. Triton and the CPU write them in the same launch; the
         backend cuda and the reference copy.
Given up nothing.
Legend   B samples, L joint rows [video ; text], D width, H heads, K head_dim.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import compute_dtype
from ._compiled import built, supports_cpu, supports_cuda
from ._qknorm_rope import _qknorm_rope_backward, _qknorm_rope_forward
from ._qknorm_rope_arguments import Into, check
from ._rotary import Rotary, example_rotary, rotary_tables, rotate
from ._rows import packed, row_sizes, tiles_of
from ._spec import Backend, Op, joint_rows
from ._triton import configuration, launch, operator, supports_triton


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
    into: Into | None = None,
) -> tuple[Tensor, Tensor]:
    """q, k [B, L, D] (strided views are fine), weights [D] -> q, k [B, L, H, K] in their dtype.

    into: views that get k and v; the k that is returned is the one there. Not where gradients are
    wanted.
    """
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary, into)
    q_BLHK = _norm_rope(q_BLD, weight_q, heads, rotary, eps)
    k_BLHK = _norm_rope(k_BLD, weight_k, heads, rotary, eps)
    return q_BLHK, k_BLHK if into is None else into.keep(k_BLHK)


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


def _launch_forward(
    q: Tensor,
    k: Tensor,
    weights: Sequence[Tensor],
    tables: Sequence[Tensor],
    grid: Sequence[int],
    eps: float,
    into: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k [B, L, H, K], rstd [2, B, L] fp32; `into`: v, and the views that get k and v."""
    B, L, D = q.shape
    K = 2 * tables[3].shape[1]
    q, k = packed(q), packed(k)
    tables = tuple(table.contiguous() for table in tables)

    q_out, rstd = q.new_empty(B, L, D // K, K), q.new_empty(2, B, L, dtype=torch.float32)
    if into is None:
        v, k_out, v_out = None, torch.empty_like(q_out), None
    else:
        v, k_out, v_out = packed(into[0]), *into[1:]
    strides = [x.stride()[:2] for x in (q, k, k if v is None else v, k_out)]
    strides.append(k_out.stride()[:2] if v is None else v_out.stride()[:2])

    options = _sizes("qknorm_rope_forward", tables, 8, 32, q)
    video_rows = math.prod(grid)

    launch(
        _qknorm_rope_forward,
        (sum(tiles_of(video_rows, L, options["ROWS"])), B, 2 if v is None else 3),
        q,
        k,
        v,
        *(weight.contiguous() for weight in weights),
        q_out,
        k_out,
        v_out,
        rstd,
        *tables,
        video_rows,
        L,
        *grid[1:],
        *(number for pair in strides for number in pair),
        eps,
        **options,
    )

    return q_out, k_out, rstd


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
    return _launch_forward(q, k, (weight_q, weight_k), (t, h, w, text), grid, eps)


def _forward_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    t: Tensor,
    h: Tensor,
    w: Tensor,
    text: Tensor,
    k_out: Tensor,
    v_out: Tensor,
    grid: Sequence[int],
    eps: float,
) -> Tensor:
    """Returns q [B, L, H, K]; k and v go to k_out and v_out [B, L, H, K]."""
    weights, tables = (weight_q, weight_k), (t, h, w, text)
    return _launch_forward(q, k, weights, tables, grid, eps, (v, k_out, v_out))[0]


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
into_op = operator("univigu::qknorm_rope_into", _forward_into, ("k_out", "v_out"))
backward_op = operator("univigu::qknorm_rope_backward", _backward)


@forward_op.register_fake
def _(q, k, weight_q, weight_k, t, h, w, text, grid, eps):
    B, L, D = q.shape
    K = 2 * text.shape[1]
    q_out, k_out = (q.new_empty(B, L, D // K, K) for _ in range(2))
    return q_out, k_out, q.new_empty(2, B, L, dtype=torch.float32)


@into_op.register_fake
def _(q, k, v, weight_q, weight_k, t, h, w, text, k_out, v_out, grid, eps):
    return q.new_empty(k_out.shape)


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
    into: Into | None = None,
) -> tuple[Tensor, Tensor]:
    """As `qknorm_rope_reference`, all in one launch. The tables are constants: they get no
    gradient."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary, into)
    grid, *tables = rotary
    if into is None:
        return forward_op(q_BLD, k_BLD, weight_q, weight_k, *tables, grid, eps)[:2]
    v_BLD, *kept = into
    q_BLHK = into_op(q_BLD, k_BLD, v_BLD, weight_q, weight_k, *tables, *kept, grid, eps)
    return q_BLHK, into.k_BLHK


def qknorm_rope_compiled(
    q_BLD: Tensor,
    k_BLD: Tensor,
    weight_q: Tensor,
    weight_k: Tensor,
    heads: int,
    rotary: Rotary,
    eps: float = 1e-6,
    into: Into | None = None,
) -> tuple[Tensor, Tensor]:
    """As `qknorm_rope_reference` in fp32 and bf16, on CUDA in fp16 too. The tables are constants:
    they get no gradient."""
    check(q_BLD, k_BLD, weight_q, weight_k, heads, rotary, into)
    grid, *tables = rotary
    rest = weight_q, weight_k, *tables
    if into is not None and q_BLD.device.type == "cpu":
        kept = (x.flatten(2) for x in into[1:])
        q_BLHK = torch.ops.univigu_C.qknorm_rope_into(
            q_BLD, k_BLD, into.v_BLD, *rest, *kept, *grid, eps
        )
        return q_BLHK, into.k_BLHK

    q_BLHK, k_BLHK, _ = torch.ops.univigu_C.qknorm_rope(q_BLD, k_BLD, *rest, *grid, eps)
    return q_BLHK, k_BLHK if into is None else into.keep(k_BLHK)


if built():

    @torch.library.register_fake("univigu_C::qknorm_rope_into")
    def _(q, k, v, weight_q, weight_k, t, h, w, text, k_out, v_out, frames, height, width, eps):
        K = 2 * text.shape[1]
        return q.new_empty(*q.shape[:2], q.shape[2] // K, K)

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
    """Every launch at the real shapes, on meta tensors: q and k inside packed bf16 projections; all
    rows, and the text rows alone beside a cache."""
    B, V, L, D = case["B"], case["V"], case["V"] + case["T"], case["D"]
    grid = (V // 1560, 30, 52)  # 480x832
    q, k, v = torch.empty(B, L, 3 * D, dtype=torch.bfloat16, device="meta").chunk(3, -1)
    weights = torch.empty(2, D, device="meta").unbind()
    tables = rotary_tables(grid, case["T"], case["K"], "meta")[1:]
    q_out, k_out, rstd = _forward(q, k, *weights, *tables, grid, 1e-6)
    _backward(q, k, *weights, *tables, rstd, q_out, k_out, grid)

    qkv, kept = (x[:, V:] for x in (q, k, v)), [torch.empty_like(k_out)[:, V:] for _ in "kv"]
    _forward_into(*qkv, *weights, *tables, *kept, (0, *grid[1:]), 1e-6)


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
