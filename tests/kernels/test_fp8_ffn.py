"""fp8_ffn against the feed-forward of its dequantised operands, and its kernels at adversarial
shapes.

Operands of the first product are whole numbers: its sums are exact even in a tensor core's 13 bits,
so a hidden value rounds to the same e4m3 number in every backend and in fp64."""

import contracts
import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from univigu_kernels import OPS, Fp8Expert, _triton, bind, explain, quantize_rows, quantize_weight
from univigu_kernels._fp8 import FP8, supports_triton_fp8
from univigu_kernels._fp8_ffn import GROUP_COLUMNS, to_fp8
from univigu_kernels._triton import tl
from univigu_kernels._triton import triton as triton_module
from univigu_kernels.fp8_ffn import forward_op, fp8_ffn_triton

fp8_ffn = OPS["fp8_ffn"].reference
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16)
    if supports_triton_fp8(contracts.DEVICE, dtype) is None
]
triton = pytest.mark.skipif(not DTYPES, reason="needs Triton, and fp8 on a GPU")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def whole(*shape):
    x = torch.randint(-7, 8, shape).double()
    x[..., :1] = 7
    return x * 2.0 ** torch.randint(-2, 3, (*shape[:-1], 1))


def expert(width, hidden, dtype):
    """Channels of very different size and large biases, so that one from elsewhere shows."""
    down = 2.0 ** torch.randint(-2, 3, (width, 1)) * torch.randn(width, hidden)
    up = quantize_weight(whole(hidden, width) / (8 * width**0.5))
    biases = torch.randn(hidden).to(dtype), 9 * torch.randn(width).to(dtype)
    parts = *up, biases[0], *quantize_weight(down), biases[1]
    return Fp8Expert(*(t.to(contracts.DEVICE) for t in parts))


def make(samples, V, T, D, video_F, text_F, dtype):
    h = (t.to(contracts.DEVICE) for t in quantize_rows(whole(samples, V + T, D)))
    return *h, expert(D, video_F, dtype), expert(D, text_F, dtype), V, dtype


def dequantised(weight, scale):
    return weight.double() * scale.double()[..., None]


def exact(h, h_scale, part, rounded=True):
    """The formula in fp64, a group at a time; in words other than the reference's."""
    a = dequantised(h, h_scale) @ dequantised(*part[:2]).mT + part.up_bias.double()
    hidden = F.gelu(a, approximate="tanh")
    if rounded:
        for group in hidden.split(GROUP_COLUMNS, -1):
            scale = group.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
            group.copy_((group / scale).float().to(FP8).double() * scale)
    return hidden @ dequantised(*part[3:5]).mT + part.down_bias.double()


@pytest.mark.parametrize("hidden", [24, 128, 129, 300])
def test_reference_is_the_formula(hidden):
    h, h_scale, video, text, V, _ = make(2, 5, 3, 16, hidden, hidden + 40, torch.float32)
    y = fp8_ffn(h, h_scale, video, text, V, torch.float32)
    for part, rows in ((video, slice(V)), (text, slice(V, None))):
        expected = exact(h[:, rows], h_scale[:, rows], part)
        unrounded = exact(h[:, rows], h_scale[:, rows], part, rounded=False)
        torch.testing.assert_close(y[:, rows].double(), expected, rtol=2e-5, atol=2e-4)
        loss = (unrounded - expected).norm() / (unrounded - part.down_bias).norm()
        assert 5e-3 < loss < 0.04


def test_a_group_of_small_values_keeps_its_precision():
    """One scale per hidden row would take a group 10^5 times smaller than another one to zero."""
    h, h_scale, video, text, V, _ = make(1, 4, 0, 16, 256, 16, torch.float32)
    small = torch.arange(256, device=h.device) >= 128
    scale, bias = video.up_scale, video.up_bias
    video = video._replace(
        up_scale=torch.where(small, scale * 1e-6, scale),
        up_bias=torch.where(small, 1e-5, bias),
        down_weight=torch.where(small, video.down_weight.float(), 0).to(FP8),
        down_bias=torch.zeros_like(video.down_bias),
    )
    y = fp8_ffn(h, h_scale, video, text, V, torch.float32).double()
    expected = exact(h, h_scale, video, rounded=False)
    assert (y - expected).norm() < 0.1 * expected.norm()


def into_nan(*inputs):
    with contracts.poisoned():
        return fp8_ffn_triton(*inputs)


def assert_contract(inputs):
    contracts.assert_two_times(OPS["fp8_ffn"], into_nan, (inputs, {}), inputs[-1])


