"""routed_ffn against two separate feed-forward networks, and its kernels at adversarial shapes."""

import contextlib
import math

import contracts
import pytest
import torch
from torch.utils._pytree import tree_map

from univigu_kernels import OPS, Expert, _triton
from univigu_kernels.routed_ffn import backward_op, forward_op, routed_ffn_triton

routed_ffn = OPS["routed_ffn"].reference
triton = pytest.mark.skipif(
    _triton.supports_triton(contracts.DEVICE, torch.float32) is not None, reason="needs Triton"
)
KERNELS = ("ffn_up", "ffn_project", "ffn_hidden_gradient", "ffn_weight_gradient")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


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


@pytest.mark.parametrize("call", [routed_ffn, routed_ffn_triton])
def test_mixed_dtypes_raise(call):
    h, video, text, rows = make(1, 2, 1, 16, 16, 16, torch.float32)
    with pytest.raises(ValueError, match="text expert must be torch.float32, as h is"):
        call(h, video, text._replace(up_bias=text.up_bias.half()), rows)


def make(samples, V, T, D, video_F, text_F, dtype):
    """Arguments whose experts differ in every number, biases large enough to be missed."""

    def randn(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(contracts.DEVICE, dtype)

    def expert(F):
        return Expert(randn(F, D) / D**0.5, randn(F), randn(D, F) / F**0.5, randn(D))

    return randn(samples, V + T, D), expert(video_F), expert(text_F), V


def assert_contract(inputs, dtype):
    contracts.assert_two_times(OPS["routed_ffn"], routed_ffn_triton, (inputs, {}), dtype)


@contextlib.contextmanager
def forced(**options):
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(_triton.forced(kernel, **options))
        yield


SHAPES = [  # samples, V, T, D, hidden width of the video expert and of the text expert
    (3, 17, 15, 32, 48, 48),
    (3, 1, 129, 16, 33, 33),
    (1, 129, 1, 24, 40, 72),
    (2, 0, 127, 33, 50, 50),
    (2, 127, 0, 33, 50, 50),
    (1, 1023, 17, 16, 16, 16),
    (4, 15, 1, 70, 130, 65),
]


@triton
@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_times_rule(shape, dtype):
    assert_contract(make(*shape, dtype), dtype)


def options(m, n, k, warps=4, stages=3, group=8):
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "num_warps": warps,
        "num_stages": stages,
        "GROUP": group,
    }


@triton
@DTYPES
@pytest.mark.parametrize(
    "chosen",
    [
        options(64, 64, 32, 4, 2),
        options(128, 128, 32, 8, 4),
        options(128, 256, 64, 8, 4),
        options(128, 128, 64, 4, 3),
        options(64, 64, 128, 4, 4),
        options(16, 16, 16, group=1),
        options(16, 16, 16, group=2),
    ],
    ids=lambda o: "x".join(map(str, o.values())),
)
def test_every_configuration(chosen, dtype):
    if contracts.DEVICE.type == "cuda":
        stage = (chosen["BLOCK_M"] + chosen["BLOCK_N"]) * chosen["BLOCK_K"] * dtype.itemsize
        device = torch.cuda.get_device_properties(contracts.DEVICE)
        if stage * chosen["num_stages"] > device.shared_memory_per_block_optin:
            pytest.skip("its stages don't fit this device's shared memory")
        if dtype == torch.float32 and chosen["BLOCK_M"] > 64:
            pytest.skip("fp32 takes tiles of 64 x 64")
    shape = (3, 21, 18, 40, 72, 56) if chosen["BLOCK_M"] > 16 else (3, 11, 6, 20, 40, 24)
    with forced(**chosen):
        assert_contract(make(*shape, dtype), dtype)


def gradients(inputs):
    return contracts.run_with_gradients(routed_ffn_triton, (inputs, {}))


@triton
@pytest.mark.parametrize("V, T", [(9, 0), (0, 9), (17, 5)])
def test_every_element_is_written(V, T):
    with contracts.poisoned():
        assert torch.empty(1, device=contracts.DEVICE).new_empty(3).isnan().all()
        values, grads = gradients(make(2, V, T, 24, 40, 56, torch.float32))
    assert all(x.isfinite().all() for x in (*values, *grads))
    for rows, expert in ((V, grads[1:5]), (T, grads[5:])):
        assert all(bool(x.any()) == (rows > 0) for x in expert)


