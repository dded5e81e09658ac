"""fp8_linear: the quantiser's bounds, and the product of dequantised operands."""

import pytest
import torch

from univigu_kernels import OPS, quantize_rows, quantize_weight

fp8_linear = OPS["fp8_linear"].reference


def test_quantize_rows():
    x = torch.randn(3, 5, 64)
    x[1, 2] = 0
    x[0, 0] *= 1e4
    values, scale = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    assert scale[1, 2] == 1 and not values[1, 2].float().any()
    back = values.float() * scale[..., None]
    step = x.abs().amax(-1, keepdim=True) / 448
    assert ((back - x).abs() <= x.abs() / 16 + step * 2**-9).all()
    assert torch.equal(values.float().abs().amax(-1)[scale != 1], torch.tensor(448.0).expand(14))


def test_product_of_dequantised_operands():
    x, weight, bias = torch.randn(2, 3, 64), torch.randn(16, 64), torch.randn(16)
    (x_fp8, x_scale), (w_fp8, w_scale) = quantize_rows(x), quantize_weight(weight)
    assert w_scale.shape == (16,)
    exact = (x_fp8.double() * x_scale[..., None]) @ (w_fp8.double() * w_scale[:, None]).T
    for out_dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        for b in (bias, None):
            y = fp8_linear(x_fp8, x_scale, w_fp8, w_scale, b, out_dtype)
            assert y.dtype == out_dtype
            expected = exact if b is None else exact + b
            torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_quantisation_error_of_a_product():
    x, weight = torch.randn(64, 512), torch.randn(64, 512)
    y = fp8_linear(*quantize_rows(x), *quantize_weight(weight), None, torch.float32)
    exact = x.double() @ weight.double().T
    assert ((y - exact).square().mean() / exact.square().mean()).sqrt() < 0.05


def test_unquantised_operands_raise():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        fp8_linear(x, torch.ones(2), weight, torch.ones(4), None, torch.float32)