SHAPES = [  # samples, V, T, D, hidden width of the video expert and of the text expert
    (3, 17, 15, 32, 144, 144),
    (3, 1, 129, 16, 33, 260),
    (1, 129, 1, 24, 256, 16),
    (2, 0, 127, 33, 50, 50),
    (2, 127, 0, 33, 50, 50),
    (1, 1023, 17, 16, 16, 16),
    (4, 15, 1, 70, 130, 65),
]


@triton
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_times_rule(shape, dtype):
    assert_contract(make(*shape, dtype))


@triton
@each_dtype
def test_no_part_of_a_long_sum_is_lost(dtype):
    """2600 columns: five promotions of 512 to fp32, and 40 columns that follow them."""
    assert_contract(make(1, 3, 2, 2600, 20, 20, dtype))


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
@each_dtype
@pytest.mark.parametrize(
    "up, down",
    [
        (options(128, 128, 128, 8, 3), options(128, 128, 128, 8, 4)),
        (options(128, 128, 128, 8, 4), options(64, 64, 128, 4, 4)),
        (options(64, 128, 128, 4, 4), options(128, 128, 64, 8, 4)),
        (options(128, 128, 64, 8, 4), options(16, 16, 32, group=1)),
        (options(16, 128, 32, group=1), options(16, 16, 32, group=2)),
        (options(16, 128, 32, group=2), options(16, 16, 32, group=3)),
    ],
)
def test_every_configuration(up, down, dtype):
    if contracts.DEVICE.type == "cuda":
        room = torch.cuda.get_device_properties(contracts.DEVICE).shared_memory_per_block_optin
        for o in (up, down):
            if (o["BLOCK_M"] + o["BLOCK_N"]) * o["BLOCK_K"] * o["num_stages"] > room:
                pytest.skip("its stages don't fit this device's shared memory")
    with _triton.forced("fp8_ffn_up", **up), _triton.forced("fp8_ffn_down", **down):
        assert_contract(make(3, 21, 18, 40, 270, 200, dtype))


@triton
def test_rows_meet_their_own_expert_and_sample_alone():
    samples, V, T, dtype = 3, 21, 10, DTYPES[-1]
    h, h_scale, video, text, *_ = make(samples, V, T, 16, 144, 144, dtype)
    whole_y = fp8_ffn_triton(h, h_scale, video, text, V, dtype)
    assert whole_y.isfinite().all()
    nan = tree_map(lambda x: torch.full_like(x.float(), torch.nan).to(x.dtype), video)
    for experts, rows in (((nan, text), slice(V, None)), ((video, nan), slice(V))):
        y = fp8_ffn_triton(h, h_scale, *experts, V, dtype)
        assert torch.equal(y[:, rows], whole_y[:, rows])
        assert y.isnan().any(-1).sum() == samples * (V + T) - y[:, rows, 0].numel()
    other, other_scale = h.clone(), h_scale.clone()
    other[1, :V], other_scale[1, :V] = h[0, :V], 3 * h_scale[1, :V]
    for inputs in ((other, h_scale), (h, other_scale)):
        changed = (fp8_ffn_triton(*inputs, video, text, V, dtype) != whole_y).any(-1)
        assert changed[1, :V].all() and changed.sum() == V


@triton
@pytest.mark.parametrize("samples, V, T", [(2, 0, 0), (0, 5, 3)])
def test_no_rows(samples, V, T):
    inputs = make(samples, V, T, 16, 16, 24, DTYPES[-1])
    for call in (fp8_ffn_triton, fp8_ffn):
        y = call(*inputs)
        assert y.shape == (samples, V + T, 16) and y.dtype == DTYPES[-1]


@triton
def test_hidden_rows_of_zeros():
    """A scale of 0 shows on a GPU alone: it makes NaN, which the interpreter reads as 480."""
    h, h_scale, video, text, V, dtype = make(1, 3, 2, 16, 144, 16, DTYPES[-1])
    video = video._replace(up_bias=torch.zeros_like(video.up_bias))
    y = fp8_ffn_triton(torch.zeros_like(h), h_scale, video, text, V, dtype)
    assert torch.equal(y[:, :V], video.down_bias.expand(1, V, 16))


