"""qknorm_rope: the norm spans all heads and precedes the rotation; packed projections."""

import torch

from univigu_kernels import OPS, rotary_tables

qknorm_rope, rope3d = OPS["qknorm_rope"].reference, OPS["rope3d"].reference
GRID, TEXT, HEADS = (2, 3, 4), 5, 3


def inputs(dtype):
    packed = torch.randn(2, 29, 3 * 48, dtype=torch.float64).to(dtype)
    q, k, _ = packed.chunk(3, -1)
    weight_q, weight_k = torch.rand(2, 48, dtype=torch.float64).to(dtype)
    return q, k, weight_q, weight_k


def test_formula():
    q, k, weight_q, weight_k = inputs(torch.float64)
    rotary = rotary_tables(GRID, TEXT, 16, "cpu", torch.float64)
    actual = qknorm_rope(q, k, weight_q, weight_k, HEADS, rotary, eps=0.1)
    for x, weight, out in ((q, weight_q, actual[0]), (k, weight_k, actual[1])):
        n = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
        torch.testing.assert_close(out, rope3d(n.view(2, 29, HEADS, 16), rotary))


def test_bf16_is_rounded_once():
    arguments = inputs(torch.bfloat16)
    rotary = rotary_tables(GRID, TEXT, 16, "cpu")
    low = qknorm_rope(*arguments, HEADS, rotary)
    high = qknorm_rope(*(x.float() for x in arguments), HEADS, rotary)
    for a, b in zip(low, high, strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())
