"""rms_norm_silu: its formula pixel by pixel, and its backends at awkward shapes."""

import contracts
import pytest
import torch

from univigu_kernels import OPS, PIXELS, _compiled, _trial, bind_op, registry
from univigu_kernels._problems import normal
from univigu_kernels._triton import forced

CPU = torch.device("cpu")
OP = OPS["rms_norm_silu"]
triton = contracts.backend("rms_norm_silu", "triton")
cpu = contracts.backend("rms_norm_silu", "cpu")
SHAPES = [(1, 1, 1, 1, 1), (2, 16, 3, 5, 7), (1, 96, 1, 3, 43), (1, 384, 2, 4, 8), (3, 40, 129)]


def arguments(shape, dtype=torch.float32):
    """Some pixels are zeros, one is tiny, one is large."""
    randn = normal(CPU, torch.float64)
    x = randn(*shape)
    flat = x.view(*shape[:2], -1)
    flat[..., 1::5], flat[..., 2::50] = 0, flat[..., 2::50] * 1e-5
    flat[..., 3::50] *= 1e4
    return (x.to(contracts.DEVICE, dtype), randn(shape[1]).to(contracts.DEVICE, dtype)), {}


def test_formula():
    (x, gamma), _ = arguments((2, 3, 2, 2), torch.float64)
    for b, i, j in torch.cartesian_prod(*[torch.arange(2)] * 3).tolist():
        pixel = x[b, :, i, j]
        n = pixel / max(pixel.norm().item(), 1e-12) * 3**0.5 * gamma
        found = OP.reference(x, gamma)[b, :, i, j]
        torch.testing.assert_close(found, n / (1 + (-n).exp()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_within_two_times(shape, dtype, poisoned):
    contracts.assert_two_times(OP, triton, arguments(shape, dtype), dtype)


def test_triton_with_another_block(poisoned):
    with forced("rms_norm_silu", BLOCK_P=16, BLOCK_C=64):
        inputs = arguments((2, 40, 3, 5, 7))
        contracts.assert_two_times(OP, triton, inputs, torch.float32)


def test_triton_is_well_formed():
    torch.library.opcheck(torch.ops.univigu.rms_norm_silu.default, arguments(SHAPES[1])[0])


@pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", _compiled.build_info().get("instruction_sets", ()))
def test_cpu_on_every_instruction_set(isa, dtype, poisoned):
    for shape in (*SHAPES, (2, 24, 3, 16, 16)):
        inputs = arguments(shape, dtype)
        with _compiled.instruction_set(isa):
            contracts.assert_two_times(OP, cpu, inputs, dtype)


@pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
def test_cpu_is_the_same_from_two_threads_and_of_a_view(two_threads):
    (x, gamma), _ = arguments((2, 48, 4, 32, 33))
    found = cpu(x, gamma)
    torch.set_num_threads(1)
    assert torch.equal(cpu(x, gamma), found)
    view = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert not view.is_contiguous() and torch.equal(cpu(view, gamma), found)


@pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
def test_cpu_says_what_it_does_not_take():
    x, gamma = torch.randn(1, 4, 6), torch.randn(4)
    with pytest.raises(RuntimeError, match="must be float32 or bfloat16 in the backend cpu"):
        cpu(x.half(), gamma)
    torch.library.opcheck(torch.ops.univigu_C.rms_norm_silu.default, (x, gamma))


@pytest.mark.parametrize("x, gamma", [((4, 6), 4), ((1, 4, 6), 3), ((1, 4, 6), 6)])
def test_shapes_are_checked(x, gamma):
    for backend in OP.backends:
        with pytest.raises(ValueError, match=r"^rms_norm_silu: x and gamma must be \[B, C, \.\.\."):
            backend.call(torch.randn(x), torch.randn(gamma))


def test_large_and_unbounded_values():
    """silu's ends: e^100 would be infinite in the denominator; NaN stays NaN."""
    x = torch.tensor([[[-1.0, 1.0, float("nan")]]])  # n is -100, 100, NaN
    for backend in OP.backends:
        if backend.supports(CPU, torch.float32) is None:
            found = backend.call(x, torch.tensor([100.0]))[0, 0]
            assert abs(found[0]) < 1e-30 and found[1] == 100 and found[2].isnan(), backend.name


def test_one_op_alone(monkeypatch):
    """`bind_op` chooses as `bind` does, and on a GPU by the trial of its own class of shapes."""
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    place = torch.float32, PIXELS, {"C": 96}
    names = {b.call: b.name for b in OP.backends}
    assert names[bind_op(OP.name, "reference", "cpu", *place)] == "reference"
    monkeypatch.setenv("UNIVIGU_KERNELS", "rms_norm_silu=eager")
    assert names[bind_op(OP.name, "auto", "cpu", *place)] == "eager"
    monkeypatch.delenv("UNIVIGU_KERNELS")
    with pytest.raises(ValueError, match="rms_norm_silu must be run by a backend that supports"):
        bind_op(OP.name, "rms_norm_silu=eager", "cpu", torch.float16, PIXELS, {"C": 96})

    assert OP.name not in registry._parse("torch")  # of fp8's products, in models of bf16

    asked = []

    def shared(request, folder, once):
        asked.append((request.kind, request.case, request.dtype, request.candidates, once))
        return _trial.Trial((("triton", 0.1), ("eager", 0.2)))

    monkeypatch.setattr(_trial, "shared", shared)
    lacks = lambda op, backend, *rest: "needs a CPU" if backend.name == "cpu" else None  # noqa: E731
    monkeypatch.setattr(registry, "_lacks", lacks)
    assert names[bind_op(OP.name, "auto", "cuda", *place, once=len)] == "triton"
    assert asked == [(PIXELS, {"C": 96}, "float32", ("triton", "eager"), len)]


def test_the_trial_proves_and_times(tmp_path):
    """In its own process, on this CPU: torch's is right, and the other is a backend here too."""
    able = tuple(b.name for b in OP.backends[1:-1] if b.supports(CPU, torch.float32) is None)
    request = _trial.Request(OP.module, PIXELS, {"C": 16}, "cpu", "float32", able)
    trial = _trial.hold(request, running=60)
    assert {name for name, _ in trial.times} == set(able) and not trial.rejected
