"""The machine that runs compiled TTGIR: what right kernels compute on it, and that it finds each
fault that is planted in one."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
import ttgir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

SIDE, STEPS = 64, 5
OPTIONS = {"num_warps": 4}
SEEDS = range(4)


def place(mark: str) -> str:
    """ "file.py:line" of the line of this file that ends with a comment."""
    lines = Path(__file__).read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"  # {mark}"))
    return f"{__file__}:{at}"


def names(fault: Exception, mark: str) -> bool:
    return re.search(re.escape(place(mark)) + r"\b", str(fault)) is not None


def fault_of(text, grid, args, seed=0, **rest) -> ttgir.Fault:
    with pytest.raises(ttgir.Fault) as caught:
        ttgir.run_text(text, grid, args, seed, **rest)
    return caught.value


def tiled(x: torch.Tensor) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([SIDE, SIDE], gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [SIDE, SIDE], layout)


# A product of matrices: mbarriers, copies and matrix units.


@gluon.jit
def _load_tiles(a, b, a_buffers, b_buffers, full, empty, row, steps):
    for i in range(steps):
        stage = i % 2
        landed, a_buffer, b_buffer = (
            full.index(stage),
            a_buffers.index(stage),
            b_buffers.index(stage),
        )
        mbarrier.wait(empty.index(stage), (i // 2 & 1) ^ 1)  # room
        mbarrier.expect(landed, 2 * a.block_type.nbytes)
        tma.async_copy_global_to_shared(a, [row, i * 64], landed, a_buffer)  # load a
        tma.async_copy_global_to_shared(b, [i * 64, 0], landed, b_buffer)  # load b


@gluon.jit
def _multiply_tiles(out, peaks, a_buffers, b_buffers, full, empty, row, steps, rows):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    out_buffer = gl.allocate_shared_memory(out.dtype, [64, 64], out.layout)
    acc = gl.zeros([64, 64], gl.float32, layout)
    for i in range(steps):
        stage = i % 2
        a, b = a_buffers.index(stage), b_buffers.index(stage)
        mbarrier.wait(full.index(stage), i // 2 & 1)  # tiles
        acc = warpgroup_mma(a, b, acc, is_async=True)  # multiply
        acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(stage), count=1)  # done
    lanes = row + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    gl.store(peaks + lanes, gl.max(acc, 1), mask=lanes < rows)
    out_buffer.store(acc.to(out.dtype))  # result
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [row, 0], out_buffer)  # store
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["steps", "rows"])
def _product(a, b, out, peaks, steps, rows):
    """out = a @ b and the maxima of its rows, by a partition that loads and one that multiplies."""
    a_buffers = gl.allocate_shared_memory(a.dtype, [2, 64, 64], a.layout)
    b_buffers = gl.allocate_shared_memory(b.dtype, [2, 64, 64], b.layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)  # init
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    row = gl.program_id(0) * 64
    multiply = (out, peaks, a_buffers, b_buffers, full, empty, row, steps, rows)
    load = (a, b, a_buffers, b_buffers, full, empty, row, steps)
    gl.warp_specialize([(_multiply_tiles, multiply), (_load_tiles, load)], [1], [24])


def product_case(steps=STEPS, rows=100):
    """The (text, grid, arguments) of a product."""
    a, b = torch.randn(rows, SIDE * steps).bfloat16(), torch.randn(SIDE * steps, SIDE).bfloat16()
    out = torch.full((rows, SIDE), float("nan")).bfloat16()
    args = {"a": tiled(a), "b": tiled(b), "out": tiled(out)}
    args |= {"peaks": torch.full((rows,), float("nan")), "steps": steps, "rows": rows}
    grid = (triton.cdiv(rows, SIDE),)
    return ttgir.text_of(_product, grid, tuple(args.values()), OPTIONS), grid, args


@pytest.mark.parametrize("steps", [1, 2, STEPS])
def test_a_product_of_tiles_is_right_whatever_the_order(steps):
    _, grid, args = product_case(steps)
    for seed in SEEDS:
        ttgir.run(_product, grid, tuple(args.values()), OPTIONS, seed)
        want = args["a"].base.float() @ args["b"].base.float()
        torch.testing.assert_close(args["peaks"], want.amax(1), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(args["out"].base.float(), want, rtol=2**-8, atol=1e-4)


EARLY = {"race", "unwritten"}  # a read of what is on its way, or of what nobody even asked for
FAULTS = {  # (operation, which, what of it, what instead), kinds, lines that must be named
    "lost arrive": (("ttng.arrive_barrier", 0), {"deadlock"}, ["room", "tiles"]),
    "early read": (("ttng.wait_barrier", 0), EARLY, ["multiply"]),
    "overwritten before it is read": (
        ("ttng.warp_group_dot_wait", 0, "pendings = 0", "pendings = 1"),
        {"race"},
        ["load a", "multiply"],
    ),
    "no fence after init": (("ttng.fence_async_shared", 0), {"fence"}, []),
    "no fence before a store": (("ttng.fence_async_shared", 1), {"fence"}, ["store", "result"]),
    "wrong phase that waits": (("arith.xori", 0, "xori", "andi"), {"deadlock"}, ["room"]),
    "wrong phase that passes": (("arith.andi", 0, "andi", "ori"), EARLY, ["multiply"]),
    "expects half": (("ttng.barrier_expect", 0, "16384", "8192"), {"race"}, ["multiply"]),
    "expects a quarter": (("ttng.barrier_expect", 0, "16384", "4096"), {"bytes"}, ["init"]),
    "expects more": (("ttng.barrier_expect", 0, "16384", "16400"), {"deadlock"}, ["tiles"]),
    "arrives twice": (("ttng.arrive_barrier", 0, ", 1,", ", 2,"), {"overrun"}, ["done"]),
    "nothing stored": (("ttg.local_store", 0), {"unwritten"}, ["store"]),
    "no barrier": (("ttng.init_barrier", 0), {"barrier"}, []),
    "no wait for the store": (("ttng.async_tma_store_wait", 0), {"unfinished"}, ["store"]),
    "no bound on a store": (("tt.store", 0, ", %5", ""), {"bounds"}, []),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_whatever_the_order(name):
    change, kinds, marks = FAULTS[name]
    text, grid, args = product_case()
    for seed in SEEDS:
        fault = fault_of(ttgir.altered(text, *change), grid, args, seed)
        assert fault.kind in kinds
        assert [mark for mark in marks if not names(fault, mark)] == []


def test_a_product_is_not_read_before_its_wait():
    text, grid, args = product_case(steps=1)
    change = ("ttng.warp_group_dot_wait", 0, "pendings = 0", "pendings = 1")
    fault = fault_of(ttgir.altered(text, *change), grid, args)
    assert fault.kind == "product" and names(fault, "multiply")


def test_a_copy_that_nobody_waits_for_is_a_fault_though_it_lands():
    text, grid, args = product_case(steps=2)
    short = ttgir.altered(text, "scf.for", 0, "to %steps", "to %c1_i32")
    for seed in SEEDS:
        fault = fault_of(short, grid, args, seed)
        assert fault.kind == "unfinished"
        assert fault.where in (place("load a"), place("load b"))


def test_a_descriptor_is_checked_as_the_driver_would():
    text, grid, args = product_case()
    long, odd = tiled(args["a"].base), tiled(args["a"].base)
    long.shape, odd.strides = [101, SIDE * STEPS], [SIDE * STEPS + 4, 1]
    assert fault_of(text, grid, args | {"a": odd}).kind == "descriptor"
    assert fault_of(text, grid, args | {"a": long}).kind == "bounds"


@gluon.jit
def _weigh(x, out, EARLY: gl.constexpr):
    """out = x @ x + x, x being in registers for one of its two places in the product."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    down = gl.arange(0, 64, layout=gl.SliceLayout(1, left))[:, None]
    places = down * 64 + gl.arange(0, 64, layout=gl.SliceLayout(0, left))[None, :]
    rows = gl.load(x + places)
    buffer = gl.allocate_shared_memory(gl.bfloat16, [64, 64], shared)
    buffer.store(rows)
    fence_async_shared()
    acc = warpgroup_mma(rows, buffer, gl.zeros([64, 64], gl.float32, layout), is_async=True)
    if EARLY:
        early = rows.to(gl.float32)  # use
        acc, rows = warpgroup_mma_wait(0, deps=(acc, rows))
    else:
        acc, rows = warpgroup_mma_wait(0, deps=(acc, rows))
        early = rows.to(gl.float32)
    gl.store(out + places, gl.convert_layout(acc, left) + early)


