"""The Gluon kernel of joint and cross attention: on a Hopper GPU itself, elsewhere its compiled
TTGIR on the machine of tests/support/ttgir, which finds a broken protocol at any timing.

What holds for every backend is in test_joint_attention.py and test_cross_attention.py.
"""

import contextlib
import re

import contracts
import pytest
import torch
from contracts import DEVICE

pytest.importorskip("triton")

import ttgir

from univigu_kernels import OPS, _flash_hopper, _triton
from univigu_kernels._boxes import FAR, cut_rows, tma_takes
from univigu_kernels._flash_hopper import split_tail, supports_hopper
from univigu_kernels._triton import GLUON, forced

pytestmark = pytest.mark.skipif(GLUON.missing is not None, reason=str(GLUON.missing))
JOINT, CROSS = OPS["joint_attention"], OPS["cross_attention"]
NATIVE = supports_hopper(DEVICE, torch.bfloat16) is None
HALF, BRAIN = torch.float16, torch.bfloat16


def backend(op, name="gluon"):
    return next(b.call for b in op.backends if b.name == name)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The launches of the Gluon kernel: run by the machine, where there is no Hopper GPU."""
    found = []

    def launch(kernel, grid, *args, **options):
        ours = kernel is _flash_hopper._flash_hopper
        if ours:
            found.append((grid, args, options))
        if ours and not NATIVE:
            ttgir.run(kernel, grid, args, options)
        else:
            _triton.launch(kernel, grid, *args, **options)

    monkeypatch.setattr(_flash_hopper, "launch", launch)
    return found


@contextlib.contextmanager
def pieces(split):
    """(whole tiles, blocks of a piece of the rest), or None: as the shape has it."""
    with contextlib.ExitStack() as stack:
        if split is not None:
            stack.enter_context(forced("flash_tail", whole=split[0], span=split[1]))
        yield


def inputs(shape, lengths=None, sees=True, dtype=BRAIN):
    """(B, V, T, Q, H, K) -> arguments; q, k and v lie in one packed buffer. Q last rows, or a pair:
    of the video and of the text."""
    B, V, T, Q, H, K = shape
    q, k, v = torch.randn(B, V + T, 3 * H * K, device=DEVICE).to(dtype).chunk(3, -1)
    q, k, v = (x.unflatten(-1, (H, K)) for x in (q, k, v))
    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    if isinstance(Q, int):
        return q[:, V + T - Q :], k, v, V, lengths, sees
    return torch.cat([q[:, : Q[0]], q[:, V + T - Q[1] :]], 1), k, v, V, lengths, sees, Q[0]


CASES = [  # (B, V, T, Q, H, K), lengths, video sees text, dtype, (whole tiles, blocks of a piece)
    ((1, 200, 37, 237, 2, 128), None, True, BRAIN, None),
    ((2, 260, 20, 280, 1, 128), [20, 3], False, BRAIN, None),
    ((3, 70, 37, 107, 1, 128), [37, 0, 5], False, BRAIN, None),
    ((1, 0, 150, 150, 1, 128), [129], True, BRAIN, None),
    ((2, 0, 31, 31, 2, 128), [31, 0], True, BRAIN, (0, 1)),
    ((1, 129, 0, 129, 1, 64), None, False, HALF, None),
    ((1, 1, 0, 1, 1, 64), None, True, HALF, None),
    ((2, 130, 40, 40, 1, 64), [7, 33], True, HALF, None),
    ((2, 300, 40, (300, 10), 1, 64), [40, 3], False, HALF, None),
    ((2, 300, 40, (300, 0), 1, 64), [40, 3], True, HALF, (4, 2)),
    ((2, 500, 20, 20, 1, 64), [20, 0], True, HALF, (0, 3)),
    ((1, 600, 0, 600, 1, 128), None, True, BRAIN, (3, 2)),
    ((1, 130, 270, 400, 1, 64), None, False, HALF, (0, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_two_times(case, poisoned, launches):
    """Tails of tiles and of both modalities, lengths with 0, no video, few queries, and pieces of a
    tile, of which some have no key."""
    shape, lengths, sees, dtype, split = case
    given = inputs(shape, lengths, sees, dtype)
    with pieces(split):
        result = backend(JOINT)(*given)
    assert len(launches) == 1
    plain = JOINT.reference(*given)
    truth = JOINT.reference(*contracts.to_double(given))
    contracts.assert_within([result], [plain], [truth], 2, dtype)


@pytest.mark.parametrize("split", [None, (2, 1)])
def test_padding_is_never_used_and_comes_out_as_zeros(split, poisoned):
    """NaN in the padded rows of q, k and v changes no bit, though TMA brings whole boxes."""
    lengths = [7, 0, 33]
    q, k, v, *rest = inputs((3, 150, 40, 190, 1, 128), lengths)
    padded = torch.arange(190, device=DEVICE) >= 150 + torch.tensor(lengths, device=DEVICE)[:, None]
    dirty = (x.masked_fill(padded[..., None, None], torch.nan) for x in (q, k, v))
    with pieces(split):
        clean, found = backend(JOINT)(q, k, v, *rest), backend(JOINT)(*dirty, *rest)
    assert torch.equal(clean, found)
    assert not found[padded].any()


def test_a_nan_of_a_query_stays_in_its_row():
    q, k, v, *rest = inputs((1, 100, 30, 130, 1, 128), [30])
    q[:, 5] = torch.nan
    o = backend(JOINT)(q, k, v, *rest)
    assert o[:, 5].isnan().all() and o[:, 6:].isfinite().all() and o[:, :5].isfinite().all()


def test_the_log_sum_exp_is_that_of_the_visible_keys():
    q, k, v, *rest = inputs((2, 290, 9, 299, 2, 128), [9, 4])
    scores = torch.einsum("bqhk,blhk->bhql", q.double(), k.double()) / 128**0.5
    scores[1, :, :, 294:] = -torch.inf
    expected = scores.logsumexp(-1)
    expected[1, :, 294:] = -torch.inf
    for split in (None, (5, 2)):
        with pieces(split):
            _, lse = torch.ops.univigu.joint_attention_hopper(q, k, v, *rest, 290)
        torch.testing.assert_close(lse, expected.float(), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_triton_kernel():
    """The backward takes the forward's output and log-sum-exp."""
    given = inputs((2, 40, 9, 49, 1, 64), [9, 4], False, HALF)
    contracts.assert_two_times(JOINT, backend(JOINT), (given, {}), HALF)


