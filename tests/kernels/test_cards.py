"""Tiles follow the card: what a launch takes of shared memory, how many multiprocessors it fills,
and what is said of a GPU that no kernel is written for."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from univigu_kernels import OPS, _card, _compiled, _libraries, bind
from univigu_kernels._attention import supports_sdpa
from univigu_kernels._card import CARDS, Card, card_of, lacks_nvidia, offered
from univigu_kernels._flash import forward_bytes
from univigu_kernels._flash_backward import backward_bytes
from univigu_kernels._flash_hopper import hopper_bytes
from univigu_kernels._gemm import gemm_bytes
from univigu_kernels._rows import row_bytes, row_sizes
from univigu_kernels._triton import rehearsal

ROOT = Path(__file__).resolve().parents[2]
TABLE = json.loads((ROOT / "bench/results/aot.json").read_text())
SMALL = [Card(capability, 65_536, 20) for capability in (80, 89, 90, 100)]  # there is none so small
COLUMN = {  # bytes of a column of all rows that a row kernel has under way, in bf16, x in fp32
    "adaln_forward": 4,
    "adaln_backward": 6,
    "residual_adaln_forward": 6,
    "residual_adaln_backward": 12,
    "rms_norm_forward": 2,
    "rms_norm_backward": 4,
    "qknorm_rope_forward": 2,
    "qknorm_rope_backward": 4,
}
# No tile in shared memory.
ROOFLESS = "_reduce", "_delta_rows", "flow_step", "gelu_fp8_rows", "rms_norm_silu"
WALKED = {"flash_dkdv": "BLOCK_M", "flash_dq": "BLOCK_N"}


def bytes_of(kernel: str, options: dict, card: Card) -> int:
    """What the formulas claim for a launch at the real models' shapes, bf16 or fp8."""
    if kernel.endswith(ROOFLESS):
        return 4096
    if kernel in COLUMN:
        row = options.get("BLOCK") or 2 * options["PAIRS"] * (options["HEADS"] + 2)
        return row_bytes(COLUMN[kernel] * row, options["STAGES"])
    if kernel == "flash_forward":
        return forward_bytes(card, 2, options["BLOCK_D"], options)
    if kernel == "flash_hopper":
        return hopper_bytes(options["D"], options)
    if kernel in WALKED:
        return backward_bytes(WALKED[kernel], card, 2, options["BLOCK_D"], options)
    if kernel == "split_product":  # its tiles are 128 bytes deep in every dtype
        return gemm_bytes(card, 128 // options["BLOCK_K"], options)
    return gemm_bytes(card, 1 if kernel.startswith("fp8_") else 2, options)


def launches_of(op, case, card):
    """(kernel, grid, options) of each launch on that card."""
    with rehearsal(card) as launches:
        op.rehearse(op.cases[case])
    return [(x.kernel.fn.__name__.lstrip("_"), x.grid, dict(x.options)) for x in launches]


REHEARSED = [op for op in OPS.values() if op.rehearse is not None]


@pytest.mark.parametrize("card", [*CARDS.values(), *SMALL], ids=lambda card: str(card[:2]))
def test_every_launch_fits_the_card(card):
    """An RTX 50 could not launch ffn_project with Hopper's tile, 147,456 bytes."""
    seen = set()
    for op in REHEARSED:
        for case in op.cases:
            for kernel, _, options in launches_of(op, case, card):
                seen.add(kernel)
                assert bytes_of(kernel, options, card) <= card.shared, (kernel, options)
    assert {"ffn_project", "flash_dkdv", "fp8_ffn_up", "vocab_sample_forward"} <= seen


def test_no_formula_claims_less_than_the_compiler_takes():
    """Nor much more, or a tile that would fit is not offered."""
    for row in TABLE["rows"]:
        options = dict(option.split("=") for option in row["options"].split())
        options = {name: int(value) for name, value in options.items() if value.isdigit()}
        claimed = bytes_of(row["kernel"], options, CARDS[row["sm"]])
        assert row["shared"] <= claimed, (row, claimed)
        if row["shared"] > 32_768 and row["sm"] in (90, 100):
            assert claimed < 1.3 * row["shared"], (row, claimed)


def test_tiles_are_those_of_the_instruction():
    """More memory does not make an RTX a Hopper; a Hopper with less takes fewer stages."""

    def tile(card):
        found = launches_of(OPS["routed_ffn"], "wan2.1-1.3b/480x832x81", card)
        options = next(options for kernel, _, options in found if kernel == "ffn_project")
        return [options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_stages")]

    assert tile(CARDS[90]) == tile(CARDS[100]) == [128, 256, 64, 4]
    assert tile(CARDS[90]._replace(shared=101_376)) == [128, 128, 64, 3]
    assert tile(CARDS[90]._replace(shared=90_000)) == [128, 128, 64, 2]
    cards = [CARDS[sm] for sm in (80, 86, 89, 120)] + [CARDS[120]._replace(shared=232_448)]
    assert [tile(card) for card in cards] == [[128, 128, 32, 4]] * 5


def test_a_tile_gives_up_stages_then_rows_and_says_what_does_not_fit():
    tiles = [{"BLOCK_M": 64, "num_stages": 4}, {"BLOCK_M": 32, "num_stages": 3}]

    def needs(tile):
        return 1000 * tile["BLOCK_M"] * tile["num_stages"]

    def stages(shared):
        found = offered("kernel", CARDS[90]._replace(shared=shared), tiles, needs)
        return [(tile["BLOCK_M"], tile["num_stages"]) for tile in found]

    assert stages(256_000) == [(64, 4), (32, 3)]
    assert stages(192_000) == [(64, 3), (32, 3)]
    assert stages(100_000) == [(32, 3)] and stages(64_000) == [(32, 2)]
    assert stages(32_000) == [(32, 1)] and stages(16_000) == [(16, 1)]
    with pytest.raises(ValueError, match=r"at most the 15999 bytes of this card .*; got 16000\."):
        stages(15_999)


def test_more_multiprocessors_take_smaller_tiles_and_more_splits():
    """Text rows alone of the 1.3B: 140 tiles of 128 x 128 leave more than a tenth of 160 idle."""

    def first(op, kernel, card):
        found = launches_of(OPS[op], "wan2.1-1.3b/480x832x81", card)
        return [(grid, options) for name, grid, options in found if name == kernel]

    def with_(multiprocessors):
        return CARDS[90]._replace(multiprocessors=multiprocessors)

    tiles = [first("routed_ffn", "ffn_up", with_(n))[-1] for n in (132, 155, 160)]
    assert [(grid, options["BLOCK_M"]) for grid, options in tiles] == [
        ((140,), 128),
        ((140,), 128),
        ((560,), 64),
    ]
    few = [first("joint_attention", "flash_forward", with_(n))[-1][0] for n in (78, 132, 264)]
    assert few[0][2] < few[1][2] < few[2][2]
    splits = [first("vocab_loss", "vocab_loss_forward", with_(n))[0][0][2] for n in (78, 132)]
    assert splits == [77, 125]
    rows = [first("adaln", "adaln_forward", with_(n))[0][1]["ROWS"] for n in (132, 1000)]
    assert rows == [8, 1]


def test_wide_rows_in_fp32_are_not_fetched_ahead_where_they_do_not_fit():
    """The backward of the 14B's residual in fp32 has 131,072 bytes of rows under way."""
    row = torch.empty(0, device="meta")
    for shared, stages in ((166_912, 2), (101_376, 1)):
        with _card.rehearsing(CARDS[80]._replace(shared=shared)):
            sizes = row_sizes(33_016, 64, 2, 8192, row, row, row, row)
        assert sizes == {"ROWS": 64, "STAGES": stages}


def fake_gpu(monkeypatch, capability=(9, 0), hip=None, shared=232_448, multiprocessors=132):
    """What PyTorch would say of a GPU."""
    major, minor = capability
    found = SimpleNamespace(
        major=major,
        minor=minor,
        shared_memory_per_block_optin=shared,
        multi_processor_count=multiprocessors,
    )
    reads = []
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: reads.append(i) or found)
    _card._read.cache_clear()
    return reads


@pytest.fixture
def no_card_remembered():
    yield
    _card._read.cache_clear()


def test_a_card_is_what_the_driver_says_and_is_asked_once(monkeypatch, no_card_remembered):
    """One that no table has."""
    reads = fake_gpu(monkeypatch, shared=116_224, multiprocessors=114)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    found = [card_of(torch.device(name)) for name in ("cuda:1", "cuda:1", "cuda", "cuda:3")]
    assert found == [Card(90, 116_224, 114)] * 4 and reads == [1, 3]
    with rehearsal(CARDS[120]):
        assert card_of(torch.device("meta")) == CARDS[120]
        assert card_of(torch.device("cuda:1")).capability == 90
    assert card_of(torch.device("cpu")) == CARDS[90]


MISSING = "needs an NVIDIA GPU; ROCm is not supported"
PLAIN = ("sdpa", "chunked")  # plain PyTorch, which runs on ROCm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_rocm_device_is_refused_by_name(monkeypatch, no_card_remembered, dtype):
    """An MI300's capability is (9, 4): as a Hopper it would be given wgmma's tiles."""
    device = torch.device("cuda")
    monkeypatch.setattr(_compiled, "missing", lambda part: None)  # as if built for the GPU
    monkeypatch.setattr(_compiled, "build_info", lambda: {"cuda_architectures": "80 90a 100a"})
    monkeypatch.setattr(_libraries, "load", lambda library: _libraries.Loaded(print, "1.0"))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    _libraries._chosen.cache_clear()

    fake_gpu(monkeypatch)
    taken = {(op, b.name) for op in OPS for b in OPS[op].backends if not b.supports(device, dtype)}
    fake_gpu(monkeypatch, (9, 4), hip="7.0")
    table = {choice.op: choice for choice in bind("auto", device, dtype).table}
    _libraries._chosen.cache_clear()

    eager = {("rms_norm_silu", "eager")} & taken
    ours = {(op, name) for op, name in taken if name not in (*PLAIN, "reference")} - eager
    assert {("adaln", "triton"), ("rope3d", "cuda")} <= ours
    assert dtype == torch.float32 or ("joint_attention", "flash_attn") in ours
    for op, name in ours:
        assert dict(table[op].rejected)[name] == MISSING, (op, name)
    assert {choice.backend for choice in table.values()} == {*PLAIN, "reference"} | {
        name for _, name in eager
    }
    with pytest.raises(ValueError, match=f"missing={MISSING}"):
        bind("adaln=triton", device, dtype)
    with pytest.raises(ValueError, match=MISSING):
        card_of(torch.device("cuda:0"))


def test_what_a_device_lacks():
    assert lacks_nvidia(torch.device("cpu")) == "needs a CUDA device"
    assert supports_sdpa(torch.device("cuda"), torch.bfloat16) is None


def test_only_one_file_asks_what_a_device_is():
    """Any other might forget ROCm. Two ask for the number of a device that passed."""
    folder = ROOT / "kernels/univigu_kernels"
    asking = {
        path.name
        for path in folder.glob("*.py")
        if "get_device_capability" in path.read_text() or "version.hip" in path.read_text()
    }
    assert asking == {"_card.py", "_compiled.py", "_libraries.py"}
    for name in asking - {"_card.py"}:
        assert "lacks_nvidia(device)" in (folder / name).read_text()


def test_what_an_fp8_model_reads_is_not_written_where_nothing_can(monkeypatch, no_card_remembered):
    """Triton refuses e4m3 on an A100: bound there, adaln would fail in the first step."""
    monkeypatch.delenv("UNIVIGU_KERNELS", raising=False)
    for capability, backend in (((8, 0), "reference"), ((8, 9), "triton")):
        fake_gpu(monkeypatch, capability)
        table = bind("auto", "cuda", torch.bfloat16, "fp8").table
        chosen = {choice.op: choice for choice in table}
        for op in ("adaln", "residual_adaln", "fp8_ffn"):
            assert chosen[op].backend == backend, chosen[op]
        assert chosen["rms_norm"].backend == "triton"
        assert bind("auto", "cuda", torch.bfloat16).table[0].backend == "triton"
