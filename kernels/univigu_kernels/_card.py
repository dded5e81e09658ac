"""The card that a kernel runs on: what of it decides which tile is launched, and why a device that
is none cannot run one.

Shared memory and multiprocessors differ within a generation (an RTX 50 holds less than half of a
B200's block, an H100 is sold with 114 and 132 multiprocessors), so tiles follow these numbers; the
generation alone says which matrix instruction there is.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ._checks import require

SPARE = 1024  # bytes a kernel takes beside its tiles: barriers, what a reduction exchanges
Tile = Mapping[str, int]


class Card(NamedTuple):
    """capability: compute capability x 10. shared: bytes of shared memory that a block may ask for.
    multiprocessors: how many there are."""

    capability: int
    shared: int
    multiprocessors: int

    @property
    def instruction(self) -> str:
        """Matrix instruction that Triton takes: "wgmma" on Hopper, "tcgen05" on a data-centre
        Blackwell and Thor, "mma" on all others, the RTX 50 among them."""
        family = self.capability // 10
        return {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}.get(family, "mma")

    def buffers(self, stages: int) -> int:
        """Copies of an operand's tile that a loop of so many stages keeps in shared memory. "mma"
        takes its operands from registers, so that one of them is free a stage earlier."""
        return max(1, stages - (self.instruction == "mma"))


CARDS: Mapping[int, Card] = {  # by capability, for rehearsals
    80: Card(80, 166_912, 108),  # A100
    86: Card(86, 101_376, 84),  # RTX 30, A40
    89: Card(89, 101_376, 128),  # RTX 40, L40
    90: Card(90, 232_448, 132),  # H100, H200
    100: Card(100, 232_448, 148),  # B200
    120: Card(120, 101_376, 170),  # RTX 50
}
_rehearsed = CARDS[90]


@contextlib.contextmanager
def rehearsing(card: Card) -> Iterator[None]:
    """Within it, tensors off a GPU are taken for tensors on this card."""
    global _rehearsed
    before, _rehearsed = _rehearsed, card
    try:
        yield
    finally:
        _rehearsed = before


@functools.cache
def _read(index: int) -> Card:
    device = torch.device("cuda", index)
    missing = lacks_nvidia(device)
    require(
        missing is None,
        f"{device}",
        "a card that Triton kernels are written for",
        missing,
        'Request the backend "reference".',
    )
    found = torch.cuda.get_device_properties(index)
    capability = 10 * found.major + found.minor
    return Card(capability, found.shared_memory_per_block_optin, found.multi_processor_count)


def card_of(device: torch.device) -> Card:
    """What the driver says of a CUDA device, read once; off a GPU the rehearsed card, an H100
    unless told. Raises ValueError for a GPU that is not NVIDIA's."""
    if device.type != "cuda":
        return _rehearsed
    return _read(torch.cuda.current_device() if device.index is None else device.index)


def lacks_nvidia(device: torch.device, oldest: tuple[int, int] = (8, 0)) -> str | None:
    """What a device lacks to be an NVIDIA GPU of compute capability `oldest` or newer, or None.

    The type alone does not say: PyTorch for ROCm calls its devices "cuda" too, and an MI300's
    capability (9, 4) would pass for a Hopper's.
    """
    if device.type != "cuda":
        return "needs a CUDA device"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU; ROCm is not supported"
    if torch.cuda.get_device_capability(device) < oldest:
        return "needs a CUDA device of compute capability {}.{} or newer".format(*oldest)
    return None


def lacks_hopper(device: torch.device) -> str | None:
    """What a device lacks to be an NVIDIA Hopper, or None."""
    if reason := lacks_nvidia(device, (9, 0)):
        return reason
    major, _ = torch.cuda.get_device_capability(device)
    return None if major == 9 else "needs a Hopper GPU (compute capability 9.0)"


def offered(
    kernel: str,
    card: Card,
    tiles: Sequence[Tile],
    needs: Callable[[Tile], int],
    side: str = "BLOCK_M",
) -> list[dict[str, int]]:
    """The tiles whose `needs` in bytes the card's shared memory holds, in their order. One that is
    too large gives up stages, down to two, before it is left out. Where none is left, the last has
    one stage and halves its `side`. Raises ValueError where 16 of that do not fit either."""
    found = []
    for tile in tiles:
        most = tile["num_stages"]
        fewer = ({**tile, "num_stages": stages} for stages in range(most, min(most, 2) - 1, -1))
        found += [each for each in fewer if needs(each) <= card.shared][:1]
    if found:
        return found

    least = {**tiles[-1], "num_stages": 1}
    while needs(least) > card.shared and least[side] > 16:
        least[side] //= 2
    require(
        needs(least) <= card.shared,
        f"{kernel}: a block's shared memory",
        f"at most the {card.shared} bytes of this card (sm_{card.capability})",
        needs(least),
        'Request the backend "reference".',
    )
    return [least]
