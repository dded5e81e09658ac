"""What only a GPU can show: bf16 at real widths, replay of a captured graph, many repeats, and a
subset for compute-sanitizer. `bench/gpu.sh` runs it."""

import contracts
import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map

from univigu_kernels import OPS

pytestmark = pytest.mark.gpu
KERNELS = [
    pytest.param(op, backend, id=f"{op.name}-{backend.name}")
    for op in OPS.values()
    for backend in op.backends
    if backend.name in ("triton", "cuda")
]
LIBRARY = [
    pytest.param(op, backend, id=f"{op.name}-{backend.name}")
    for op in OPS.values()
    for backend in op.backends
    if backend.name in ("cublaslt", "torch")
    and backend.supports(contracts.DEVICE, torch.bfloat16) is None
]


def inputs_of(op):
    return contracts.example(op, torch.bfloat16)


@pytest.mark.parametrize("op, backend", KERNELS)
def test_200_repeats_are_bit_equal(op, backend):
    inputs = inputs_of(op)
    measure = contracts.run_with_gradients if op.differentiable else contracts.run
    first = contracts.outputs(measure(backend.call, inputs))
    for _ in range(200):
        for a, b in zip(first, contracts.outputs(measure(backend.call, inputs)), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("op, backend", KERNELS + LIBRARY)
def test_replay_of_a_captured_graph_equals_eager(op, backend):
    args, kwargs = inputs_of(op)
    with torch.no_grad():
        eager = contracts.run(backend.call, (args, kwargs))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = contracts.run(backend.call, (args, kwargs))
        given = {x.data_ptr() for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        for result in captured:  # flow_step's new m2 is the old m1, which it reads
            if result.dtype != torch.float8_e4m3fn and result.data_ptr() not in given:
                result.zero_()
        graph.replay()
        torch.cuda.synchronize()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, backend", KERNELS)
def test_sanitized_forward_and_backward(op, backend):
    """Inputs lie between NaNs, so a read past an end shows in the result too."""
    measure = contracts.run_with_gradients if op.differentiable else contracts.run
    inputs = tree_map(contracts.strided, inputs_of(op))
    for result in contracts.outputs(measure(backend.call, inputs)):
        assert not result.is_floating_point() or result.float().isfinite().all()
