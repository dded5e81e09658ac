"""How videos are cut for the VAE: frames into chunks, pixels into patches, and large pictures into
tiles that are blended where they meet.

Legend: B samples, C channels, N frames, H,W pixels, P pixels of one patch side.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.config import CHUNK
from engine.errors import UsageError

TILE, TILE_STRIDE = 256, 192  # pixels (of the encoder: patches)


def split_frames(x: Tensor) -> list[Tensor]:
    """[B,C,N,H,W] -> its chunks: the first frame, then four at a time. Errors: UsageError."""
    later = x.shape[2] - 1
    if later < 0 or later % CHUNK:
        raise UsageError(
            f"vae: frames must be {CHUNK}k+1; got {x.shape[2]}. Cut the clip to such a length."
        )
    return [*x.split([1] + [CHUNK] * (later // CHUNK), 2)]


def patchify(x: Tensor, side: int) -> Tensor:
    """[B,C,N,H,W] -> [B,CPP,N,H/P,W/P]."""
    if side == 1:
        return x
    x = x.unflatten(4, (-1, side)).unflatten(3, (-1, side))
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, side: int) -> Tensor:
    """[B,CPP,N,H/P,W/P] -> [B,C,N,H,W]."""
    if side == 1:
        return x
    x = x.unflatten(1, (-1, side, side)).permute(0, 1, 4, 5, 3, 6, 2)
    return x.flatten(5, 6).flatten(3, 4)


def in_tiles(x: Tensor, run: Callable[[Tensor], Tensor], tile: int, stride: int) -> Tensor:
    """`run` on overlapping tiles of x [...,H,W]; where two overlap, one fades into the other."""
    height, width = x.shape[-2:]
    rows = [
        [run(x[..., i : i + tile, j : j + tile]) for j in range(0, width, stride)]
        for i in range(0, height, stride)
    ]
    scale = rows[0][0].shape[-1] / min(tile, width)
    step, overlap = int(stride * scale), int((tile - stride) * scale)

    for i, row in enumerate(rows):
        for j, found in enumerate(row):
            if i > 0:
                fade(rows[i - 1][j].transpose(-1, -2), found.transpose(-1, -2), overlap)
            if j > 0:
                fade(row[j - 1], found, overlap)
    return torch.cat([torch.cat([t[..., :step, :step] for t in row], -1) for row in rows], -2)


def fade(left: Tensor, right: Tensor, columns: int) -> None:
    """The end of `left` fades into the first columns of `right`, which is changed in place."""
    columns = min(columns, left.shape[-1], right.shape[-1])
    share = torch.arange(columns, dtype=torch.float64, device=right.device) / columns
    near, far = share.to(right.dtype), (1 - share).to(right.dtype)
    right[..., :columns] = left[..., -columns:] * far + right[..., :columns] * near