def test_a_product_may_have_an_operand_in_registers_until_its_wait():
    x, out = torch.randn(64, 64).bfloat16(), torch.empty(64, 64)
    ttgir.run(_weigh, (1,), (x, out), OPTIONS | {"EARLY": False})
    torch.testing.assert_close(out, x.float() @ x.float() + x.float())

    with pytest.raises(ttgir.Fault) as caught:
        ttgir.run(_weigh, (1,), (x, out), OPTIONS | {"EARLY": True})
    assert caught.value.kind == "product" and caught.value.where == place("use")


# Copies past the edges of a tensor.


@gluon.jit(do_not_specialize=["at", "to"])
def _move(x, out, at, to):
    buffer = gl.allocate_shared_memory(x.dtype, [64, 64], x.layout)
    landed = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(landed, count=1)
    fence_async_shared()
    mbarrier.expect(landed, x.block_type.nbytes)
    tma.async_copy_global_to_shared(x, [at, 0], landed, buffer)
    mbarrier.wait(landed, 0)
    tma.async_copy_shared_to_global(out, [to, 0], buffer)
    tma.store_wait(0)


def test_what_a_box_has_outside_is_zero_and_is_not_stored():
    x, out = torch.randn(40, SIDE).bfloat16(), torch.ones(60, SIDE).bfloat16()
    ttgir.run(_move, (1,), (tiled(x), tiled(out), -3, -10), OPTIONS)
    box = torch.cat([torch.zeros(3, SIDE), x.float(), torch.zeros(21, SIDE)])
    assert torch.equal(out.float(), torch.cat([box[10:], torch.ones(6, SIDE)]))


