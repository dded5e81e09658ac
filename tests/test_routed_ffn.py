"""routed_ffn against two separate feed-forward networks."""

import math

import torch

from univigu_kernels import OPS, Expert

routed_ffn = OPS["routed_ffn"].reference


def test_each_modality_meets_its_expert():
    generator = torch.Generator().manual_seed(0)
    (h, video, text, video_rows), _ = OPS["routed_ffn"].example("cpu", torch.float64, generator)
    y = routed_ffn(h, video, text, video_rows)
    for expert, rows in ((video, slice(video_rows)), (text, slice(video_rows, None))):
        a = h[:, rows] @ expert.up_weight.T + expert.up_bias
        gelu = 0.5 * a * (1 + torch.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)))
        torch.testing.assert_close(y[:, rows], gelu @ expert.down_weight.T + expert.down_bias)


def test_experts_may_differ_in_hidden_width():
    def expert(hidden):
        return Expert(
            torch.randn(hidden, 8), torch.randn(hidden), torch.randn(8, hidden), torch.randn(8)
        )

    h, video, text = torch.randn(2, 6, 8), expert(16), expert(24)
    assert routed_ffn(h, video, text, 4).shape == h.shape
