"""How the rows [video ; text] are shared out to programs, how a row is loaded and how operands must
lie: the small parts that most kernels take."""

from torch import Tensor

from ._card import SPARE, card_of
from ._triton import configuration, tl, triton

EACH = 62  # rows for a multiprocessor: with fewer, a program takes an eighth


@triton.jit
def row_tile(tile, video_rows, rows, ROWS: tl.constexpr):
    """Returns (segment, first row, end) of a tile, int64: at most ROWS rows of one modality."""
    video_tiles = tl.cdiv(video_rows, ROWS)
    text = tile >= video_tiles
    first = tl.where(text, video_rows + (tile - video_tiles) * ROWS, tile * ROWS).to(tl.int64)
    return text.to(tl.int64), first, tl.minimum(first + ROWS, tl.where(text, rows, video_rows))


@triton.jit
def columns(BLOCK: tl.constexpr):
    """0 .. BLOCK-1, told to come in runs of 4. Where an fp32 row is stored beside a bf16 one, a
    thread then holds the same channels of both (128 and 64 bits), and no row crosses shared memory
    to change threads: 172 registers became 112 in residual_adaln at 5120 channels."""
    return tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), 4), 4)


@triton.jit
def load_row(base, cols, D: tl.constexpr):
    return tl.load(base + cols, cols < D, other=0.0).to(tl.float32)


def row_bytes(row: int, stages: int) -> int:
    """Shared memory that a row kernel takes, at most: `row` bytes, those of a row of each stream,
    for all stages but the one in registers."""
    return (stages - 1) * row + SPARE


def row_sizes(
    rows: int, tile: int, stages: int, block: int, *streams: Tensor | None
) -> dict[str, int]:
    """Returns ROWS and STAGES of a kernel that reads a row, `block` columns, of each stream at a
    time. ROWS: `tile`, or an eighth of it where `rows` in all are too few to fill the card, which
    takes 8184 on an H100. STAGES: `stages`, or fewer if the card's shared memory holds no more;
    with 1, no row is loaded ahead."""
    card = card_of(streams[0].device)
    row = block * sum(stream.element_size() for stream in streams if stream is not None)
    fit = (s for s in range(stages, 1, -1) if row_bytes(row, s) <= card.shared)
    filled = rows >= EACH * card.multiprocessors
    return {"ROWS": tile if filled else tile // 8, "STAGES": next(fit, 1)}


def row_configuration(
    kernel: str, rows: int, tile: int, warps: int, *streams: Tensor | None
) -> dict[str, int]:
    """A program takes `tile` rows, which share one load of the modulation, or an eighth as many
    where `rows` in all are too few to fill a GPU. It holds one row of each of the streams [..., D]
    in the registers of at most `warps` warps while the next one is under way to shared memory."""
    block = 1 << (streams[0].shape[-1] - 1).bit_length()
    chosen = {"BLOCK": block, **row_sizes(rows, tile, 2, block, *streams)}
    return configuration(kernel, {**chosen, "num_warps": min(warps, max(1, block // 512))})


def tiles_of(video_rows: int, rows: int, tile: int) -> tuple[int, int]:
    """Returns (tiles of the video rows, of the text rows)."""
    return -(-video_rows // tile), -(-(rows - video_rows) // tile)


def packed(t: Tensor) -> Tensor:
    """t with its last dimension contiguous; the kernels take any other stride."""
    return t if t.stride(-1) == 1 else t.contiguous()
