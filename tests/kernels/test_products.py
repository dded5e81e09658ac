"""The backends that take a library's products: routed_ffn by cuBLASLt's epilogue, fp8_ffn by
torch._scaled_mm. Their arithmetic runs here on a CPU; what CUDA would be called with, on meta
tensors."""

import contracts
import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from univigu_kernels import OPS, Expert, Fp8Expert, _products, bind, quantize_rows, quantize_weight
from univigu_kernels._fp8 import FP8
from univigu_kernels._gelu_rows import gelu_quantized
from univigu_kernels._products import (
    expert_rows,
    product_gelu,
    supports_cublaslt,
    supports_scaled_mm,
)
from univigu_kernels._triton import supports_triton
from univigu_kernels.fp8_ffn import fp8_ffn_torch, supports_torch
from univigu_kernels.routed_ffn import routed_ffn_cublaslt

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
routed_ffn, fp8_ffn = OPS["routed_ffn"].reference, OPS["fp8_ffn"].reference
DTYPES = [
    dtype
    for dtype in contracts.LOW
    if contracts.DEVICE == CPU or supports_cublaslt(contracts.DEVICE, dtype) is None
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
if contracts.DEVICE == CPU:  # torch emulates it, from 2.13 on with a scale a row
    LACKS = "" if TORCH >= (2, 13) else "needs a scale a row on a CPU"
    LACKS = LACKS or supports_triton(CPU, torch.float32)
else:
    LACKS = supports_torch(contracts.DEVICE, torch.bfloat16)
scaled_mm = pytest.mark.skipif(bool(LACKS), reason=LACKS or "")
SHAPES = [  # samples, V, T, D, hidden width of the video expert and of the text expert
    (3, 17, 15, 32, 48, 48),
    (3, 1, 129, 16, 32, 80),
    (1, 129, 1, 24, 40, 72),
    (2, 0, 127, 40, 56, 56),
    (2, 127, 0, 40, 56, 56),
    (1, 1023, 17, 16, 16, 16),
    (4, 15, 1, 72, 136, 64),
]


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64).to(contracts.DEVICE, dtype)


def make(samples, V, T, D, video_F, text_F, dtype):
    """Arguments whose experts differ in every number, biases large enough to be missed."""

    def expert(F):
        parts = randn(F, D) / D**0.5, randn(F), randn(D, F) / F**0.5, randn(D)
        return Expert(*(x.to(dtype) for x in parts))

    return randn(samples, V + T, D, dtype=dtype), expert(video_F), expert(text_F), V


@torch.no_grad()
def into_nan(call, *inputs):
    with contracts.poisoned():
        return call(*inputs)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cublaslt_keeps_the_two_times_rule(shape, dtype):
    """Without gradients, for which the reference itself would run."""
    inputs = make(*shape, dtype)
    truth = routed_ffn(*contracts.to_double(inputs))
    y = into_nan(routed_ffn_cublaslt, *inputs)
    contracts.assert_within([y], [routed_ffn(*inputs)], [truth], 2, dtype)


def test_cublaslt_gives_gradients_and_takes_parameters_that_want_them():
    inputs = make(2, 9, 6, 16, 32, 40, DTYPES[-1])
    h, video, text, V = inputs
    calls = routed_ffn_cublaslt, routed_ffn
    results = [contracts.run_with_gradients(call, (inputs, {})) for call in calls]
    for a, b in zip(*(contracts.outputs(r) for r in results), strict=True):
        assert torch.equal(a, b)
    assert any(g.any() for g in results[0][1])
    plain = routed_ffn_cublaslt(*inputs)
    wanting = tree_map(lambda t: t.clone().requires_grad_(), (video, text))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(routed_ffn_cublaslt(h, *wanting, V), plain)


def nans_like(x):
    return torch.full_like(x.float(), torch.nan).to(x.dtype)


@pytest.mark.parametrize("samples", [1, 3])
def test_cublaslt_rows_meet_their_own_expert_and_sample_alone(samples):
    V, T, dtype = 21, 10, DTYPES[-1]
    h, video, text, _ = make(samples, V, T, 16, 32, 32, dtype)
    whole = routed_ffn_cublaslt(h, video, text, V)
    nan = tree_map(nans_like, video)
    for experts, rows in (((nan, text), slice(V, None)), ((video, nan), slice(V))):
        y = routed_ffn_cublaslt(h, *experts, V)
        assert torch.equal(y[:, rows], whole[:, rows])
        assert y.isnan().any(-1).sum() == samples * (V + T) - y[:, rows, 0].numel()
    spoiled = h.clone()
    spoiled[-1, :V] = torch.nan
    y = routed_ffn_cublaslt(spoiled, video, text, V)
    assert y[-1, :V].isnan().all() and y.isnan().any(-1).sum() == V


