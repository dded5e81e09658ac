"""The two norms, adaln and residual_adaln, against their formula row by row, shared modulation, and
the Triton backend at adversarial shapes."""

from functools import partial

import contracts
import pytest
import torch
from torch.utils._pytree import tree_map

from univigu_kernels import OPS, Norm, quantize_rows
from univigu_kernels._triton import forced

adaln, residual_adaln = OPS["adaln"].reference, OPS["residual_adaln"].reference
BOTH = pytest.mark.parametrize("name", ["adaln", "residual_adaln"])


def example(name, dtype=torch.float64):
    return OPS[name].example("cpu", dtype, torch.Generator().manual_seed(0))


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def adaln_rows(x, norm, video_rows):
    weight, shift, eps = norm
    h = torch.empty_like(x)
    for b in range(x.shape[0]):
        for row in range(x.shape[1]):
            modality = int(row >= video_rows)
            centred = x[b, row] - x[b, row].mean()
            n = centred / (centred.square().mean() + eps[modality]).sqrt()
            h[b, row] = n * weight[b, modality] + shift[b, modality]
    return h


def test_adaln_formula():
    (x, norm, video_rows), _ = example("adaln")
    for eps in ((1e-6, 1e-6), (1e-6, 0.1)):
        norm = norm._replace(eps=eps)
        torch.testing.assert_close(adaln(x, norm, video_rows), adaln_rows(x, norm, video_rows))


def test_residual_adaln_formula():
    (x, y, gate, norm, video_rows), _ = example("residual_adaln")
    norm = norm._replace(eps=(1e-6, 0.1))
    new, h = residual_adaln(x, y, gate, norm, video_rows)
    expected = x.clone()
    expected[:, :video_rows] += gate[:, :1] * y[:, :video_rows]
    expected[:, video_rows:] += gate[:, 1:] * y[:, video_rows:]
    torch.testing.assert_close(new, expected)
    torch.testing.assert_close(h, adaln_rows(expected, norm, video_rows))


@BOTH
def test_shared_modulation_equals_its_expansion(name):
    args, kwargs = example(name)

    def modulates(x):
        return isinstance(x, torch.Tensor) and x.shape[1] <= 2

    def cut(batch, modalities, x):
        return x[:batch, :modalities] if modulates(x) else x

    for batch, modalities in ((1, 1), (1, 2), (2, 1)):
        for eps in ((1e-6, 1e-6), (1e-6, 1e-2)):
            inputs = [x._replace(eps=eps) if isinstance(x, Norm) else x for x in args]
            shared = tree_map(partial(cut, batch, modalities), inputs)
            expanded = tree_map(lambda x: x.expand(2, 2, -1) if modulates(x) else x, shared)
            results = (as_tuple(OPS[name].reference(*a, **kwargs)) for a in (shared, expanded))
            for a, b in zip(*results, strict=True):
                torch.testing.assert_close(a, b)


def test_ungated_residual_is_a_gate_of_one():
    (x, y, gate, *rest), _ = example("residual_adaln")
    results = residual_adaln(x, y, None, *rest), residual_adaln(x, y, torch.ones_like(gate), *rest)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", contracts.LOW, ids=str)
@pytest.mark.parametrize("backend", OPS["residual_adaln"].backends, ids=lambda b: b.name)
def test_a_constant_row_is_a_second_residual_bit_for_bit(backend, dtype, samples, poisoned):
    """The whole stream in `dtype`, so that both sums round; the first one's norm is nobody's."""
    if reason := backend.supports(contracts.DEVICE, dtype):
        pytest.skip(reason)
    (x, y, gate, *rest), options = example("residual_adaln", torch.float32)
    constant = options.pop("constant_B1D")[:samples]
    x, y, constant = (t.to(contracts.DEVICE, dtype) for t in (x, y, constant))
    gate, rest = tree_map(
        lambda t: t.to(contracts.DEVICE) if torch.is_tensor(t) else t, (gate, rest)
    )

    once = backend.call(x, y, gate, *rest, dtype, constant)
    first, _ = backend.call(x, y, gate, *rest, dtype)
    twice = backend.call(first, constant.expand_as(x), None, *rest, dtype)
    assert not torch.equal(first, once[0])
    assert all(map(torch.equal, once, twice))


@pytest.mark.parametrize("shape", [(3, 1, 32), (2, 2, 32), (2, 1, 16)], ids=str)
def test_a_constant_row_has_the_shape_of_one(shape):
    args, _ = example("residual_adaln")
    with pytest.raises(ValueError, match="constant must be"):
        residual_adaln(*args, constant_B1D=torch.zeros(shape))


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


def arguments(name, batch, video_rows, text_rows, width, dtype, shared=(False, False)):
    """(args, kwargs) with modulations [1|B, 1|2, D]; two eps far apart, one as large as the
    variance of the small text rows."""

    def randn(*shape):
        return torch.randn(*shape, device=contracts.DEVICE)

    mod = [1 if alone else full for alone, full in zip(shared, (batch, 2), strict=True)]
    x = 1 + randn(batch, video_rows + text_rows, width)
    x[:, video_rows:] *= 0.3
    y, gate, weight, shift = randn(*x.shape).to(dtype), *(randn(*mod, width) for _ in range(3))
    branch = (y, gate) if name == "residual_adaln" else ()
    norm = Norm(weight, shift, (1e-6, 0.1))
    return (x, *branch, norm, video_rows), {"out_dtype": dtype}