# Parts of a buffer.


@gluon.jit
def _fill(x, buffer, COL: gl.constexpr):
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    down = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))[:, None]
    across = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    part = buffer.slice(COL, 16, dim=1)
    part.store(gl.load(x + down * 32 + COL + across))  # fill


@gluon.jit
def _turn(x, out):
    """out = x transposed, by way of a buffer of which each of two partitions fills a half."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    buffer = gl.allocate_shared_memory(gl.float32, [32, 32], shared)
    gl.warp_specialize([(_fill, (x, buffer, 0)), (_fill, (x, buffer, 16))], [4], [24])
    down = gl.arange(0, 32, layout=gl.SliceLayout(1, layout))[:, None]
    across = gl.arange(0, 32, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(out + down * 32 + across, buffer.permute((1, 0)).load(layout))  # drain


def test_a_buffer_is_tracked_by_its_elements():
    args = {"x": torch.randn(32, 32), "out": torch.empty(32, 32)}
    text = ttgir.text_of(_turn, (1,), tuple(args.values()), OPTIONS)
    overlapping = ttgir.altered(text, "ttg.memdesc_subslice", 1, "[0, 16]", "[0, 8]")
    half = ttgir.altered(text, "ttg.local_store", 1)
    for seed in SEEDS:
        ttgir.run_text(text, (1,), args, seed)
        assert torch.equal(args["out"], args["x"].T)

        fault = fault_of(overlapping, (1,), args, seed)
        assert fault.kind == "race" and str(fault).count(place("fill")) == 2
        fault = fault_of(half, (1,), args, seed)
        assert fault.kind == "unwritten" and fault.where == place("drain")


# Named barriers.


@gluon.jit
def _asm(CODE: gl.constexpr):
    gl.inline_asm_elementwise(CODE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _write_rounds(x, out, buffer, rounds):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes = gl.arange(0, 128, layout=layout)
    for i in range(rounds):
        buffer.store(gl.load(x + i * 128 + lanes))  # write
        _asm("bar.arrive 9, 256; mov.u32 $0, 0;")
        _asm("bar.sync 10, 256; mov.u32 $0, 0;")


@gluon.jit
def _read_rounds(x, out, buffer, rounds):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    lanes = gl.arange(0, 128, layout=layout)
    for i in range(rounds):
        _asm("bar.sync 9, 256; mov.u32 $0, 0;")
        gl.store(out + i * 128 + lanes, buffer.load(layout))  # read
        _asm("bar.arrive 10, 256; mov.u32 $0, 0;")


@gluon.jit(do_not_specialize=["rounds"])
def _relay(x, out, rounds):
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    buffer = gl.allocate_shared_memory(gl.float32, [128], shared)
    args = (x, out, buffer, rounds)
    gl.warp_specialize([(_write_rounds, args), (_read_rounds, args)], [4], [24])


def relay_case():
    args = {"x": torch.randn(3 * 128), "out": torch.zeros(3 * 128), "rounds": 3}
    return ttgir.text_of(_relay, (1,), tuple(args.values()), OPTIONS), (1,), args


def test_named_barriers_order_two_partitions():
    text, grid, args = relay_case()
    for seed in SEEDS:
        ttgir.run_text(text, grid, args, seed)
        assert torch.equal(args["out"], args["x"])


BARS = {  # which of the assembly's lines, what of it, what instead; kinds
    "lost arrive": ((3,), {"deadlock"}),
    "early read": ((2,), EARLY | {"barrier"}),
    "too few threads": ((2, "9, 256", "9, 128"), EARLY | {"barrier", "overrun"}),
    "Triton's own": ((2, "sync 9,", "sync 2,"), {"barrier"}),
}


@pytest.mark.parametrize("name", BARS)
def test_a_named_barrier_is_used_by_its_rules(name):
    change, kinds = BARS[name]
    text, grid, args = relay_case()
    for seed in SEEDS:
        altered = ttgir.altered(text, "tt.elementwise_inline_asm", *change)
        assert fault_of(altered, grid, args, seed).kind in kinds


# Global memory.


@triton.jit(do_not_specialize=["rows"])
def _double(x, out, rows, STRIDE: tl.constexpr):
    at = tl.program_id(0) * STRIDE + tl.arange(0, 16)
    values = tl.load(x + at, at < rows, 0.0)  # get
    tl.store(out + at, 2 * values, at < rows)  # put


def double(x, out, rows, stride=16, **rest):
    args = (x, out, rows)
    ttgir.run(_double, (3,), args, OPTIONS | {"STRIDE": stride}, **rest)


def test_masked_loads_and_stores():
    x, out = torch.randn(41), torch.zeros(41)
    double(x, out, 40, forbidden=[x[40:]])
    assert torch.equal(out, torch.cat([2 * x[:40], torch.zeros(1)]))


def test_what_programs_do_to_each_other_and_out_of_bounds_is_a_fault():
    x, out = torch.randn(48), torch.zeros(48)
    cases = [
        ("bounds", "put", lambda: double(x, out[:32].clone(), 48)),
        ("bounds", "get", lambda: double(x[:40].clone(), out, 48)),
        ("bounds", "get", lambda: double(x, out, 48, forbidden=[x[40:]])),
        ("race", "put", lambda: double(x, out, 48, stride=8)),
        ("race", "get", lambda: double(x, x[16:], 32)),
    ]
    for kind, mark, run in cases:
        with pytest.raises(ttgir.Fault) as caught:
            run()
        assert caught.value.kind == kind and caught.value.where == place(mark)


# Numbers.


@triton.jit
def _numbers(x, y, i, j, floats, ints, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b, m, n = tl.load(x + at), tl.load(y + at), tl.load(i + at), tl.load(j + at)
    tl.store(floats + at, tl.maximum(a, b))
    tl.store(floats + SIZE + at, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL))
    tl.store(floats + 2 * SIZE + at, a.to(tl.bfloat16).to(tl.float32))
    tl.store(floats + 3 * SIZE + at, tl.exp2(a))  # power
    tl.store(floats + 4 * SIZE + at, tl.where(a <= b, a, 7.0))

    fused = tl.inline_asm_elementwise(
        "{.reg .f32 t; ex2.approx.f32 t, $1; fma.rn.f32 $0, t, $2, 0f40000000;}",
        "=f,f,f",
        [a, b],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )
    tl.store(floats + 5 * SIZE + at, fused)

    pinned = tl.inline_asm_elementwise(
        "{.reg .pred p; .reg .b32 a; setp.lt.f32 p, $1, 0f00000000; mov.b32 a, 0; "
        "@p st.volatile.shared.f32 [a], $1; mov.b32 $0, $1;}",
        "=f,f",
        [tl.load(y + at)],
        dtype=tl.float32,
        is_pure=False,
        pack=1,
    )
    tl.store(floats + 6 * SIZE + at, pinned)

    tl.store(ints + at, m // n)
    tl.store(ints + SIZE + at, m % n)
    tl.store(ints + 2 * SIZE + at, m * n)
    tl.store(ints + 3 * SIZE + at, tl.sum(m, 0) + tl.min(m, 0))


@triton.jit(do_not_specialize=["rounds"])
def _shuffle(x, out, rounds):
    down, across = tl.arange(0, 8)[:, None], tl.arange(0, 4)[None, :]
    left, right = tl.split(tl.load(x + down * 4 + across).reshape(8, 2, 2))
    joined = tl.join(right, left).reshape(8, 4)
    while rounds > 0:
        joined += 1
        rounds -= 1
    tl.store(out + across.trans() * 8 + down.trans(), joined.trans())


def test_elements_are_moved_and_a_loop_runs_while_it_must():
    x, out = torch.randn(8, 4), torch.empty(4, 8)
    ttgir.run(_shuffle, (1,), (x, out, 3), OPTIONS)
    torch.testing.assert_close(out, x[:, [1, 0, 3, 2]].T + 3)


def numbers_case(y):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([1.00390625, 1.01171875, nan, -inf, inf, 0.3, -5.0, nan])
    i = torch.tensor([7, -7, 7, -7, 2**31 - 1, 0, 5, 1], dtype=torch.int32)
    j = torch.tensor([2, 2, -2, -2, 3, 9, 5, 1], dtype=torch.int32)
    outs = {"floats": torch.zeros(7, 8), "ints": torch.zeros(4, 8, dtype=torch.int32)}
    args = {"x": x, "y": torch.tensor(y), "i": i, "j": j} | outs
    return ttgir.text_of(_numbers, (1,), tuple(args.values()), OPTIONS | {"SIZE": 8}), (1,), args


def test_numbers_are_those_of_the_hardware():
    text, grid, args = numbers_case([2.0, 0.5, 1.0, 0.0, 3.0, float("nan"), 2.0, float("nan")])
    ttgir.run_text(text, grid, args)
    x, y, i, j = (args[name] for name in "xyij")
    largest, propagated, rounded, power, chosen, fused, pinned = args["floats"]

    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(largest, torch.fmax(x, y), **same)
    torch.testing.assert_close(propagated, torch.maximum(x, y), **same)
    assert rounded[:2].tolist() == [1.0, 1.015625]  # a tie goes to the even one
    torch.testing.assert_close(power, 2**x, equal_nan=True)
    torch.testing.assert_close(chosen, torch.where(x <= y, x, 7.0), **same)
    torch.testing.assert_close(fused, 2**x * y + 2, equal_nan=True)
    torch.testing.assert_close(pinned, y, **same)
    assert args["ints"][0].tolist() == [3, -3, -3, 3, 715827882, 0, 1, 1]
    assert args["ints"][1].tolist() == [1, -1, 1, -1, 1, 0, 0, 0]
    assert torch.equal(args["ints"][2], i * j)
    assert args["ints"][3].tolist() == [int(i.sum(dtype=torch.int32) - 7)] * 8


def test_an_instruction_that_must_not_run_is_a_fault():
    text, grid, args = numbers_case([-1.0] + [1.0] * 7)
    assert fault_of(text, grid, args).kind == "trap"


def test_an_unknown_operation_is_refused_by_name_and_line():
    text, grid, args = numbers_case([1.0] * 8)
    with pytest.raises(NotImplementedError, match="math.ctlz") as caught:
        ttgir.run_text(text.replace("math.exp2", "math.ctlz"), grid, args)
    assert str(caught.value).startswith(place("power"))
