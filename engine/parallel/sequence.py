"""Sequence parallel: one sample's rows on several ranks, which meet in joint attention alone.

A rank holds a box of the latent grid and a slice of the text, so that embedding, rotary tables,
feed-forward experts and losses are those of a smaller video, and every rank has its share of both
modalities. Attention: within groups of u ranks rows are exchanged for heads (Ulysses, Jacobs et al.
2023), u the largest divisor of the ranks that divides the heads; across the n/u groups, keys and
values are gathered. 12 heads on 8 ranks: u = 4, two groups.

Legend: B samples, V video rows, T text rows, R rows of a rank, H heads, K head_dim.
"""

from collections.abc import Callable
from itertools import product
from math import gcd, prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from engine.errors import UsageError
from engine.model import PATCH, rotary_of
from univigu_kernels import Rotary

# Their names since torch 2.13, which warns of those that 2.11 has.
all_gather_single = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
reduce_scatter_single = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class Rows(NamedTuple):
    """How many rows of each modality a rank holds."""

    video: int
    text: int


def cut(length: int, pieces: int) -> list[slice]:
    bounds = [length * i // pieces for i in range(pieces + 1)]
    return [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]


def boxes(grid: tuple[int, int, int], ranks: int) -> list[tuple[slice, slice, slice]]:
    """The grid of patches (F, Y, X) cut into one box for each rank, the largest as small as can be:
    21 x 30 x 52 on 8 ranks is 2 x 4 cuts of height and width, all equal. Errors: UsageError."""
    cuts = [c for c in product(range(1, ranks + 1), repeat=3) if prod(c) == ranks]
    cuts = [c for c in cuts if all(n >= k for n, k in zip(grid, c, strict=True))]
    if not cuts:
        raise UsageError(
            f"parallel: sp must cut the latent grid {grid} into boxes; got {ranks}. Use fewer."
        )
    best = min(cuts, key=lambda c: prod(-(-n // k) for n, k in zip(grid, c, strict=True)))
    return list(product(*(cut(n, k) for n, k in zip(grid, best, strict=True))))


def packing(parts: list[Rows], capacity: int = 0) -> list[int]:
    """The places of the rows [all video ; all text] when the parts' rows follow each other, each
    part in `capacity` places (0: one for each of its rows)."""
    starts, video, text = 0, [], []
    for rows in parts:
        video += range(starts, starts + rows.video)
        text += range(starts + rows.video, starts + sum(rows))
        starts += capacity or sum(rows)
    return video + text


class LinearMap(Function):
    """A linear map between ranks, and its adjoint for the gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, there: Callable, back: Callable) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        return ctx.back(dx), None, None


class Exchange:
    """Between the ranks of a group: rows [B,R,H,K] <-> heads [B, all rows, H/u, K]. Each direction
    is the other's adjoint."""

    def __init__(self, group: dist.ProcessGroup, parts: list[Rows], device):
        self.group, self.ranks = group, len(parts)
        self.rows = [sum(rows) for rows in parts]
        self.mine = self.rows[dist.get_rank(group)]
        self.order = torch.tensor(packing(parts), dtype=torch.int64, device=device)
        self.inverse = self.order.argsort()

    def _to_heads(self, x: Tensor) -> Tensor:
        B, R, H, K = x.shape
        sent = x.reshape(B, R, self.ranks, H // self.ranks, K).permute(2, 1, 0, 3, 4).contiguous()
        found = x.new_empty(sum(self.rows), *sent.shape[2:])
        dist.all_to_all_single(found, sent.flatten(0, 1), self.rows, [R] * self.ranks, self.group)
        return found.index_select(0, self.order).transpose(0, 1)

    def _to_rows(self, x: Tensor) -> Tensor:
        sent = x.transpose(0, 1).index_select(0, self.inverse)
        found = x.new_empty(self.ranks * self.mine, *sent.shape[1:])
        dist.all_to_all_single(found, sent, [self.mine] * self.ranks, self.rows, self.group)
        return found.unflatten(0, (self.ranks, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def to_heads(self, x: Tensor) -> Tensor:
        return LinearMap.apply(x, self._to_heads, self._to_rows)

    def to_rows(self, x: Tensor) -> Tensor:
        return LinearMap.apply(x, self._to_rows, self._to_heads)


class AllGather:
    """A group's rows [B,R,...] -> [B, all rows, ...] on each of its ranks, as [video ; text]. The
    adjoint sums what all ranks have for this rank's rows."""

    def __init__(self, group: dist.ProcessGroup, parts: list[Rows], device):
        self.group, self.ranks = group, len(parts)
        self.capacity = max(sum(rows) for rows in parts)
        order = packing(parts, self.capacity)
        self.order = torch.tensor(order, dtype=torch.int64, device=device)
        self.mine = sum(parts[dist.get_rank(group)])

    def _gather(self, x: Tensor) -> Tensor:
        padded = x.new_zeros(self.capacity, len(x), *x.shape[2:])
        padded[: self.mine] = x.transpose(0, 1)
        found = x.new_empty(self.ranks * self.capacity, *padded.shape[1:])
        all_gather_single(found, padded, self.group)
        return found.index_select(0, self.order).transpose(0, 1)

    def _scatter(self, dx: Tensor) -> Tensor:
        sent = dx.new_zeros(self.ranks * self.capacity, len(dx), *dx.shape[2:])
        sent.index_copy_(0, self.order, dx.transpose(0, 1))
        found = dx.new_empty(self.capacity, *sent.shape[1:])
        reduce_scatter_single(found, sent, group=self.group)
        return found[: self.mine].transpose(0, 1)

    def gather(self, x: Tensor) -> Tensor:
        return LinearMap.apply(x, self._gather, self._scatter)


class SequencePart:
    """What this rank holds of samples of one size. box: of latents [B,16,F,Y,X]; text: of text
    rows; rotary: tables of its rows."""

    def __init__(self, sequence: "Sequence", shape: tuple[int, ...], text_rows: int, model):
        frames, height, width = (n // p for n, p in zip(shape[2:], PATCH, strict=True))
        grids = boxes((frames, height, width), sequence.ranks)
        texts = cut(text_rows, sequence.ranks)

        self.sequence = sequence
        self.shape = tuple(shape[2:])
        self.parts = [
            Rows(prod(s.stop - s.start for s in grid), text.stop - text.start)
            for grid, text in zip(grids, texts, strict=True)
        ]
        self.boxes = [
            (slice(None), slice(None))
            + tuple(slice(s.start * p, s.stop * p) for s, p in zip(grid, PATCH, strict=True))
            for grid in grids
        ]

        self.box = self.boxes[sequence.rank]
        self.text = texts[sequence.rank]

        device = next(model.parameters()).device
        whole = rotary_of((frames, height, width), text_rows, model, device)
        t, h, w = (table[s] for table, s in zip(whole[1:4], grids[sequence.rank], strict=True))
        self.rotary = Rotary((len(t), len(h), len(w)), t, h, w, whole.text[self.text])

        self.device = device
        self.known = {}

    def _kept(self, keep: str) -> list[Rows]:
        """The rows of every rank that go on where the last layer keeps one modality."""
        return [
            Rows(0 if keep == "text" else rows.video, 0 if keep == "video" else rows.text)
            for rows in self.parts
        ]

    def _exchange(self, keep: str) -> Exchange:
        if keep not in self.known:
            near = self.sequence.near(self._kept(keep))
            self.known[keep] = Exchange(self.sequence.ulysses, near, self.device)
        return self.known[keep]

    def _union(self, what: str, group: dist.ProcessGroup, parts: list[Rows]) -> AllGather:
        if what not in self.known:
            self.known[what] = AllGather(group, parts, self.device)
        return self.known[what]

    def attend(
        self, joint_attention: Callable, keep: str, q, k, v, _, lengths, sees, video_queries
    ) -> Tensor:
        """Joint attention of this rank's queries, of the rows to `keep`, to the rows of all ranks;
        as `Ops.joint_attention` otherwise."""
        sequence = self.sequence
        split = sequence.ulysses is not None
        if split:
            q = self._exchange(keep).to_heads(q)
            k, v = (self._exchange("all").to_heads(x) for x in (k, v))

        groups = sequence.groups(self._kept(keep))
        mine = groups[sequence.group]
        if sequence.across is not None:
            rows = self._union("rows of groups", sequence.across, sequence.groups(self.parts))
            k, v = rows.gather(k), rows.gather(v)
            # Padded text queries are the last ones of all, so each group computes all text rows.
            texts = [Rows(0, rows.text) for rows in groups]
            text = self._union(f"text of {keep}", sequence.across, texts).gather(q[:, mine.video :])
            q = torch.cat([q[:, : mine.video], text], 1)

        video_rows = sum(rows.video for rows in self.parts)
        o = joint_attention(q, k, v, video_rows, lengths, sees, video_queries=mine.video)
        if sequence.across is not None:
            start = mine.video + sum(rows.text for rows in groups[: sequence.group])
            o = torch.cat([o[:, : mine.video], o[:, start : start + mine.text]], 1)
        return self._exchange(keep).to_rows(o) if split else o

    def join_video(self, x: Tensor) -> Tensor:
        """The boxes of all ranks [B,C,f,y,x] -> [B,C,F,Y,X] on each of them."""
        whole, start = x.new_empty(*x.shape[:2], *self.shape), 0
        targets = [whole[box] for box in self.boxes]
        places = [Rows(target[0, 0].numel(), 0) for target in targets]
        union = self._union("places", self.sequence.process_group, places)
        flat = union.gather(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        for target, place in zip(targets, places, strict=True):
            target.copy_(flat[..., start : start + place.video].reshape(target.shape))
            start += place.video
        return whole

    def join_text(self, h_BTD: Tensor) -> Tensor:
        """The text rows of all ranks, on each of them."""
        parts = [Rows(0, rows.text) for rows in self.parts]
        return self._union("all text", self.sequence.process_group, parts).gather(h_BTD)


class Sequence:
    """The ranks that share every sample.

    process_group: all of them, in the order of their parts. ulysses, across: the groups within
    which heads are exchanged and across which keys are gathered; None of one rank.
    """

    def __init__(self, process_group, ulysses, across, heads_over: int):
        self.process_group, self.heads_over = process_group, heads_over
        self.ranks, self.rank = dist.get_world_size(process_group), dist.get_rank(process_group)
        self.ulysses = ulysses if heads_over > 1 else None
        self.across = across if heads_over < self.ranks else None
        self.group = self.rank // heads_over
        self.known: dict[tuple, SequencePart] = {}

    def near(self, parts: list[Rows]) -> list[Rows]:
        """The rows of the ranks that this one exchanges heads with."""
        return parts[self.group * self.heads_over : (self.group + 1) * self.heads_over]

    def groups(self, parts: list[Rows]) -> list[Rows]:
        """The rows of each group of ranks that exchange heads."""
        u = self.heads_over
        near = [parts[i : i + u] for i in range(0, self.ranks, u)]
        return [Rows(sum(r.video for r in rows), sum(r.text for r in rows)) for rows in near]

    def part(self, shape: tuple[int, ...], text_rows: int, model) -> SequencePart:
        """The `SequencePart` for latents of this shape. Errors: UsageError."""
        key = tuple(shape[2:]), text_rows
        if key not in self.known:
            self.known[key] = SequencePart(self, shape, text_rows, model)
        return self.known[key]


def heads_over(heads: int, ranks: int) -> int:
    """How many ranks exchange rows for heads: each has heads / u whole ones."""
    return gcd(heads, ranks)