def test_a_missing_bias_would_show():
    h, video, text, V = make(2, 6, 5, 16, 32, 32, DTYPES[-1])
    whole = routed_ffn_cublaslt(h, video, text, V)
    for name in ("up_bias", "down_bias"):
        for experts, rows in (
            ((video._replace(**{name: getattr(text, name)}), text), slice(V)),
            ((video, text._replace(**{name: getattr(video, name)})), slice(V, None)),
        ):
            changed = (routed_ffn_cublaslt(h, *experts, V) != whole).any(-1)
            assert changed[:, rows].all() and changed.sum() == changed[:, rows].numel()


@pytest.mark.parametrize("V, T", [(9, 6), (15, 0), (0, 15)])
@pytest.mark.parametrize("view", ["strided", "transposed"])
def test_cublaslt_takes_views(view, V, T):
    """Strided ones lie an odd number of elements into their storage: no epilogue takes that."""
    inputs = make(2, V, T, 24, 40, 40, DTYPES[0])

    def transposed(x):
        return x.mT.contiguous().mT if contracts.is_float(x) and x.ndim > 1 else x

    changed = tree_map({"strided": contracts.strided, "transposed": transposed}[view], inputs)
    expected, y = routed_ffn_cublaslt(*inputs), into_nan(routed_ffn_cublaslt, *changed)
    near = max(1e-5, 2 * contracts.ULP[y.dtype])  # the library chooses kernels by alignment
    torch.testing.assert_close(y, expected, rtol=near, atol=near)


@pytest.mark.parametrize("samples, V, T", [(2, 0, 0), (0, 5, 3)])
def test_no_rows(samples, V, T):
    y = routed_ffn_cublaslt(*make(samples, V, T, 16, 16, 24, DTYPES[-1]))
    assert y.shape == (samples, V + T, 16)


class Recorded(TorchDispatchMode):
    """Names of the operations that launch something; views and empty tensors do not."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        quiet = ("empty", "new_empty", "split", "split_with_sizes", "slice", "select", "t", "view")
        quiet += ("unsqueeze", "transpose", "permute", "expand", "detach", "alias", "_unsafe_view")
        self.names += [] if name in quiet else [name]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    "samples, V, T, products",
    [(1, 9, 6, 2), (3, 9, 6, 6), (3, 9, 0, 1), (3, 0, 6, 1), (1, 9, 0, 1)],
)
def test_on_cuda_each_run_of_rows_is_two_products_and_nothing_else(samples, V, T, products):
    """No copy, no concatenation, no GELU of its own: meta tensors are called as CUDA's would be."""
    inputs = make(samples, V, T, 16, 32, 40, torch.bfloat16)
    meta = tree_map(lambda x: x.to("meta") if torch.is_tensor(x) else x, inputs)
    with torch.no_grad(), Recorded() as recorded:
        y = routed_ffn_cublaslt(*meta)
    assert y.shape == inputs[0].shape and y.dtype == torch.bfloat16
    assert recorded.names == ["_addmm_activation", "addmm"] * products


def test_a_bias_that_the_epilogue_cannot_read_is_copied():
    x, weight = (torch.empty(n, 16, device="meta", dtype=torch.bfloat16) for n in (5, 32))
    wide = torch.empty(80, device="meta", dtype=torch.bfloat16)
    for bias, copies in ((wide[:32], 0), (wide[8:40], 0), (wide[4:36], 1), (wide[:64:2], 1)):
        with Recorded() as recorded:
            product_gelu(x, weight, bias)
        assert recorded.names == ["clone"] * copies + ["_addmm_activation"]


