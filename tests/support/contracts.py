"""What every backend of an op is held to: the two-times rule against the reference in fp64."""

import contextlib

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from univigu_kernels import OPS, Expert, Rotary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
LOW = tuple(ULP)


def implementations(dtype: torch.dtype = torch.float32) -> list:
    """(op, backend) of every backend that runs here in `dtype`: on a GPU where there is one, else
    on the CPU with Triton's interpreter."""
    return [
        pytest.param(op, backend, id=f"{op.name}-{backend.name}")
        for op in OPS.values()
        for backend in op.backends
        if backend.supports(DEVICE, dtype) is None
    ]


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN, so an element that a kernel leaves out shows. warn_only: cuBLAS is
    deterministic only where a variable says so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def backend(name, kind):
    """The callable of an op's backend."""
    return next(b.call for b in OPS[name].backends if b.name == kind)


def cpu_kernel(name):
    return backend(name, "cpu")


def example(op, dtype, seed=0):
    return op.example(DEVICE, dtype, torch.Generator().manual_seed(seed))


def is_float(x):
    return isinstance(x, torch.Tensor) and x.dtype in (*LOW, torch.float64)


def to_double(tree):
    """Float tensors and dtype arguments become float64; fp8 operands and integers stay."""

    def convert(x):
        if isinstance(x, torch.dtype):
            return torch.float64
        return x.double() if is_float(x) else x

    return tree_map(convert, tree)


def strided(x):
    """The same values at an odd offset, between NaNs, with a padded last dimension."""
    if not is_float(x) or x.ndim == 0:
        return x
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    view = padded[..., 1 : 1 + x.shape[-1]]
    view.copy_(x)
    return view


def outputs(result):
    return [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]


def run(call, inputs):
    args, kwargs = inputs
    return outputs(call(*args, **kwargs))


def arguments_of(inputs):
    """Leaves and structure; rotary tables are constants, one leaf that gets no gradient."""
    return tree_flatten(inputs, is_leaf=lambda x: isinstance(x, Rotary))


def run_with_gradients(call, inputs, seed=1):
    """Outputs and the gradients of all float inputs, for a fixed random cotangent."""
    leaves, spec = arguments_of(inputs)
    leaves = [x.detach().requires_grad_() if is_float(x) else x for x in leaves]
    results = run(call, tree_unflatten(leaves, spec))
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    wanted = [x for x in leaves if is_float(x)]
    gradients = torch.autograd.grad(results, wanted, cotangents, allow_unused=True)
    return results, [
        torch.zeros_like(x) if g is None else g for x, g in zip(wanted, gradients, strict=True)
    ]


def largest(x):
    return x.abs().max().item() if x.numel() else 0.0


def error(x, truth):
    return largest(x.double() - truth.double())


def assert_within(actual, plain, truth, factor, dtype):
    for a, p, t in zip(actual, plain, truth, strict=True):
        assert a.shape == t.shape
        floor = ULP[dtype] * max(largest(t), 1e-30)
        assert error(a, t) <= factor * error(p, t) + floor
        assert error(p, t) <= 16 * floor


def unrounded_fp8_ffn(h, h_scale, video, text, video_rows, _):
    """fp8_ffn in fp64 but for q, the rounding of hidden rows, which backends scale differently."""

    def expert(part):
        up, down = (x.double() * scale.double()[:, None] for x, scale in (part[:2], part[3:5]))
        return Expert(up, part.up_bias.double(), down, part.down_bias.double())

    h = h.double() * h_scale.double()[..., None]
    return OPS["routed_ffn"].reference(h, expert(video), expert(text), video_rows)


def assert_two_times(op, call, inputs, dtype):
    """Values within twice, gradients within three times the error of plain PyTorch in `dtype`."""
    measure = run_with_gradients if op.differentiable else lambda call, i: (run(call, i), [])
    values, gradients = measure(call, inputs)
    plain_values, plain_gradients = measure(op.reference, inputs)
    true_values, true_gradients = measure(op.reference, to_double(inputs))
    assert_within(values, plain_values, true_values, 2, dtype)
    assert_within(gradients, plain_gradients, true_gradients, 3, dtype)
