"""Contracts that every op, backend and example keeps, and the binding of backends."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from contracts import (
    LOW,
    assert_two_times,
    assert_within,
    error,
    example,
    implementations,
    is_float,
    largest,
    outputs,
    run,
    strided,
    to_double,
    unrounded_fp8_ffn,
)
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from univigu_kernels import OPS, Norm, _compiled, bind, explain


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "op, backend, dtype",
    [
        pytest.param(*case.values, dtype, id=f"{case.id}-{dtype}")
        for dtype in LOW
        for case in implementations(dtype)
    ],
)
def test_error_is_at_most_twice_that_of_plain_pytorch(op, backend, dtype):
    inputs = example(op, dtype)
    if op.name == "vocab_sample":  # tokens are compared where the rounding cannot flip them
        assert_within(
            run(backend.call, inputs)[1:],
            run(op.reference, inputs)[1:],
            run(op.reference, to_double(inputs))[1:],
            2,
            dtype,
        )
        return
    if op.name == "fp8_ffn" and backend.name in ("torch", "split"):  # they scale hidden rows whole
        (y,), (plain,) = (run(call, inputs) for call in (backend.call, op.reference))
        truth = unrounded_fp8_ffn(*inputs[0])
        assert error(y, truth) <= 2 * error(plain, truth) < 0.1 * largest(truth)
        return
    assert_two_times(op, backend.call, inputs, dtype)


@pytest.mark.parametrize("name", [op.name for op in OPS.values() if op.differentiable])
def test_gradcheck_of_the_reference(name):
    leaves, spec = tree_flatten(example(OPS[name], torch.float64))
    places = [i for i, x in enumerate(leaves) if is_float(x)]

    def call(*floats):
        filled = list(leaves)
        for place, x in zip(places, floats, strict=True):
            filled[place] = x
        return tuple(run(OPS[name].reference, tree_unflatten(filled, spec)))

    floats = [leaves[i].detach().clone().requires_grad_() for i in places]
    assert torch.autograd.gradcheck(call, floats, fast_mode=True)


@pytest.mark.parametrize("op, backend", implementations())
def test_views_give_the_values_of_contiguous_tensors(op, backend):
    inputs = example(op, torch.float32)
    results = run(backend.call, tree_map(strided, inputs)), run(backend.call, inputs)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op, backend", implementations())
def test_repeats_are_bit_equal(op, backend):
    inputs = example(op, torch.float32)
    for a, b in zip(run(backend.call, inputs), run(backend.call, inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, backend", implementations())
def test_inputs_are_left_alone(op, backend):
    inputs = example(op, torch.float32)
    before = [x.clone() for x in outputs(inputs)]
    run(backend.call, inputs)
    for old, new in zip(before, outputs(inputs), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("op, backend", implementations())
def test_a_batch_of_zero(op, backend):
    """Tensors whose first dimension is the batch of 2 lose it; shared ones stay."""
    inputs = example(op, torch.float32)
    shared = {"qknorm_rope": lambda x: x.ndim == 1}.get(op.name, lambda x: False)

    def empty(x):
        batched = isinstance(x, torch.Tensor) and x.ndim and x.shape[0] == 2 and not shared(x)
        return x[:0] if batched else x

    args, kwargs = inputs
    if op.name in ("rope3d", "qknorm_rope"):  # the tables have axes of length 2
        args = tuple(empty(x) if isinstance(x, torch.Tensor) else x for x in args)
        results = run(backend.call, (args, kwargs))
    else:
        results = run(backend.call, tree_map(empty, inputs))
    for result, full in zip(results, run(backend.call, inputs), strict=True):
        assert result.shape == (0, *full.shape[1:])


@pytest.mark.parametrize("name", ["adaln", "residual_adaln", "routed_ffn"])
def test_one_modality_alone_equals_its_rows_of_the_joint_call(name):
    args, kwargs = example(OPS[name], torch.float64)
    video_rows, full = args[-1], run(OPS[name].reference, (args, kwargs))
    for rows, alone in ((slice(video_rows), video_rows), (slice(video_rows, None), 0)):
        cut = [x[:, rows] if is_float(x) and x.shape[1] > 2 else x for x in args[:-1]]
        parts = run(OPS[name].reference, ((*cut, alone), kwargs))
        for part, joint in zip(parts, full, strict=True):
            torch.testing.assert_close(part, joint[:, rows])


@pytest.mark.parametrize(
    "name, place, value",
    [
        ("adaln", 2, 30),
        ("adaln", 1, Norm(torch.ones(3, 2, 32), torch.ones(2, 2, 32))),
        ("adaln", 1, Norm(torch.ones(2, 2, 32), torch.ones(2, 3, 32))),
        ("residual_adaln", 1, torch.ones(2, 28, 32)),
        ("qknorm_rope", 4, 5),
        ("qknorm_rope", 2, torch.ones(16)),
        ("rope3d", 0, torch.ones(2, 28, 2, 16)),
        ("joint_attention", 3, 30),
        ("cross_attention", 1, torch.ones(2, 11, 1, 16)),
        ("routed_ffn", 0, torch.ones(2, 29, 31)),
        ("vocab_loss", 3, torch.zeros(2, 4, dtype=torch.int64)),
        ("vocab_sample", 3, torch.zeros(2)),
    ],
)
def test_misfits_raise_in_one_format(name, place, value):
    args, kwargs = example(OPS[name], torch.float32)
    args = (*args[:place], value, *args[place + 1 :])
    with pytest.raises(ValueError, match=rf"^{name}: .+ must be .+; got .+\. [A-Z0-9].+\.$"):
        OPS[name].reference(*args, **kwargs)


def test_every_op_states_its_cost():
    for op in OPS.values():
        assert op.backends[-1].name == "reference"
        for case in op.cases.values():
            assert op.bytes(case) > 0 and op.flops(case) > 0
    # 30 layers of the 1.3B model: 200.92 TFLOP of joint attention, 54.10 + 0.42 of feed-forward.
    case = OPS["joint_attention"].cases["wan2.1-1.3b/480x832x81"]
    assert 30 * OPS["joint_attention"].flops(case) == pytest.approx(200.92e12, rel=1e-4)
    assert 30 * OPS["routed_ffn"].flops(case) == pytest.approx(54.52e12, rel=1e-3)


@pytest.mark.parametrize(
    "dtype, attention",
    [
        (torch.float32, "cpu" if _compiled.built() else "sdpa"),
        (torch.bfloat16, "cpu" if _compiled.built() else "sdpa"),
        (torch.float16, "sdpa"),
        (torch.float64, "reference"),
    ],
    ids=str,
)
def test_auto(monkeypatch, dtype, attention):
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    ops = bind(dtype=dtype)
    chosen = {choice.op: choice.backend for choice in ops.table}
    assert list(chosen) == list(OPS)
    assert chosen["joint_attention"] == chosen["cross_attention"] == attention
    backends = {b.name: b.call for b in OPS["joint_attention"].backends}
    assert ops.joint_attention is backends[attention]
    with pytest.raises(dataclasses.FrozenInstanceError):
        ops.adaln = None


def test_requests(monkeypatch):
    def chosen(request):
        return {choice.op: choice.backend for choice in bind(request).table}

    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    automatic = chosen("auto")["cross_attention"]
    assert set(chosen("reference").values()) == {"reference"}
    named = chosen("joint_attention=reference, adaln=reference")
    assert named["joint_attention"] == named["adaln"] == "reference"
    assert named["cross_attention"] == automatic != "reference"
    assert chosen("sdpa")["adaln"] == chosen("auto")["adaln"]  # has no such backend
    monkeypatch.setenv("UNIVIGU_KERNELS", "cross_attention=reference")
    assert chosen("auto")["cross_attention"] == "reference"
    assert chosen("auto")["joint_attention"] == automatic
    assert chosen("cross_attention=sdpa")["cross_attention"] == "sdpa"


@pytest.mark.parametrize(
    "request_, said",
    [
        ("fastest", "op=backend"),
        ("rope3d=sdpa", "one of .*reference"),
        ("attention=sdpa", "one of adaln, residual_adaln"),
        ("", "op=backend"),
    ],
)
def test_unknown_names_raise(request_, said):
    with pytest.raises(ValueError, match=said):
        bind(request_)


def test_unmeetable_request_says_what_is_missing():
    with pytest.raises(ValueError) as caught:
        bind("joint_attention=sdpa", dtype=torch.float64)
    for word in ("required=sdpa", "supported=reference", "missing=needs float32", "device=cpu"):
        assert word in str(caught.value)


def test_explain(monkeypatch):
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    lines = explain(dtype=torch.float64).splitlines()
    assert lines[0].index("backend") == lines[1].index("reference")
    assert any("joint_attention" in line and "sdpa: needs float32" in line for line in lines)
    assert "sdpa was" not in explain(bind("auto"))
    assert "sdpa: reference was requested" in explain(bind("reference"))


def test_import_needs_neither_triton_nor_the_engine():
    probe = (
        "import sys; sys.modules['triton'] = None; import univigu_kernels as u; u.explain();"
        "assert 'engine' not in sys.modules"
    )
    source_root = os.path.dirname(os.path.dirname(sys.modules["univigu_kernels"].__file__))
    subprocess.run([sys.executable, "-c", probe], check=True, env={"PYTHONPATH": source_root})