FEW = [(1, 1, 0, 16), (1, 0, 1, 24), (3, 15, 2, 40), (2, 9, 7, 64)]  # batch, video, text, width
MANY = [(1, 127, 1, 8), (1, 0, 129, 12), (1, 1000, 23, 8)]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_triton_is_within_two_times(name, shape, dtype, poisoned):
    op = OPS[name]
    contracts.assert_two_times(op, op.backends[0].call, arguments(name, *shape, dtype), dtype)


@pytest.mark.parametrize("shape", MANY, ids=str)
def test_triton_is_within_two_times_over_many_rows(shape, poisoned):
    op = OPS["residual_adaln"]
    inputs = arguments("residual_adaln", *shape, torch.float32)
    with forced("residual_adaln_forward", ROWS=64), forced("residual_adaln_backward", ROWS=64):
        contracts.assert_two_times(op, op.backends[0].call, inputs, torch.float32)


@BOTH
@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_triton_shared_modulation(name, shared, poisoned):
    inputs = arguments(name, 3, 9, 4, 16, torch.float32, shared)
    contracts.assert_two_times(OPS[name], OPS[name].backends[0].call, inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_ungated_residual(dtype, poisoned):
    op = OPS["residual_adaln"]
    (x, y, _, *rest), options = arguments("residual_adaln", 2, 9, 4, 24, dtype)
    contracts.assert_two_times(op, op.backends[0].call, ((x, y, None, *rest), options), dtype)


@pytest.mark.parametrize("used", [0, 1])
def test_triton_with_one_output_unused(used, poisoned):
    inputs = arguments("residual_adaln", 1, 3, 2, 16, torch.float32)
    calls = [OPS["residual_adaln"].backends[i].call for i in (0, -1)]
    results = [
        contracts.run_with_gradients(lambda *a, call=call, **k: call(*a, **k)[used], inputs)
        for call in calls
    ]
    for a, b in zip(*map(contracts.outputs, results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize(
    "options", [{"ROWS": 1}, {"ROWS": 8}, {"ROWS": 64}, {"BLOCK": 128}, {"STAGES": 1}], ids=str
)
def test_triton_configurations(name, options, poisoned):
    op, inputs = OPS[name], arguments(name, 1, 17, 10, 40, torch.float32)
    with forced(f"{name}_forward", **options), forced(f"{name}_backward", **options):
        contracts.assert_two_times(op, op.backends[0].call, inputs, torch.float32)


@BOTH
def test_triton_reads_any_stride(name, poisoned):
    inputs = arguments(name, 2, 5, 3, 24, torch.float32)
    across = tree_map(lambda x: x.mT.contiguous().mT if contracts.is_float(x) else x, inputs)
    expected = contracts.run_with_gradients(OPS[name].backends[0].call, inputs)
    for view in (across, tree_map(contracts.strided, inputs)):
        result = contracts.run_with_gradients(OPS[name].backends[0].call, view)
        for a, b in zip(contracts.outputs(result), contracts.outputs(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@BOTH
def test_triton_repeats_are_bit_equal(name):
    inputs = arguments(name, 2, 9, 4, 24, torch.float16)
    call = OPS[name].backends[0].call
    first, second = (contracts.outputs(contracts.run_with_gradients(call, inputs)) for _ in "ab")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@BOTH
def test_triton_without_rows(name):
    for batch, rows in ((0, 3), (2, 0)):
        inputs = arguments(name, batch, rows, 0, 16, torch.float32)
        results, gradients = contracts.run_with_gradients(OPS[name].backends[0].call, inputs)
        assert all(h.shape == (batch, rows, 16) for h in results)
        assert not any(g.any() for g in gradients)


@BOTH
def test_triton_fp8(name, poisoned):
    """The interpreter's cast to fp8 drops the carry where rounding reaches a power of two."""
    args, options = arguments(name, 2, 9, 4, 64, torch.float32)
    options["out_dtype"] = torch.float8_e4m3fn
    results = (OPS[name].backends[i].call(*args, **options) for i in (0, -1))
    (values, scale), (expected, expected_scale) = (r if name == "adaln" else r[1] for r in results)
    torch.testing.assert_close(scale, expected_scale)
    assert values.dtype == torch.float8_e4m3fn and scale.shape == (2, 13)
    assert (values.float() == expected.float()).double().mean() > 0.95
    with pytest.raises(ValueError, match="out_dtype must be a differentiable dtype"):
        OPS[name].backends[0].call(args[0].requires_grad_(), *args[1:], **options)


def test_triton_fp8_of_a_zero_row():
    zeros = torch.zeros(1, 2, 16, device=contracts.DEVICE)
    call = OPS["adaln"].backends[0].call
    values, scale = call(zeros, Norm(zeros[:, :1], zeros[:, :1]), 1, out_dtype=torch.float8_e4m3fn)
    assert not values.float().any() and scale.eq(1).all()


@BOTH
def test_triton_op_is_well_formed(name):
    (*branch, norm, video_rows), _ = arguments(name, 2, 5, 3, 16, torch.float32)
    tensors = [x.requires_grad_() for x in (*branch, *norm[:2])]
    given = [*tensors, video_rows, *norm.eps, torch.float16]
    if name == "residual_adaln":
        given.append(branch[1][:, :1].detach().clone().requires_grad_())  # the constant row
    torch.library.opcheck(getattr(torch.ops.univigu, name).default, tuple(given))
