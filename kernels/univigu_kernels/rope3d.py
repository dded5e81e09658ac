"""rope3d: rotate video rows by three axis positions (interleaved pairs) and text rows by one
(half-split pairs).

Formula  a pair (x0, x1) at angle a becomes (x0 cos a - x1 sin a, x0 sin a + x1 cos a).
         Video: channels [t | h | w]; pair i of an axis with d channels is (x[2i], x[2i+1]) at
         a = position * 10000^(-2i/d). Text: pair i is (x[i], x[i + K/2]) at
         a = position * 10000^(-2i/K), positions from 0.
Gradient the same rotation by -a.
Dtypes   any float in, fp32 rotation (fp64 for fp64), rounded once to the input dtype.
Saved    the tables only.
Bytes    4D per row: bf16 in and out. The tables are a few KiB per axis and stay in cache.
Bound    memory: 3 FLOP per 4 bytes.
CPU      the angles of a row are gathered once for all heads.
CUDA     a thread holds the same channels of several heads, which share its angles.
Given up nothing: the tables are computed in fp64 and rounded once.
Legend   B samples, L joint rows [video ; text], H heads, K head_dim, P pairs of an axis.
"""

import torch
from torch import Tensor

from ._checks import compute_dtype
from ._compiled import built, supports_cpu, supports_cuda
from ._rotary import Rotary, check_rotary, example_rotary, rotate
from ._spec import Backend, Op, joint_rows


def rope3d_reference(x_BLHK: Tensor, rotary: Rotary) -> Tensor:
    """x [B, L, H, K] with L = F*Hh*Ww + T -> the same shape and dtype."""
    check_rotary("rope3d", x_BLHK.shape[1], x_BLHK.shape[3], rotary)
    return rotate(x_BLHK.to(compute_dtype(x_BLHK)), rotary).to(x_BLHK.dtype)


def rope3d_compiled(x_BLHK: Tensor, rotary: Rotary) -> Tensor:
    """As `rope3d_reference` in fp32 and bf16, on CUDA in fp16 too. The tables are constants: they
    get no gradient."""
    check_rotary("rope3d", x_BLHK.shape[1], x_BLHK.shape[3], rotary)
    grid, *tables = rotary
    return torch.ops.univigu_C.rope3d(x_BLHK, *tables, *grid, False)


if built():

    @torch.library.register_fake("univigu_C::rope3d")
    def _(x, *rest):
        return x.new_empty(x.shape)

    def _save(ctx, inputs, output):
        _, *tables, ctx.frames, ctx.height, ctx.width, ctx.inverse = inputs
        ctx.save_for_backward(*tables)

    def _differentiate(ctx, dout):
        grid = ctx.frames, ctx.height, ctx.width
        dx = torch.ops.univigu_C.rope3d(dout, *ctx.saved_tensors, *grid, not ctx.inverse)
        return dx, *[None] * 8

    torch.library.register_autograd("univigu_C::rope3d", _differentiate, setup_context=_save)


def example(device, dtype, generator):
    x = torch.randn(2, 29, 2, 16, generator=generator, dtype=torch.float64)
    return (x.to(device, dtype), example_rotary(device, dtype)), {}


OP = Op(
    name="rope3d",
    backends=(
        Backend("cpu", rope3d_compiled, supports_cpu),
        Backend("cuda", rope3d_compiled, supports_cuda),
        Backend("reference", rope3d_reference),
    ),
    example=example,
    bytes=lambda c: 4 * joint_rows(c) * c["D"],
    flops=lambda c: 3 * joint_rows(c) * c["D"],
)