@pytest.mark.parametrize("keys, repeats", [(40, 1), (129, 1), (300, 1), (40, 473), (129, 100)])
def test_cross_attention_within_two_times(keys, repeats, poisoned, launches):
    """The last key, in a full block and in one of its own, counts `repeats` times."""
    q, k, v = (torch.randn(2, n, 1, 128, device=DEVICE).to(BRAIN) for n in (200, keys, keys))
    result = backend(CROSS)(q, k, v, repeats)
    assert len(launches) == 1
    plain = CROSS.reference(q, k, v, repeats)
    truth = CROSS.reference(q.double(), k.double(), v.double(), repeats)
    contracts.assert_within([result], [plain], [truth], 2, BRAIN)


def test_what_tma_cannot_take_goes_to_the_triton_kernel(launches):
    """Another head_dim, rows or a base off 16 bytes, heads apart, a stride of 0, nothing at all."""
    q, k, v, *rest = inputs((2, 20, 6, 26, 2, 64), [6, 1], True, HALF)
    whole = torch.randn(2, 26, 2, 65, device=DEVICE).to(HALF)
    odd = {
        "rows": whole[..., :64],
        "base": torch.randn(q.numel() + 1, device=DEVICE).to(HALF)[1:].view(q.shape),
        "heads": q.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": q[:1].expand(2, -1, -1, -1),
        "inner": q.mT.contiguous().mT,
    }
    assert tma_takes(q) and not any(map(tma_takes, odd.values()))
    assert not tma_takes(q[:, :0]) and not tma_takes(q.float())
    for x in odd.values():
        for given in ((x, k, v), (q, x, v), (q, k, x)):
            expected = JOINT.reference(*contracts.to_double(given), *rest)
            found = backend(JOINT)(*given, *rest)
            torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-2)
    backend(JOINT)(*inputs((1, 20, 6, 26, 1, 32), None, True, HALF))  # no kernel of this head_dim
    assert launches == []


def test_a_gluon_of_other_names_is_a_reason(monkeypatch):
    """What 3.9 renamed once may be renamed again."""
    tma = _triton.hopper.tma
    for name in ("async_load", "async_copy_global_to_shared"):
        monkeypatch.delattr(tma, name, raising=False)
    assert "needs another Gluon than that of Triton" in _triton._find_gluon().missing
    assert "async_copy_global_to_shared" in _triton._find_gluon().missing


def test_boxes_end_where_they_are_cut():
    """FAR steps of one dimension and as many of another wrap to nothing in 64 bits of elements."""
    x = torch.randn(3, 50, 2, 64, device=DEVICE).to(HALF)[:, 10:]
    box, far = cut_rows(x, 16), FAR.value
    place = [far, 33, 2, far - 33 + 30, 64]
    offset = sum(i * stride for i, stride in zip(place, box.strides, strict=True)) % 2**64
    assert x.storage_offset() + offset == x[2, 30, 1].storage_offset()
    assert all(0 <= i < size for i, size in zip(place, box.shape, strict=True))
    assert place[3] + 33 - 30 == box.shape[3]


def test_the_last_wave_is_split():
    """3,096 tiles on 132 multiprocessors are 23 waves and 60 tiles; text rows alone are 24."""
    assert split_tail(3096, 258, 132) == (3036, 119)
    assert split_tail(24, 258, 132) == (0, 48)
    assert split_tail(264, 258, 132) == (264, 258)
    assert split_tail(3096, 4, 132) == (3096, 4)


