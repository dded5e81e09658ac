"""vocab_loss against cross-entropy of stored logits, below and above one chunk."""

import pytest
import torch
import torch.nn.functional as F

from univigu_kernels import OPS
from univigu_kernels.vocab_loss import CHUNK_ROWS

vocab_loss = OPS["vocab_loss"].reference


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [5, CHUNK_ROWS // 2 + 3])
def test_against_cross_entropy(rows, with_bias):
    h, weight = torch.randn(2, rows, 8).double(), torch.randn(19, 8).double()
    bias = torch.randn(19).double() if with_bias else None
    targets = torch.randint(19, (2, rows))
    targets[1, ::3] = -100
    leaves = [x.requires_grad_() for x in (h, weight, bias) if x is not None]
    cotangent = torch.randn(2, rows).double()

    def stored(h, weight, bias, targets):
        logits = F.linear(h, weight, bias).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view(2, rows)

    results = []
    for call in (vocab_loss, stored):
        loss = call(h, weight, bias, targets)
        results.append((loss, *torch.autograd.grad(loss, leaves, cotangent)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert not results[0][0][1, ::3].any()


def test_above_one_chunk_no_logits_are_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.numel()) or x, lambda x: x
    ):
        h = torch.randn(1, 4 * CHUNK_ROWS, 4, requires_grad=True)
        targets = torch.zeros(1, 4 * CHUNK_ROWS, dtype=torch.int64)
        vocab_loss(h, torch.randn(512, 4), None, targets).sum()
    assert max(saved, default=0) < CHUNK_ROWS * 512


def test_bf16_rows_give_an_fp32_loss():
    h, weight = torch.randn(1, 3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    assert vocab_loss(h, weight, None, torch.tensor([[0, 4, -100]])).dtype == torch.float32
    ignored = vocab_loss(h, weight, None, torch.tensor([[7, 7, 7]]).clamp(max=4), ignore_index=4)
    assert not ignored.any()
