"""GELU and e4m3 of hidden rows in one pass, between two products of a library.

Legend   F hidden width.
"""

import torch
from torch import Tensor

from ._ffn import _sigmoid_2u
from ._fp8 import FP8
from ._fp8_ffn import to_fp8
from ._triton import configuration, launch, tl, triton


@triton.jit
def gelu_fp8_rows(a, hidden, scale, F: tl.constexpr, BLOCK: tl.constexpr):
    """A program's row: gelu(a) over its scale, amax / 448 (1 where all are 0)."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    values = tl.load(a + row * F + cols, cols < F, other=0.0).to(tl.float32)
    values *= _sigmoid_2u(values)
    amax = tl.max(tl.abs(values), 0)
    row_scale = tl.where(amax > 0, amax / 448.0, 1.0)
    tl.store(scale + row, row_scale)
    tl.store(hidden + row * F + cols, to_fp8(values * (1.0 / row_scale)), cols < F)


def gelu_quantized(a: Tensor) -> tuple[Tensor, Tensor]:
    """a [rows, F], contiguous -> (gelu(a) [rows, F] e4m3, its scale [rows] fp32), the tanh
    approximation in fp32."""
    rows, F = a.shape
    hidden = torch.empty_like(a, dtype=FP8)
    scale = a.new_empty(rows, dtype=torch.float32)
    block = 1 << (F - 1).bit_length()
    # 32 numbers a thread: 16 warps hold the 16,384 columns of both models.
    chosen = {"BLOCK": block, "num_warps": min(16, max(1, block // 1024))}
    launch(gelu_fp8_rows, (rows,), a, hidden, scale, F, **configuration("gelu_fp8_rows", chosen))
    return hidden, scale
