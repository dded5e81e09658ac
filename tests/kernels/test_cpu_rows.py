"""The compiled CPU kernels over rows (adaln, residual_adaln, qknorm_rope, rope3d, flow_step) on
every instruction set of the machine: adversarial shapes, strides and dtypes, gradients that do not
depend on the number of threads, tokens equal to the reference's."""

import contracts
import pytest
import torch
from contracts import cpu_kernel as cpu
from torch.utils._pytree import tree_map

from univigu_kernels import (
    OPS,
    Into,
    Norm,
    SolverState,
    TextUpdate,
    VideoUpdate,
    _compiled,
    rotary_tables,
)
from univigu_kernels._philox import JUMP, philox_uniform

pytestmark = pytest.mark.skipif(not _compiled.built(), reason="the compiled module is not built")
NORMS = pytest.mark.parametrize("name", ["adaln", "residual_adaln"])
ROWS = pytest.mark.parametrize("name", ["adaln", "residual_adaln", "qknorm_rope", "rope3d"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def norm_inputs(name, batch, video_rows, text_rows, width, dtype, shared=(False, False)):
    """Modulations [1|B, 1|2, D]; two eps far apart, one as large as the variance of text rows."""
    mod = [1 if alone else full for alone, full in zip(shared, (batch, 2), strict=True)]
    x = 1 + torch.randn(batch, video_rows + text_rows, width)
    x[:, video_rows:] *= 0.3
    gate, weight, shift = torch.randn(3, *mod, width)
    branch = (torch.randn(x.shape).to(dtype), gate) if name == "residual_adaln" else ()
    norm = Norm(weight, shift, (1e-6, 0.1))
    return (x, *branch, norm, video_rows), {"out_dtype": dtype}


def rope_inputs(name, batch, grid, text_rows, heads, head_dim, dtype):
    """qknorm_rope gets q and k inside packed projections that end in NaN."""
    rows = grid[0] * grid[1] * grid[2] + text_rows
    rotary = rotary_tables(grid, text_rows, head_dim, "cpu")
    if name == "rope3d":
        return (torch.randn(batch, rows, heads, head_dim).to(dtype), rotary), {}
    width = heads * head_dim
    projected = torch.randn(batch, rows, 3 * width).to(dtype)
    projected[..., 2 * width :] = torch.nan
    q, k, _ = projected.chunk(3, -1)
    return (q, k, *torch.randn(2, width), heads, rotary, 0.1), {}


def inputs_of(name, dtype=torch.float32, batch=2):
    if name in ("adaln", "residual_adaln"):
        return norm_inputs(name, batch, 19, 4, 40, dtype)
    return rope_inputs(name, batch, (2, 3, 3), 5, 2, 20, dtype)


def many_rows(name):
    """Enough of them for two threads."""
    if name in ("adaln", "residual_adaln"):
        return norm_inputs(name, 2, 1023, 129, 64, torch.float32)
    return rope_inputs(name, 2, (3, 11, 31), 129, 2, 32, torch.float32)


def measure(name, inputs):
    return contracts.outputs(contracts.run_with_gradients(cpu(name), inputs))


def assert_equal(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


NORM_SHAPES = [  # batch, video rows, text rows, width
    (1, 1, 0, 5),
    (1, 0, 1, 24),
    (3, 15, 2, 40),
    (2, 17, 7, 67),
    (1, 127, 1, 250),
    (1, 0, 129, 301),
    (2, 64, 65, 192),
    (1, 3, 2, 1000),
]
ROPE_SHAPES = [  # batch, grid, text rows, heads, head_dim
    (1, (1, 1, 1), 0, 1, 16),
    (1, (0, 2, 3), 1, 2, 24),
    (3, (3, 5, 1), 2, 3, 16),
    (2, (1, 1, 17), 7, 1, 64),
    (1, (2, 2, 2), 3, 2, 96),
    (1, (1, 3, 2), 2, 1, 128),
    (1, (2, 1, 3), 3, 5, 4),
    (1, (5, 5, 5), 2, 1, 16),
    (1, (0, 1, 1), 129, 1, 70),
]


@ROWS
@DTYPES
def test_cpu_is_within_two_times(name, dtype, isa, poisoned):
    norms = name in ("adaln", "residual_adaln")
    make, shapes = (norm_inputs, NORM_SHAPES) if norms else (rope_inputs, ROPE_SHAPES)
    for shape in shapes:
        inputs = make(name, *shape, dtype)
        contracts.assert_two_times(OPS[name], cpu(name), inputs, dtype)


@DTYPES
def test_cpu_writes_k_and_v_where_they_are_kept(dtype, isa, poisoned):
    """Every bit is that of a call without and of a copy; no other row of the cache is touched."""
    args, _ = rope_inputs("qknorm_rope", 2, (2, 3, 3), 5, 2, 20, dtype)
    v = torch.randn(2, 23, 120).to(dtype)[..., 80:]
    cache = torch.full((2, 2, 30, 2, 20), torch.nan, dtype=dtype)
    q, k = cpu("qknorm_rope")(*args)
    assert_equal(cpu("qknorm_rope")(*args, Into(v, *cache[:, :, 7:])), (q, k))
    assert_equal(cache[:, :, 7:].flatten(3), (k.flatten(2), v))
    assert cache[:, :, :7].isnan().all()


@NORMS
@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_cpu_shared_modulation(name, shared, poisoned):
    inputs = norm_inputs(name, 3, 70, 4, 16, torch.float32, shared)
    contracts.assert_two_times(OPS[name], cpu(name), inputs, torch.float32)


@DTYPES
def test_cpu_ungated_residual(dtype, isa, poisoned):
    (x, y, _, *rest), options = norm_inputs("residual_adaln", 2, 9, 4, 24, dtype)
    op = OPS["residual_adaln"]
    contracts.assert_two_times(op, cpu("residual_adaln"), ((x, y, None, *rest), options), dtype)


@NORMS
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("y_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("mod_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_takes_any_mix_of_dtypes(name, x_dtype, y_dtype, out_dtype, mod_dtype):
    (x, *branch, norm, video_rows), options = norm_inputs(name, 2, 9, 4, 24, y_dtype)
    branch = [t if t.shape == x.shape else t.to(mod_dtype) for t in branch]
    norm = Norm(*(t.to(mod_dtype) for t in norm[:2]), norm.eps)
    inputs = (x.to(x_dtype), *branch, norm, video_rows), {**options, "out_dtype": out_dtype}
    expected = contracts.run_with_gradients(OPS[name].reference, inputs)
    for a, b in zip(measure(name, inputs), contracts.outputs(expected), strict=True):
        assert a.dtype == b.dtype
    lowest = max(x_dtype, y_dtype, out_dtype or x_dtype, mod_dtype, key=contracts.ULP.get)
    contracts.assert_two_times(OPS[name], cpu(name), inputs, lowest)


@DTYPES
def test_cpu_norms_the_rounded_sum(dtype, isa):
    (x, y, gate, *norm), options = norm_inputs("residual_adaln", 2, 9, 4, 200, dtype)
    total, h = cpu("residual_adaln")(x.to(dtype), y, gate, *norm, **{**options, "out_dtype": None})
    assert total.dtype == dtype
    assert torch.equal(h, cpu("adaln")(total, *norm))


@pytest.mark.parametrize("used", [0, 1])
def test_cpu_with_one_output_unused(used, poisoned):
    inputs = norm_inputs("residual_adaln", 1, 3, 2, 16, torch.float32)
    results = [
        contracts.run_with_gradients(lambda *a, call=call, **k: call(*a, **k)[used], inputs)
        for call in (OPS["residual_adaln"].reference, cpu("residual_adaln"))
    ]
    for a, b in zip(*map(contracts.outputs, results), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@ROWS
def test_cpu_gives_the_same_bits_from_any_number_of_threads(name, two_threads):
    inputs = many_rows(name)
    results = [measure(name, inputs), measure(name, inputs)]
    torch.set_num_threads(1)
    results.append(measure(name, inputs))
    for result in results[1:]:
        assert_equal(result, results[0])
    expected = contracts.outputs(contracts.run_with_gradients(OPS[name].reference, inputs))
    for a, b in zip(results[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-4)


@ROWS
def test_cpu_reads_any_stride(name, isa, poisoned):
    args, options = inputs_of(name)
    constants = tree_map(lambda x: contracts.strided(x), [x for x in args[5:]])
    floats = [x for x in args[:5] if contracts.is_float(x)]
    expected = measure(name, (args, options))
    for view in (contracts.strided, lambda x: x.mT.contiguous().mT if x.ndim > 2 else x):
        viewed = [view(x) if contracts.is_float(x) else x for x in args[:5]]
        assert len(floats) and any(x.stride() != x.contiguous().stride() for x in viewed[:1])
        assert_equal(measure(name, ((*viewed, *constants), options)), expected)


def test_cpu_reads_heads_of_any_stride():
    (x, rotary), _ = inputs_of("rope3d")
    across = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_equal(measure("rope3d", ((across, rotary), {})), measure("rope3d", ((x, rotary), {})))


@ROWS
@DTYPES
def test_cpu_keeps_a_nan_in_its_row(name, dtype, isa):
    args, options = inputs_of(name, dtype)
    expected = measure(name, (args, options))
    row, x, whole = 20, args[0].clone(), {"adaln": 0, "residual_adaln": 1, "qknorm_rope": 0}
    x[1, row, ..., 3] = torch.nan
    results = measure(name, ((x, *args[1:]), options))
    rows = [(a, b) for a, b in zip(results, expected, strict=True) if a.shape[:2] == x.shape[:2]]
    assert len(rows) >= 2 and rows[0][0][1, row].isnan().any()
    if name in whole:
        assert rows[whole[name]][0][1, row].isnan().all()
    others = torch.ones(x.shape[:2], dtype=torch.bool)
    others[1, row] = False
    assert_equal([a[others] for a, _ in rows], [b[others] for _, b in rows])


@ROWS
def test_cpu_without_rows(name, isa, poisoned):
    norms = name in ("adaln", "residual_adaln")
    for batch, rows in ((0, 3), (2, 0)):
        if norms:
            inputs = norm_inputs(name, batch, rows, 0, 16, torch.float32)
        else:
            inputs = rope_inputs(name, batch, (1, 1, rows), 0, 2, 16, torch.float32)
        results, gradients = contracts.run_with_gradients(cpu(name), inputs)
        assert all(h.shape[:2] == (batch, rows) for h in results)
        assert not any(g.any() for g in gradients)


@NORMS
def test_cpu_says_what_it_does_not_take(name):
    args, options = inputs_of(name)
    options["out_dtype"] = torch.float8_e4m3fn
    with pytest.raises(ValueError, match=f"out_dtype must be .* Request {name}=reference"):
        cpu(name)(*args, **options)
    options["out_dtype"] = torch.float32
    with pytest.raises(RuntimeError, match="x must be float32 or bfloat16 in the backend cpu"):
        cpu(name)(args[0].half(), *args[1:], **options)


def detached(x):
    return x.detach().clone().requires_grad_() if contracts.is_float(x) else x


@ROWS
def test_cpu_op_is_well_formed(name):
    args, options = inputs_of(name)
    args = tree_map(detached, args)
    if name in ("adaln", "residual_adaln"):
        *tensors, norm, video_rows = args
        args = [*tensors, *norm[:2], video_rows, *norm.eps, torch.bfloat16]
        args += [detached(tensors[1][:, :1])] if name == "residual_adaln" else []  # the constant
    elif name == "rope3d":
        args = [args[0], *args[1][1:], *args[1].grid, False]
    else:
        args = [*args[:4], *args[5][1:], *args[5].grid, 0.1]
    torch.library.opcheck(getattr(torch.ops.univigu_C, name).default, tuple(args))


SOLVER = (0.8, 0.6, 0.3, 0.2, -0.1, 0.05, 0.7, 0.4, -0.1)


def video_update(shape, dtype, null_dtype=None):
    state = SolverState(*torch.randn(4, *shape))
    velocity, null = torch.randn(2, *shape)
    null = None if null_dtype is None else null.to(null_dtype)
    return VideoUpdate(state, velocity.to(dtype), null, 5.0, SOLVER)


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("null_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_cpu_flow_step_is_within_two_times(dtype, null_dtype, isa, poisoned):
    op = OPS["flow_step"]
    for shape in ((1,), (2, 15), (17,), (3, 5, 7), (0, 4)):
        update = video_update(shape, dtype, null_dtype)
        if 0 not in shape:
            contracts.assert_two_times(op, cpu("flow_step"), ((update, None), {}), torch.float32)
        state, tokens = cpu("flow_step")(update, None)
        assert tokens is None and state.m2 is update.state.m1 and state.x.shape == shape
        if 0 not in shape:
            row = torch.tensor(SOLVER, dtype=torch.float64)
            for coefficients in (row, list(row)):
                again = update._replace(coefficients=coefficients)
                assert_equal(cpu("flow_step")(again, None)[0], state)


def test_cpu_flow_step_on_two_threads(two_threads):
    update = video_update((3, 33333), torch.bfloat16, torch.bfloat16)
    across = update._replace(
        state=SolverState(*(x.T.contiguous().T for x in update.state)),
        velocity=contracts.strided(update.velocity),
    )
    expected = cpu("flow_step")(update, None)[0]
    assert_equal(cpu("flow_step")(across, None)[0], expected)
    torch.set_num_threads(1)
    assert_equal(cpu("flow_step")(update, None)[0], expected)
    for a, b in zip(expected, OPS["flow_step"].reference(update, None)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_cpu_draws_the_bits_of_the_reference(isa, two_threads):
    seeds = torch.tensor([7, -(2**40) - 3, 2**63 - 1, -1, 0])
    tokens, proposal = torch.randint(1000, (2, 5, 2049))
    steps = (0, 3, torch.tensor(49), 2**31)
    for step, probability in zip(steps, (0.4, torch.tensor(0.3), 0.0, 1.0), strict=True):
        update = TextUpdate(tokens, proposal, probability, seeds, step)
        state, actual = cpu("flow_step")(None, update)
        assert state is None and actual.dtype == torch.int64
        assert torch.equal(actual, OPS["flow_step"].reference(None, update)[1])
        across = update._replace(tokens_BT=tokens.T.contiguous().T)
        assert torch.equal(cpu("flow_step")(None, across)[1], actual)
    drawn = philox_uniform(seeds[:1, None], torch.arange(2049), 0, 5, JUMP)[0]
    for at in (0, 1000):  # a uniform that equals the probability does not jump
        update = TextUpdate(tokens[:1], proposal[:1], drawn[at].item(), seeds[:1], 5)
        jumped = cpu("flow_step")(None, update)[1][0]
        assert torch.equal(jumped, torch.where(drawn < drawn[at], proposal[0], tokens[0]))


def test_cpu_flow_step_says_what_it_does_not_take():
    update = video_update((4,), torch.float32)
    update = update._replace(state=SolverState(*(x.double() for x in update.state)))
    with pytest.raises(ValueError, match="state must be float32 in this backend"):
        cpu("flow_step")(update, None)
    text = TextUpdate(torch.zeros(1, 3), torch.zeros(1, 3), 0.5, torch.tensor([1]), 0)
    with pytest.raises(RuntimeError, match="tokens, proposal and seeds must be int64"):
        cpu("flow_step")(None, text)
    assert cpu("flow_step")(None, None) == (None, None)


def test_cpu_flow_step_is_well_formed():
    video, text = video_update((7,), torch.bfloat16), torch.randint(9, (2, 5))
    arguments = (*video.state, video.velocity, None, 5.0, list(SOLVER))
    torch.library.opcheck(torch.ops.univigu_C.video_step.default, arguments)
    arguments = (text, text + 1, 0.4, torch.tensor([3, 4]), 3)
    torch.library.opcheck(torch.ops.univigu_C.text_step.default, arguments)