@triton
@pytest.mark.parametrize("part", ["up_scale", "up_bias", "down_scale", "down_bias"])
def test_the_other_experts_numbers_would_show(part):
    h, h_scale, video, text, V, dtype = make(2, 6, 5, 16, 32, 32, DTYPES[-1])
    right = fp8_ffn_triton(h, h_scale, video, text, V, dtype)
    for experts, rows in (
        ((video._replace(**{part: getattr(text, part)}), text), slice(V)),
        ((video, text._replace(**{part: getattr(video, part)})), slice(V, None)),
    ):
        y = fp8_ffn_triton(h, h_scale, *experts, V, dtype)
        changed = (y - right).abs().amax(-1) > 1e-2
        assert changed[:, rows].all() and changed.sum() == changed[:, rows].numel()


@triton
def test_views():
    dtype = DTYPES[-1]
    h, h_scale, video, text, V, _ = make(2, 9, 6, 24, 144, 40, dtype)
    expected = fp8_ffn_triton(h, h_scale, video, text, V, dtype)

    def sliced(t):
        """Rows apart by more than their length, at an odd offset; vectors with a stride of 2."""
        if t.ndim == 1:
            return t.repeat_interleave(2)[::2]
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 3, device=t.device).to(t.dtype)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]

    def transposed(t):
        return t.mT.contiguous().mT if t.ndim > 1 else t

    for change in (sliced, transposed):
        y = fp8_ffn_triton(*tree_map(change, (h, h_scale, video, text)), V, dtype)
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


@triton
def test_repeats_are_bit_equal():
    inputs = make(2, 33, 18, 24, 140, 56, DTYPES[-1])
    assert torch.equal(fp8_ffn_triton(*inputs), fp8_ffn_triton(*inputs))


@triton
def test_opcheck():
    """Its schema check needs a product of fp8 tensors, which torch doesn't have."""
    h, h_scale, video, text, V, dtype = make(2, 7, 4, 16, 32, 32, DTYPES[-1])
    utils = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(forward_op, (h, h_scale, *video, *text, V, dtype), test_utils=utils)


@triton_module.jit
def _cast(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, to_fp8(tl.load(x + i)))


@triton
def test_the_kernels_rounding_is_torchs():
    grid = torch.arange(127, dtype=torch.uint8).view(FP8).float()  # 0 to 448
    middles = (grid[1:] + grid[:-1]) / 2
    near = torch.cat([middles * (1 - 2**-20), middles, middles * (1 + 2**-20)])
    x = torch.cat([grid, near, torch.linspace(0, 448, 513)])
    x = torch.cat([x, -x, x.new_zeros(4096 - 2 * len(x))]).to(contracts.DEVICE)
    y = torch.empty_like(x, dtype=FP8)
    _cast[(1,)](x, y, 4096)
    assert torch.equal(y.float(), x.to(FP8).float())


@pytest.mark.parametrize("call", [fp8_ffn, fp8_ffn_triton])
@pytest.mark.parametrize(
    "change",
    [
        lambda h, s, v, t, V, d: (h.float(), s, v, t, V, d),
        lambda h, s, v, t, V, d: (h, s[:, 1:], v, t, V, d),
        lambda h, s, v, t, V, d: (h, s, v, t, V + 9, d),
        lambda h, s, v, t, V, d: (h, s, v._replace(up_scale=v.up_scale[1:]), t, V, d),
        lambda h, s, v, t, V, d: (h, s, v, t._replace(down_weight=t.down_weight.float()), V, d),
    ],
)
def test_misfits_raise_in_one_format(call, change):
    with pytest.raises(ValueError, match=r"^fp8_ffn: .+ must be .+; got .+\. [A-Z0-9].+\.$"):
        call(*change(*make(2, 3, 2, 16, 16, 16, torch.float32)))


def test_binding_for_fp8_leaves_out_what_cannot_write_it():
    kernel = next(b for b in OPS["residual_adaln"].backends if b.name == "cpu")
    assert not kernel.writes_fp8
    if kernel.supports(torch.device("cpu"), torch.bfloat16) is not None:
        pytest.skip("needs the compiled CPU kernels")
    ops, plain = (bind("auto", "cpu", torch.bfloat16, precision=p) for p in ("fp8", "bf16"))
    chosen, before = ({c.op: c.backend for c in o.table} for o in (ops, plain))
    assert chosen.pop("residual_adaln") == "reference" and before.pop("residual_adaln") == "cpu"
    assert chosen == before and (ops.precision, plain.precision) == ("fp8", "bf16")
    assert "cpu: writes no fp8" in explain(ops) and "fp8;" not in explain(plain)
    with pytest.raises(ValueError, match="missing=writes no fp8"):
        bind("residual_adaln=cpu", "cpu", torch.bfloat16, precision="fp8")
    with pytest.raises(ValueError, match="precision must be bf16 or fp8"):
        bind(precision="int8")