# The places of waits: of a group 0 q, 1 the first k, 2 k, 3 v, 4 the last v; of the other from 5
# on; of the warp that loads 10 the first k, 11 k, 12 v, 13 the last v. Assembly: of a group 0 takes
# and 1 passes the first turn, 2 takes and 4 passes one in the loop, 6 takes the last.
ASSEMBLY = "tt.elementwise_inline_asm"
EARLY = {"race", "unwritten"}
FAULTS = {  # (operation, which of them, what of it, what instead), what comes of it
    "a barrier is not made": (("ttng.init_barrier", 4), {"barrier"}),
    "a place is free when one group is done": (
        ("ttng.init_barrier", 4, ", 2 ", ", 1 "),
        {"race", "overrun"},
    ),
    "no fence when the barriers are made": (("ttng.fence_async_shared", 0), {"fence"}),
    "no fence before the output goes": (("ttng.fence_async_shared", 1), {"fence"}),
    "queries are read early": (("ttng.wait_barrier", 0), EARLY),
    "keys are read early": (("ttng.wait_barrier", 2), EARLY),
    "values are read early": (("ttng.wait_barrier", 3), EARLY),
    "the last values are read early": (("ttng.wait_barrier", 9), EARLY),
    "keys are overwritten": (("ttng.wait_barrier", 11), {"race"}),
    "values are overwritten": (("ttng.wait_barrier", 12), {"race"}),
    "keys are never given back": (("ttng.arrive_barrier", 1), {"deadlock"}),
    "values are never given back": (("ttng.arrive_barrier", 5), {"deadlock"}),
    "keys are given back twice": (
        ("ttng.arrive_barrier", 1, ", 1,", ", 2,"),
        {"race", "overrun", "deadlock"},
    ),
    "half of the keys is expected": (
        ("ttng.barrier_expect", 3, "16384", "8192"),
        {"race", "bytes"},
    ),
    "more values are expected than come": (
        ("ttng.barrier_expect", 4, "16384", "16400"),
        {"deadlock"},
    ),
    "the wrong phase of a place": (("arith.xori", 0, "xori", "ori"), {"race", "deadlock"}),
    "scores are used before they are there": (
        ("ttng.warp_group_dot_wait", 1, "pendings = 1", "pendings = 2"),
        {"product"},
    ),
    "values are given back under a product": (
        ("ttng.warp_group_dot_wait", 2, "pendings = 0", "pendings = 1"),
        {"product", "race"},
    ),
    "nobody waits for the output to go": (("ttng.async_tma_store_wait", 0), {"unfinished"}),
    "a turn is not passed on": ((ASSEMBLY, 4), {"deadlock"}),
    "a turn is passed to oneself": ((ASSEMBLY, 4, "arrive 11", "arrive 10"), {"barrier"}),
    "a turn is not taken": ((ASSEMBLY, 6), {"barrier", "unfinished"}),
}


@pytest.fixture
def text_queries(launches, poisoned):
    """A launch with a tile for each of two samples, five blocks of keys, NaN in the padding."""
    if NATIVE:
        pytest.skip("the GPU runs the kernel itself")
    q, k, v, *rest = inputs((2, 500, 20, 20, 1, 64), [20, 3], True, HALF)
    k[1, 503:] = v[1, 503:] = q[1, 3:] = torch.nan
    truth = JOINT.reference(*contracts.to_double((q, k, v)), *rest)
    backend(JOINT)(q, k, v, *rest)
    ((grid, args, options),) = launches
    text = ttgir.text_of(_flash_hopper._flash_hopper, grid, args, options)
    names = _flash_hopper._flash_hopper.arg_names
    return text, grid, dict(zip(names, args, strict=False)), truth


def distance(case, text, seed=0):
    """The largest error of what another text computes."""
    _, grid, args, truth = case
    args["o"].base.fill_(torch.nan)
    ttgir.run_text(text, grid, args, seed)
    return (args["o"].base.double() - truth).abs().max().item()


@pytest.mark.parametrize("seed", range(3))
def test_the_protocol_holds_in_any_order(seed, text_queries):
    assert distance(text_queries, text_queries[0], seed) < 1e-3


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name, text_queries):
    """In the first order that the machine takes: what is unordered is found in any order."""
    change, kinds = FAULTS[name]
    with pytest.raises(ttgir.Fault) as caught:
        distance(text_queries, ttgir.altered(text_queries[0], *change))
    assert caught.value.kind in kinds


def test_a_wrong_bound_shows(text_queries):
    """A key too many is read as zeros, and seen in the log-sum-exp; a row too many is out of
    bounds."""
    text, _, args, _ = text_queries
    lse = args["lse"].clone()
    assert "arith.cmpi slt, %cols" in text and "arith.cmpi slt, %rows" in text
    distance(text_queries, re.sub(r"arith\.cmpi slt, (%cols\w*)", r"arith.cmpi sle, \1", text))
    assert not torch.allclose(args["lse"], lse, atol=1e-4)
    with pytest.raises(ttgir.Fault, match="bounds"):
        distance(text_queries, re.sub(r"arith\.cmpi slt, (%rows\w*)", r"arith.cmpi sle, \1", text))
