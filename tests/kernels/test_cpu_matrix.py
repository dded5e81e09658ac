"""The compiled CPU kernels that are matrix products (linear, routed_ffn) and the norm between them
(rms_norm), on every instruction set of the machine."""

import contracts
import pytest
import torch
from contracts import cpu_kernel as cpu

from univigu_kernels import OPS, Expert, _compiled

pytestmark = pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

LINEAR = [  # rows, D, N: around tiles of 6 rows, 64 columns, 512 of depth and 192 rows a task
    (0, 16, 16),
    (1, 1, 1),
    (15, 17, 33),
    (17, 64, 65),
    (127, 40, 129),
    (129, 95, 70),
    (6, 513, 64),
    (5, 1030, 130),
    (197, 33, 530),
    (1023, 20, 7),
]
FFN = [  # batch, video rows, text rows, D, hidden widths of video and text
    (1, 1, 0, 16, 16, 16),
    (1, 0, 1, 24, 40, 8),
    (3, 17, 15, 32, 48, 48),
    (2, 91, 7, 33, 50, 70),
    (1, 129, 1, 24, 530, 72),
    (4, 15, 1, 70, 130, 65),
    (0, 3, 2, 16, 16, 16),
]
NORM = [(1, 1, 5), (2, 15, 17), (3, 129, 40), (1, 1023, 66), (0, 4, 16), (2, 0, 16)]


def linear_inputs(rows, D, N, dtype, bias=True):
    weight = torch.randn(N, D) / max(1, D) ** 0.5
    return (torch.randn(rows, D).to(dtype), weight.to(dtype), torch.randn(N).to(dtype)), {}


def ffn_inputs(batch, video_rows, text_rows, D, video_F, text_F, dtype):
    def expert(F):
        up, down = torch.randn(F, D) / D**0.5, torch.randn(D, F) / F**0.5
        return Expert(*(t.to(dtype) for t in (up, torch.randn(F), down, torch.randn(D))))

    h = torch.randn(batch, video_rows + text_rows, D).to(dtype)
    return (h, expert(video_F), expert(text_F), video_rows), {}


@DTYPES
@pytest.mark.parametrize("shape", LINEAR)
def test_linear_is_within_two_times(shape, dtype, isa, poisoned):
    contracts.assert_two_times(OPS["linear"], cpu("linear"), linear_inputs(*shape, dtype), dtype)


@DTYPES
@pytest.mark.parametrize("shape", FFN)
def test_routed_ffn_is_within_two_times(shape, dtype, isa, poisoned):
    inputs = ffn_inputs(*shape, dtype)
    contracts.assert_two_times(OPS["routed_ffn"], cpu("routed_ffn"), inputs, dtype)


@DTYPES
@pytest.mark.parametrize("shape", NORM)
def test_rms_norm_is_within_two_times(shape, dtype, isa, poisoned):
    x = torch.randn(shape)
    x[..., 0] *= 3
    inputs = (x.to(dtype), torch.randn(shape[-1])), {"eps": 0.1}
    contracts.assert_two_times(OPS["rms_norm"], cpu("rms_norm"), inputs, dtype)


@DTYPES
def test_views_of_packed_projections(dtype, isa):
    """k of [k ; v], a transposed weight, rows of two samples that do not lie evenly."""
    (x, weight, bias), _ = linear_inputs(34, 40, 24, dtype)
    packed = torch.full((2, 20, 80), torch.nan, dtype=dtype)
    packed[:, :17, :40] = x.view(2, 17, 40)
    view = packed[:, :17, :40]
    expected = cpu("linear")(x, weight, bias).view(2, 17, 24)
    assert torch.equal(cpu("linear")(view, weight.mT.contiguous().mT, bias), expected)
    assert torch.equal(cpu("linear")(view, weight), cpu("linear")(x, weight).view(2, 17, 24))
    single = x[:3].unsqueeze(0).transpose(0, 1)  # one row a sample, of any stride
    assert torch.equal(cpu("linear")(single, weight, bias)[:, 0], expected.flatten(0, 1)[:3])
    norm = torch.randn(40)
    rows = cpu("rms_norm")(x.view(2, 17, 40), norm)
    assert torch.equal(cpu("rms_norm")(view, norm), rows)


