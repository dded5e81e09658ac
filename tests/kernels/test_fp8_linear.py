"""fp8_linear: the quantiser's bounds, the product of dequantised operands, and its backends."""

import contracts
import pytest
import torch

from univigu_kernels import OPS, _triton, bind, quantize_rows, quantize_weight
from univigu_kernels._fp8 import FP8, supports_triton_fp8
from univigu_kernels.fp8_linear import (
    forward_op,
    fp8_linear_torch,
    fp8_linear_triton,
    supports_scaled_mm,
)

fp8_linear = OPS["fp8_linear"].reference
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16)
    if supports_triton_fp8(contracts.DEVICE, dtype) is None
]
triton = pytest.mark.skipif(not DTYPES, reason="needs Triton, and fp8 on a GPU")


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


@pytest.mark.parametrize("call", [fp8_linear, fp8_linear_triton, fp8_linear_torch])
def test_unquantised_operands_raise(call):
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with pytest.raises(ValueError, match="must be float8_e4m3fn"):
        call(x, torch.ones(2), weight, torch.ones(4), None, torch.float32)


def make(rows, D, F, dtype, bias=True):
    """Rows and channels of very different size, so that a scale of another one shows."""
    sizes = [2.0 ** torch.randint(-3, 4, (n, 1)) for n in (rows, F)]
    x, weight = sizes[0] * torch.randn(rows, D), sizes[1] * torch.randn(F, D)
    tensors = [*quantize_rows(x), *quantize_weight(weight), 9 * torch.randn(F) if bias else None]
    return *(t if t is None else t.to(contracts.DEVICE) for t in tensors), dtype


def into_nan(*inputs):
    with contracts.poisoned():
        return fp8_linear_triton(*inputs)


def assert_contract(inputs):
    contracts.assert_two_times(OPS["fp8_linear"], into_nan, (inputs, {}), inputs[-1])


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "rows, D, F",
    [(1, 16, 16), (15, 33, 17), (17, 70, 129), (127, 130, 48), (129, 128, 65), (1023, 24, 16)],
)
def test_two_times_rule(rows, D, F, bias, dtype):
    assert_contract(make(rows, D, F, dtype, bias))


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_part_of_a_long_sum_is_lost(dtype):
    """2600 columns: five promotions of 512 to fp32, and 40 columns that follow them."""
    assert_contract(make(5, 2600, 20, dtype))


@triton
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, n, k, warps, stages, group",
    [
        (128, 128, 64, 8, 4, 8),
        (128, 128, 128, 8, 4, 8),
        (128, 128, 128, 4, 3, 8),
        (64, 64, 128, 4, 4, 8),
        (16, 32, 32, 4, 3, 1),
        (16, 32, 32, 4, 3, 3),
    ],
)
def test_every_configuration(m, n, k, warps, stages, group, dtype):
    options = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": group}
    with _triton.forced("fp8_linear", **options, num_warps=warps, num_stages=stages):
        assert_contract(make(70, 300, 90, dtype))


@triton
def test_leading_dimensions_and_views():
    dtype = DTYPES[-1]
    x, x_scale, w, w_scale, bias, _ = make(24, 40, 33, dtype)
    expected = fp8_linear_triton(x, x_scale, w, w_scale, bias, dtype)

    def check(*inputs):
        tolerance = {"rtol": 1e-2, "atol": 1e-2 * expected.abs().max().item()}
        torch.testing.assert_close(fp8_linear_triton(*inputs, dtype), expected, **tolerance)

    def wide(t):
        """The same values, a row apart by more than its length and at an odd offset."""
        padded = torch.zeros(t.shape[0], t.shape[1] + 3, device=t.device).to(FP8)
        padded[:, 1:-2] = t
        return padded[:, 1:-2]

    check(wide(x), x_scale, wide(w), w_scale, bias)
    check(x, x_scale, w.t().contiguous().t(), w_scale, bias)
    apart = [t.repeat_interleave(2)[::2] for t in (x_scale, w_scale, bias)]
    check(x, apart[0], w, *apart[1:])
    batched = x.view(2, 3, 4, 40).transpose(0, 1), x_scale.view(2, 3, 4).transpose(0, 1)
    y = fp8_linear_triton(*batched, w, w_scale, bias, dtype)
    assert torch.equal(y, expected.view(2, 3, 4, 33).transpose(0, 1))


@triton
def test_no_rows():
    x, x_scale, w, w_scale, bias, dtype = make(4, 32, 48, DTYPES[-1])
    y = fp8_linear_triton(x[:0].view(2, 0, 32), x_scale[:0].view(2, 0), w, w_scale, bias, dtype)
    assert y.shape == (2, 0, 48) and y.dtype == dtype


@triton
def test_repeats_are_bit_equal():
    inputs = make(70, 300, 90, DTYPES[-1])
    assert torch.equal(fp8_linear_triton(*inputs), fp8_linear_triton(*inputs))


@triton
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    """Its schema check needs a product of fp8 tensors, which torch doesn't have."""
    utils = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(forward_op, make(5, 32, 16, DTYPES[-1], bias), test_utils=utils)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="on a CPU torch 2.11 takes one scale a tensor, 2.13 one a row",
)
@pytest.mark.parametrize("bias", [True, False])
def test_scaled_mm_meets_the_reference(bias):
    """On a CPU torch emulates it, which is enough to see operands and scales in their places."""
    made = make(24, 48, 32, torch.bfloat16, bias)
    inputs = [t.cpu() if isinstance(t, torch.Tensor) else t for t in made]
    contracts.assert_two_times(OPS["fp8_linear"], fp8_linear_torch, (inputs, {}), torch.bfloat16)


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_scaled_mm_is_given_the_layouts_that_it_asks_for_on_a_gpu(rows):
    """Its rules for meta tensors are those for CUDA."""
    x, w = (torch.empty(n, 32, dtype=FP8, device="meta") for n in (rows, 48))
    x_scale, w_scale, bias = (torch.empty(n, device="meta") for n in (rows, 48, 48))
    y = fp8_linear_torch(
        x[None], x_scale[None], w.mT.contiguous().mT, w_scale, bias, torch.bfloat16
    )
    assert y.shape == (1, rows, 48) and y.dtype == torch.bfloat16


@pytest.mark.parametrize("D, F, dtype", [(24, 32, "bf16"), (32, 24, "bf16"), (32, 32, "fp16")])
def test_what_scaled_mm_cannot_do_raises(D, F, dtype):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with pytest.raises(ValueError, match="multiples of 16 and bfloat16 for torch._scaled_mm"):
        fp8_linear_torch(*make(4, D, F, dtype))


def test_backends_say_what_they_need(monkeypatch):
    pytest.importorskip("triton")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "CUDA device" in supports_scaled_mm(cpu, torch.bfloat16)
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for supports in (supports_triton_fp8, supports_scaled_mm):
            reason = supports(cuda, torch.bfloat16)
            assert reason is None if fits else "8.9" in reason
    assert "bfloat16" in supports_triton_fp8(cuda, torch.float32)
    assert "bfloat16" in supports_scaled_mm(cuda, torch.float16)
    assert [b.name for b in OPS["fp8_linear"].backends] == ["triton", "torch", "split", "reference"]
    with pytest.raises(ValueError, match="missing=needs a CUDA device"):
        bind("fp8_linear=torch", "cpu", torch.bfloat16)