@triton
@pytest.mark.parametrize("samples, V, T", [(2, 0, 0), (0, 5, 3)])
def test_no_rows(samples, V, T):
    inputs = make(samples, V, T, 16, 16, 24, torch.float32)
    with contracts.poisoned():
        (y,), (dh, *weights) = gradients(inputs)
    assert y.shape == dh.shape == (samples, V + T, 16)
    parameters = (*inputs[1], *inputs[2])
    assert [x.shape for x in weights] == [x.shape for x in parameters]
    assert not any(x.any() for x in weights)


@triton
def test_rows_meet_their_own_expert_and_sample_alone():
    """NaN in one expert, or in one sample's rows of a modality, stays there."""
    samples, V, T = 3, 21, 10
    h, video, text, _ = make(samples, V, T, 16, 32, 32, torch.float32)
    whole = routed_ffn_triton(h, video, text, V)
    nan = tree_map(lambda x: torch.full_like(x, torch.nan), video)
    for experts, rows in (((nan, text), slice(V, None)), ((video, nan), slice(V))):
        with forced(**options(16, 16, 16)):
            part = routed_ffn_triton(h, *experts, V)
        torch.testing.assert_close(part[:, rows], whole[:, rows])
        assert part.isnan().any(-1).sum() == samples * (V + T) - part[:, rows, 0].numel()
    spoiled = h.clone()
    spoiled[1, :V] = torch.nan
    y = routed_ffn_triton(spoiled, video, text, V)
    assert y[1, :V].isnan().all() and y.isnan().any(-1).sum() == V
    torch.testing.assert_close(y[1, V:], whole[1, V:])


@triton
def test_a_missing_bias_would_show():
    h, video, text, V = make(2, 6, 5, 16, 32, 32, torch.float32)
    whole = routed_ffn_triton(h, video, text, V)
    for name in ("up_bias", "down_bias"):
        for experts, rows in (
            ((video._replace(**{name: getattr(text, name)}), text), slice(V)),
            ((video, text._replace(**{name: getattr(video, name)})), slice(V, None)),
        ):
            changed = (routed_ffn_triton(h, *experts, V) - whole).abs().amax(-1) > 1e-3
            assert changed[:, rows].all() and changed.sum() == changed[:, rows].numel()


@triton
def test_repeats_are_bit_equal():
    inputs = make(2, 33, 18, 24, 40, 56, torch.float16)
    first, second = (contracts.outputs(gradients(inputs)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@triton
@pytest.mark.parametrize("view", ["strided", "transposed", "sliced"])
def test_views(view):
    inputs = make(2, 9, 6, 24, 40, 40, torch.float32)

    def transposed(x):
        return x.mT.contiguous().mT if contracts.is_float(x) and x.ndim > 1 else x

    def sliced(x):
        """Rows apart, and for h samples apart, by more than their length; the last stride is 1."""
        if not contracts.is_float(x) or x.ndim < 2:
            return x
        wide = x.new_full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 8), torch.nan)
        wide[..., 1:-1, 8:] = x
        return wide[..., 1:-1, 8:]

    change = {"strided": contracts.strided, "transposed": transposed, "sliced": sliced}[view]
    changed = tree_map(change, inputs)
    expected, result = gradients(inputs), gradients(changed)
    pairs = zip(contracts.outputs(expected), contracts.outputs(result), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@triton
def test_an_expanded_cotangent():
    h, video, text, V = make(2, 9, 6, 16, 32, 32, torch.float32)
    h.requires_grad_()
    (ours,) = torch.autograd.grad(routed_ffn_triton(h, video, text, V).sum(), h)
    (expected,) = torch.autograd.grad(routed_ffn(h, video, text, V).sum(), h)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@triton
def test_pre_activations_are_saved_only_for_a_gradient():
    h, video, text, V = make(1, 5, 4, 16, 32, 48, torch.float32)
    assert forward_op(h, *video, *text, V, False)[1].shape == (1, 0, 48)
    y, a = forward_op(h, *video, *text, V, True)
    expected = torch.nn.functional.linear(h[:, :V], video.up_weight, video.up_bias)
    torch.testing.assert_close(a[:, :V, :32], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="save must be true where gradients are wanted"):
        forward_op(h.requires_grad_(), *video, *text, V, False)
    with torch.no_grad():
        torch.testing.assert_close(routed_ffn_triton(h, video, text, V), y)


@triton
def test_opcheck():
    h, video, text, V = make(2, 7, 4, 16, 32, 32, torch.float32)
    experts = [x.requires_grad_() for x in (*video, *text)]
    torch.library.opcheck(forward_op, (h.requires_grad_(), *experts, V, True))
    with torch.no_grad():
        y, a = forward_op(h, *experts, V, True)
    weights = [experts[i].detach() for i in (0, 2, 4, 6)]
    torch.library.opcheck(backward_op, (h.detach(), a, y, *weights, V))