@DTYPES
def test_a_row_depends_on_itself_alone(dtype, isa):
    """Its bits too: neither on the rows beside it nor on their number."""
    (h, video, text, _), _ = ffn_inputs(1, 100, 0, 33, 70, 16, dtype)
    whole = cpu("routed_ffn")(h, video, text, 100)
    for rows in (1, 5, 90, 97):
        assert torch.equal(cpu("routed_ffn")(h[:, :rows], video, text, rows), whole[:, :rows])
    h[0, 50] = torch.nan
    poisoned = cpu("routed_ffn")(h, video, text, 100)
    assert poisoned[0, 50].isnan().all()
    others = torch.arange(100) != 50
    assert torch.equal(poisoned[:, others], whole[:, others])


@DTYPES
def test_few_rows_have_the_bits_of_many(dtype, isa):
    """A large weight that is packed where it is used, of few rows, and one that was packed before.
    Without any depth the product is the bias."""
    (x, weight, bias), _ = linear_inputs(9, 514, 530, dtype)
    many = cpu("linear")(x, weight, bias)
    assert torch.equal(cpu("linear")(x[:8], weight, bias), many[:8])
    assert torch.equal(cpu("linear")(x[:, :0], weight[:, :0], bias), bias.expand(9, -1))

    (h, video, text, _), _ = ffn_inputs(1, 193, 0, 514, 530, 520, dtype)
    for rows, expert in ((0, "text"), (1, "video")):
        many = cpu("routed_ffn")(h, video, text, 193 * rows)
        few = cpu("routed_ffn")(h[0, :192].view(3, 64, 514), video, text, 64 * rows)
        assert torch.equal(few.view(192, 514), many[0, :192]), expert


def test_the_number_of_threads_does_not_matter(two_threads):
    inputs = {
        "linear": linear_inputs(700, 64, 600, torch.bfloat16),
        "routed_ffn": ffn_inputs(2, 500, 60, 64, 128, 96, torch.bfloat16),
        "linear of few rows": linear_inputs(8, 514, 600, torch.bfloat16),
        "routed_ffn of few rows": ffn_inputs(2, 0, 60, 514, 128, 600, torch.bfloat16),
        "rms_norm": ((torch.randn(2, 900, 64), torch.randn(64)), {}),
    }
    for name, (args, kwargs) in inputs.items():
        both = []
        for threads in (2, 1):
            torch.set_num_threads(threads)
            both.append(cpu(name.partition(" ")[0])(*args, **kwargs))
        assert torch.equal(*both), name


def test_gelu_of_extremes(isa):
    """The sigmoid's exponential does not overflow into NaN, and NaN stays."""
    a = torch.tensor([-1e30, -60.0, -9.0, 0.0, 9.0, 1e30, torch.nan])
    hidden, da = torch.ops.univigu_C.gelu_backward(a, torch.ones_like(a))
    assert torch.equal(hidden[3:6], a[3:6]) and hidden[:3].abs().max() < 1e-6
    assert hidden[6].isnan() and da[6].isnan() and da[4] == 1


def test_ops_are_well_formed():
    (x, weight, bias), _ = linear_inputs(5, 8, 6, torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.univigu_C.linear.default, leaves)
    norm = (torch.randn(1, 5, 8, requires_grad=True), torch.randn(8, requires_grad=True), 1e-6)
    torch.library.opcheck(torch.ops.univigu_C.rms_norm.default, norm)
    (h, video, text, rows), _ = ffn_inputs(1, 3, 2, 8, 6, 6, torch.float32)
    leaves = [t.requires_grad_() for t in (h, *video, *text)]
    torch.library.opcheck(torch.ops.univigu_C.routed_ffn.default, (*leaves, rows, True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_a_named_error(dtype):
    args, _ = linear_inputs(5, 8, 6, dtype)
    with pytest.raises(RuntimeError, match="linear: x must be float32 or bfloat16 .*reference"):
        cpu("linear")(*args)