def test_on_a_cpu_the_epilogue_is_another_gelu():
    """Why the backend is for CUDA alone, where PyTorch's epilogue is the tanh approximation."""
    x, weight, bias = torch.randn(64, 32), torch.randn(48, 32) / 4, torch.randn(48)
    a = F.linear(x, weight, bias)
    fused = torch._addmm_activation(bias, x, weight.T, use_gelu=True)
    torch.testing.assert_close(fused, F.gelu(a), rtol=1e-5, atol=1e-5)
    assert (fused - F.gelu(a, approximate="tanh")).abs().max() > 2e-4
    ours = product_gelu(x, weight, bias)
    torch.testing.assert_close(ours, F.gelu(a, approximate="tanh"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("V, T", [(5, 3), (8, 0), (0, 8), (0, 0)])
def test_every_row_is_in_one_run_of_its_expert(V, T):
    at = torch.arange(2 * (V + T)).view(2, V + T)
    wide, seen = at[..., None].expand(-1, -1, 4), []
    for name, rows, same in expert_rows(("video", "text"), V, wide, at):
        assert rows.shape == (len(same), 4) and torch.equal(rows[:, 0], same)
        assert all((row % (V + T) < V) == (name == "video") for row in same.tolist())
        seen += same.tolist()
    assert sorted(seen) == at.flatten().tolist()


def test_backends_say_what_they_need(monkeypatch):
    assert "erf" in supports_cublaslt(CPU, torch.bfloat16)
    for capability, fits in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        reason = supports_cublaslt(CUDA, torch.bfloat16)
        assert reason is None if fits else "8.0" in reason
    assert "bfloat16" in supports_cublaslt(CUDA, torch.float32)
    assert [b.name for b in OPS["routed_ffn"].backends][:2] == ["triton", "cublaslt"]
    assert [b.name for b in OPS["fp8_ffn"].backends] == ["triton", "torch", "split", "reference"]
    chosen = {c.op: c for c in bind("auto", "cpu", torch.bfloat16).table}
    assert "erf" in dict(chosen["routed_ffn"].rejected)["cublaslt"]
    for request in ("routed_ffn=cublaslt", "fp8_ffn=torch"):
        with pytest.raises(ValueError, match="missing=needs a CUDA device"):
            bind(request, "cpu", torch.bfloat16)


def test_capability_8_9_waits_for_a_torch_that_keeps_to_the_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    for version, fits in (("2.11.0+cu130", False), ("2.12.1", True), ("2.13.0+cu130", True)):
        monkeypatch.setattr(_products.torch, "__version__", version)
        reason = supports_scaled_mm(CUDA, torch.bfloat16)
        assert reason is None if fits else "torch 2.12" in reason


@pytest.mark.skipif(
    supports_triton(contracts.DEVICE, torch.float16) is not None, reason="needs Triton"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows, hidden_width", [(1, 16), (7, 300), (5, 2048), (0, 48)])
def test_gelu_and_e4m3_of_a_row_are_those_of_torch(rows, hidden_width, dtype):
    """bf16 is read in the interpreter, and nothing is computed in it. A GPU's exp2 may round a
    value to the next e4m3 number."""
    sizes = 2.0 ** torch.randint(-6, 4, (rows, 1), device=contracts.DEVICE)
    a = (randn(rows, hidden_width) * sizes).to(dtype)
    a[rows // 2 : rows // 2 + 1] = 0
    with contracts.poisoned():
        hidden, scale = gelu_quantized(a)
    expected, expected_scale = quantize_rows(F.gelu(a.float(), approximate="tanh"))
    torch.testing.assert_close(scale, expected_scale)
    assert rows == 0 or scale[rows // 2] == 1
    same = hidden.float() == expected.float()
    torch.testing.assert_close(hidden.float(), expected.float(), rtol=0.13, atol=2**-8)
    assert same.float().mean() > 0.99 or rows == 0


def fp8_expert(width, hidden):
    parts = *quantize_weight(randn(hidden, width).float() / width**0.5), randn(hidden).bfloat16()
    parts += (*quantize_weight(randn(width, hidden).float() / hidden**0.5), randn(width).bfloat16())
    return Fp8Expert(*parts)


def make_fp8(samples, V, T, D, video_F, text_F):
    h = quantize_rows(randn(samples, V + T, D).float())
    return *h, fp8_expert(D, video_F), fp8_expert(D, text_F), V, torch.bfloat16


FP8_SHAPES = [
    (3, 17, 15, 32, 144, 144),
    (3, 1, 129, 16, 32, 272),
    (1, 129, 1, 48, 256, 16),
    (2, 0, 127, 32, 64, 64),
    (2, 127, 0, 32, 64, 64),
    (1, 3, 2, 2608, 16, 32),
]


@scaled_mm
@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_scaled_mm_is_as_near_the_unrounded_formula_as_the_reference(shape):
    """Its hidden rows have one scale each, so their e4m3 numbers are others than the reference's.
    Neither may be further than two times the other from the formula in fp64 without them."""
    inputs = make_fp8(*shape)
    y = into_nan(fp8_ffn_torch, *inputs)
    truth = contracts.unrounded_fp8_ffn(*inputs)
    contracts.assert_within([y], [fp8_ffn(*inputs)], [truth], 2, torch.bfloat16)


@scaled_mm
def test_a_row_of_small_values_beside_large_ones_is_lost_as_documented():
    """Below amax / 28,672 of its row e4m3 loses bits, below amax / 458,752 it is zero."""
    a = torch.full((1, 16), 300.0, device=contracts.DEVICE, dtype=torch.bfloat16)
    a[0, 8:] = 300.0 / 2.0 ** torch.arange(8, 24, 2)
    hidden, scale = gelu_quantized(a)
    back, exact = hidden.float() * scale[:, None], F.gelu(a.float(), approximate="tanh")
    error = ((back - exact).abs() / exact)[0, 8:]
    assert (error[:3] < 1 / 15).all() and error[-1] == 1


@scaled_mm
def test_scaled_mm_rows_meet_their_own_expert_and_sample_alone():
    samples, V, T = 3, 21, 10
    h, h_scale, video, text, _, dtype = make_fp8(samples, V, T, 16, 144, 48)
    whole = fp8_ffn_torch(h, h_scale, video, text, V, dtype)
    nan = tree_map(nans_like, video)
    for experts, rows in (
        ((nan, text), slice(V, None)),
        ((video, tree_map(nans_like, text)), slice(V)),
    ):
        y = fp8_ffn_torch(h, h_scale, *experts, V, dtype)
        assert torch.equal(y[:, rows], whole[:, rows])
        assert not (y == whole)[:, slice(V) if rows.start else slice(V, None)].any()
    moved, moved_scale = h.clone(), h_scale.clone()
    moved[1, :V], moved_scale[1, :V] = h[0, :V], 3 * h_scale[1, :V]
    for inputs in ((moved, h_scale), (h, moved_scale)):
        changed = (fp8_ffn_torch(*inputs, video, text, V, dtype) != whole).any(-1)
        assert changed[1, :V].all() and changed.sum() == V


@scaled_mm
@pytest.mark.parametrize("part", ["up_scale", "up_bias", "down_scale", "down_bias"])
def test_the_other_experts_numbers_would_show(part):
    h, h_scale, video, text, V, dtype = make_fp8(2, 6, 5, 16, 32, 32)
    right = fp8_ffn_torch(h, h_scale, video, text, V, dtype)
    for experts, rows in (
        ((video._replace(**{part: getattr(text, part)}), text), slice(V)),
        ((video, text._replace(**{part: getattr(video, part)})), slice(V, None)),
    ):
        changed = (fp8_ffn_torch(h, h_scale, *experts, V, dtype) != right).any(-1)
        assert changed[:, rows].all() and changed.sum() == changed[:, rows].numel()


@scaled_mm
def test_scaled_mm_takes_views():
    h, h_scale, video, text, V, dtype = make_fp8(2, 9, 6, 32, 144, 48)
    expected = fp8_ffn_torch(h, h_scale, video, text, V, dtype)

    def sliced(t):
        if t.ndim == 1:
            return t.repeat_interleave(2)[::2]
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, device=t.device).to(t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    y = fp8_ffn_torch(*tree_map(sliced, (h, h_scale, video, text)), V, dtype)
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)


@scaled_mm
@pytest.mark.parametrize("samples, V, T", [(2, 0, 0), (0, 5, 3)])
def test_scaled_mm_without_rows(samples, V, T):
    y = fp8_ffn_torch(*make_fp8(samples, V, T, 16, 16, 32))
    assert y.shape == (samples, V + T, 16) and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "D, hidden, dtype", [(24, 32, "bfloat16"), (32, 40, "bfloat16"), (32, 32, "float16")]
)
def test_what_scaled_mm_cannot_do_raises(D, hidden, dtype):
    *inputs, _ = make_fp8(1, 3, 2, D, 32, hidden)
    with pytest.raises(ValueError, match="fp8_ffn: D, F and out_dtype must be multiples of 16"):
        fp8_ffn_torch(*inputs, getattr(torch, dtype))


def test_scaled_mm_needs_fp8_operands():
    h, *rest = make_fp8(1, 3, 2, 16, 16, 16)
    assert h.dtype == FP8
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        fp8_ffn_torch(h.float(), *rest)
