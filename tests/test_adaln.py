"""adaln and residual_adaln against their formula row by row, and shared modulation."""

import pytest
import torch

from univigu_kernels import OPS, quantize_rows

adaln, residual_adaln = OPS["adaln"].reference, OPS["residual_adaln"].reference
BOTH = pytest.mark.parametrize("name", ["adaln", "residual_adaln"])


def example(name, dtype=torch.float64):
    return OPS[name].example("cpu", dtype, torch.Generator().manual_seed(0))


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def adaln_rows(x, weight, shift, video_rows, eps):
    h = torch.empty_like(x)
    for b in range(x.shape[0]):
        for row in range(x.shape[1]):
            modality = int(row >= video_rows)
            centred = x[b, row] - x[b, row].mean()
            n = centred / (centred.square().mean() + eps[modality]).sqrt()
            h[b, row] = n * weight[b, modality] + shift[b, modality]
    return h


def test_adaln_formula():
    (x, weight, shift, video_rows), _ = example("adaln")
    for eps in ((1e-6, 1e-6), (1e-6, 0.1)):
        h = adaln(x, weight, shift, video_rows, eps=eps)
        torch.testing.assert_close(h, adaln_rows(x, weight, shift, video_rows, eps))


def test_residual_adaln_formula():
    (x, y, gate, weight, shift, video_rows), _ = example("residual_adaln")
    eps = (1e-6, 0.1)
    new, h = residual_adaln(x, y, gate, weight, shift, video_rows, eps=eps)
    expected = x.clone()
    expected[:, :video_rows] += gate[:, :1] * y[:, :video_rows]
    expected[:, video_rows:] += gate[:, 1:] * y[:, video_rows:]
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(h, adaln_rows(expected, weight, shift, video_rows, eps))


@BOTH
def test_shared_modulation_equals_its_expansion(name):
    args, kwargs = example(name)

    def is_modulation(x):
        return isinstance(x, torch.Tensor) and x.shape[1] == 2

    for batch, modalities in ((1, 1), (1, 2), (2, 1)):
        shared = [x[:batch, :modalities] if is_modulation(x) else x for x in args]
        expanded = [
            s.expand(2, 2, -1) if is_modulation(x) else x for s, x in zip(shared, args, strict=True)
        ]
        for eps in ((1e-6, 1e-6), (1e-6, 1e-2)):
            options = {**kwargs, "eps": eps}
            results = (as_tuple(OPS[name].reference(*a, **options)) for a in (shared, expanded))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_ungated_residual_is_a_gate_of_one():
    (x, y, gate, *rest), _ = example("residual_adaln")
    results = residual_adaln(x, y, None, *rest), residual_adaln(x, y, torch.ones_like(gate), *rest)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_residual_stays_fp32_beside_a_bf16_branch():
    args, kwargs = example("residual_adaln", torch.bfloat16)
    assert args[1].dtype == torch.bfloat16
    new, h = residual_adaln(*args, **kwargs)
    assert new.dtype == torch.float32 and h.dtype == torch.bfloat16
    assert residual_adaln(*args)[1].dtype == torch.float32


@BOTH
def test_fp8_output(name):
    args, kwargs = example(name, torch.float32)
    h = as_tuple(OPS[name].reference(*args, **kwargs))[-1]
    result = OPS[name].reference(*args, **{**kwargs, "out_dtype": torch.float8_e4m3fn})
    values, scale = result if name == "adaln" else result[1]
    expected, expected_scale = quantize_rows(h)
    assert torch.equal(values.float(), expected.float()) and torch.equal(scale, expected_scale)
