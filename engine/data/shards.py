"""Latent shards as one set: the stateful order in which training reads their clips, and the stream.

Legend: B samples, T text rows, C context rows of width E.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.data.shard import Shard
from engine.errors import ModelFileError, UsageError

READERS = 4  # threads that hash shards, a shard each


class Batch(TypedDict):
    """What `engine.train_step` takes: this rank's share of a step, on the model's device.

    B samples of one shape; T text rows; C context rows; E the text encoder's width.
    """

    latents: Tensor
    """fp32 [B,16,F,Y,X], normalised as the model's latent space is."""
    context: Tensor
    """fp32 [B,C,E], the encoded prompts; rows after a prompt's last token are zeros."""
    null_context: Tensor
    """fp32 [C,E], the encoded empty string, of all samples."""
    prompt_tokens: Tensor
    """int64 [B,T], the prompt, EOS, then pad ids."""
    prompt_lengths: Tensor
    """int64 [B], tokens of each prompt, EOS included."""
    caption_tokens: Tensor
    """int64 [B,T], the detailed caption, EOS, then pad ids."""


class LatentSet:
    """The clips of one or more shards, numbered over the shards in the order given. Latents and
    contexts are read when a batch asks for them, so a set may be larger than memory.

    Shards of the same shapes form a bucket, and a batch is of one bucket.

    made_with: the `data_fingerprint` of the parts that made every shard.
    buckets: the clips of each bucket, by its shapes.

    Errors: ModelFileError (no shard, or shards of different parts), UsageError (no paths).
    """

    def __init__(self, *paths: str | Path):
        if not paths:
            raise UsageError(
                "data: paths must name a latent shard; got none. Run univigu preprocess."
            )
        self.shards = [Shard(path) for path in paths]
        self.made_with = _made_with(self.shards[0])
        for shard in self.shards[1:]:
            self._check_parts(shard)
        self.ends = list(accumulate(len(shard) for shard in self.shards))
        clips: dict[tuple, list[Tensor]] = {}
        for shard, end in zip(self.shards, self.ends, strict=True):
            clips.setdefault(shard.bucket, []).append(torch.arange(end - len(shard), end))
        self.buckets = {bucket: torch.cat(numbers) for bucket, numbers in clips.items()}
        self._drawn: tuple[tuple | None, Tensor] = (None, torch.empty(0))

    def _check_parts(self, shard: Shard) -> None:
        ours, theirs = self.made_with, _made_with(shard)
        names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
        if names:
            raise ModelFileError(
                f"data: all shards must be made with the same parts; got {self.shards[0].path} and "
                f"{shard.path} with different {', '.join(names)}. Run univigu preprocess again "
                "for one of them."
            )

    @property
    def identity(self) -> str:
        """Names, clips and hashes of the shards in order, which decide what a step reads; of a
        shard without a hash the first two."""

        def say(shard: Shard) -> str:
            digest = f", SHA-256 {shard.sha256[:16]}" if shard.sha256 else ""
            return f"{shard.path.name} ({len(shard)}{digest})"

        return ", ".join(map(say, self.shards))

    def verify(self, rank: int = 0, ranks: int = 1) -> list[Path]:
        """Read all data, several shards at a time, and check them against their hashes -> the
        shards that have none.

        rank, ranks: this process's share, every `ranks`-th shard from `rank` on; of processes that
            read the same files.

        Errors: ModelFileError, which names the shard.
        """
        mine = self.shards[rank::ranks]
        with ThreadPoolExecutor(READERS, "univigu-verify") as readers:
            hashed = readers.map(Shard.verify, mine)
            return [shard.path for shard, known in zip(mine, hashed, strict=True) if not known]

    def check_model(self, cfg: ModelConfig) -> None:
        """Errors: UsageError where a shard's contexts are not as wide as this model's, or it has
        tokens that the model does not know."""
        for shard in self.shards:
            width, largest = shard.shapes["contexts"][-1], shard.largest_token
            if width != cfg.text_dim or largest >= cfg.vocab:
                raise UsageError(
                    f"train: --data must be made for text_dim {cfg.text_dim} and {cfg.vocab} "
                    f"tokens; got {width} and token {largest} in {shard.path}. Use the model's own "
                    "text encoder, or another --preset."
                )

    @property
    def largest(self) -> tuple:
        """The shapes of the bucket with the largest latents."""
        return max(self.buckets, key=lambda bucket: prod(bucket[0]))

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, clip: int) -> tuple[Shard, int]:
        number = bisect_right(self.ends, clip)
        shard = self.shards[number]
        return shard, clip - self.ends[number] + len(shard)

    def batch(self, indices: Tensor) -> Batch:
        """The clips with these numbers, on the CPU; null_context is that of their bucket's first
        shard. Errors: UsageError for clips that are not there or of two buckets,
        ModelFileError."""
        if not len(indices) or indices.min() < 0 or indices.max() >= len(self):
            raise UsageError(
                f"data: indices must be some of the {len(self)} clips; got {indices.tolist()}."
            )
        places = [self._place(clip) for clip in indices.tolist()]
        buckets = {shard.bucket for shard, _ in places}
        if len(buckets) > 1:
            raise UsageError(
                "data: indices must be clips of one shape; got "
                f"{' and '.join(map(describe, sorted(buckets)))}. Take LatentSet.indices."
            )
        first = next(shard for shard in self.shards if shard.bucket in buckets)

        def small(name: str) -> Tensor:
            return torch.stack([shard.tensors[name][row] for shard, row in places]).long()

        contexts = [
            shard.row("contexts", int(shard.tensors["context_index"][row])) for shard, row in places
        ]
        return {
            "prompt_tokens": small("prompt_tokens"),
            "prompt_lengths": small("prompt_lengths"),
            "caption_tokens": small("caption_tokens"),
            "latents": torch.stack([shard.row("latents", row) for shard, row in places]).float(),
            "context": torch.stack(contexts).float(),
            "null_context": first.tensors["null_context"].float(),
        }

    def indices(self, step: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
        """A rank's clips of one step -> int64 [batch / world]; the ranks' shares in order are the
        global `batch`. An epoch cuts a new order of every bucket into batches, drops the last
        partial one of each, and mixes the batches of all buckets. A pure function of (step, seed),
        so resuming needs no other state. Errors: UsageError."""
        small = {bucket: len(clips) for bucket, clips in self.buckets.items() if len(clips) < batch}
        if small:
            got = ", ".join(f"{count} clips of {describe(name)}" for name, count in small.items())
            raise UsageError(
                "train: batch_size must be at most the clips of each shape, or they would never be "
                f"read; got {batch}, and {got}. Lower --batch-size, or leave the shard out."
            )
        if batch < 1 or batch % world or not 0 <= rank < world:
            raise UsageError(
                f"train: batch_size must be a multiple of the {world} processes, and rank below "
                f"them; got {batch} and rank {rank}. Change --batch-size."
            )
        epoch, at = divmod(step, sum(len(clips) // batch for clips in self.buckets.values()))
        return self._epoch(epoch, batch, seed)[at].chunk(world)[rank]

    def _epoch(self, epoch: int, batch: int, seed: int) -> Tensor:
        """The clips of an epoch's batches, int64 [batches, batch]. The last answer is kept, because
        the next step asks for it again."""
        key, order = self._drawn
        if key != (epoch, batch, seed):
            g = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            cut = []
            for clips in self.buckets.values():
                mixed = clips[torch.randperm(len(clips), generator=g)]
                cut.append(mixed[: len(clips) // batch * batch].view(-1, batch))
            order = torch.cat(cut)
            if len(cut) > 1:
                order = order[torch.randperm(len(order), generator=g)]
            self._drawn = (epoch, batch, seed), order
        return order


def _made_with(shard: Shard) -> dict:
    made = shard.info.get("made_with", {})
    return made if isinstance(made, dict) else {"made_with": made}


def describe(bucket: tuple) -> str:
    latents, (text,), (context, width) = bucket
    size = "x".join(map(str, latents))
    return f"latents {size} with {text} text rows and context {context}x{width}"


def stream(
    data: LatentSet,
    steps: Iterable[int],
    batch: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    beside: Callable[[int, int, int], dict[str, Tensor]] | None = None,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(indices, batch) of each of `steps`, see `LatentSet`. One thread reads the next batch while
    the caller uses this one, into pinned memory where there is a CUDA device.

    beside: of a step, rank and world, what else its batch holds.

    Closing the generator waits for the read that is under way and ends the thread; a loop that may
    raise is best run under `contextlib.closing`. Errors: those of `indices` and `batch`."""
    cuda = torch.cuda.is_available()

    def read(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices = data.indices(step, batch, seed, rank, world)
        rows = data.batch(indices)
        rows |= {} if beside is None else beside(step, rank, world)
        return indices, {k: x.pin_memory() for k, x in rows.items()} if cuda else rows

    # A new thread starts on device 0, and pinning there would open a context on it for every rank.
    device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if cuda else (None, ())
    with ThreadPoolExecutor(1, "univigu-data", *device) as reader:
        coming = (reader.submit(read, step) for step in steps)
        ahead = next(coming, None)
        while ahead is not None:
            ready = ahead.result()
            ahead = next(coming, None)
            yield ready
