"""Latent shards, the stateful order in which training reads them, and their stream.

A shard holds what training needs and nothing that a step would compute twice: normalised latents,
token ids of prompt and caption, and each distinct prompt's context once; its metadata says which
VAE, text encoder and tokenizer made it. Legend: B samples, N clips, U distinct prompts, C context
rows of width E, T text rows.
"""

import hashlib
import json
import os
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engine.config import PipelineConfig, read_pipeline_config
from engine.data.reading import read_at, read_header
from engine.errors import ModelFileError, UsageError
from engine.files.manifest import NAME as MANIFEST
from engine.files.writing import replacing

FORMAT_VERSION = 1
RANKS = {  # of a shard's tensors
    "latents": 5,
    "prompt_tokens": 2,
    "prompt_lengths": 1,
    "caption_tokens": 2,
    "context_index": 1,
    "contexts": 3,
    "null_context": 2,
}
FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
FLOATING = "latents", "contexts", "null_context"
INTEGERS = {"I32": torch.int32, "I64": torch.int64}


class Shard:
    """One shard's open file. `info`: what `write_shard` says of it; `shapes` of its tensors;
    `tensors`: the small ones, integers in int32. `row` reads one clip's latents or one prompt's
    context, and keeps nothing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_file():  # a FIFO would be waited for
            raise ModelFileError(f"data: {path} must be a file; got another thing. Check --data.")
        try:
            # Not "pt", which maps a file privately: the system refuses one larger than its memory.
            with safe_open(path, "np") as file:
                self.info = json.loads((file.metadata() or {}).get("info", "{}"))
                missing = [name for name in RANKS if name not in file.keys()]
            if missing:
                raise ModelFileError(
                    f"data: {path} must hold {', '.join(RANKS)}; got no {missing[0]}."
                )
            self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            weakref.finalize(self, os.close, self.descriptor)
            length, header = read_header(self.descriptor)
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise ModelFileError(
                f"data: {path} must be a latent shard; got {error}. Run univigu preprocess."
            ) from None

        known = isinstance(self.info, dict)
        if not known or self.info.get("format_version", FORMAT_VERSION) != FORMAT_VERSION:
            raise ModelFileError(
                f"data: {path} must have format version {FORMAT_VERSION}; got "
                f"{str(self.info)[:80]}. Run univigu preprocess again."
            )

        self.shapes = {name: tuple(header[name]["shape"]) for name in RANKS}
        self._types = {name: (FLOATS | INTEGERS).get(header[name]["dtype"]) for name in RANKS}
        self._begins = {name: 8 + length + header[name]["data_offsets"][0] for name in RANKS}
        self._check_layout({name: header[name]["dtype"] for name in RANKS})

        # Latents and contexts stay on disk and are read by the row.
        whole = [name for name in RANKS if name not in ("latents", "contexts")]
        self.tensors = {
            name: self._read(name, self.shapes[name], self._begins[name]) for name in whole
        }
        for name in whole[:-1]:
            self.tensors[name] = self.tensors[name].int()

        index = self.tensors["context_index"]
        prompts = self.shapes["contexts"][0]
        if len(index) and not 0 <= index.min() <= index.max() < prompts:
            raise ModelFileError(
                f"data: context_index of {path} must be below its {prompts} contexts; got "
                f"{index.min()} to {index.max()}. Run univigu preprocess again."
            )

    def _check_layout(self, names: dict[str, str]) -> None:
        shapes = self.shapes
        types = dict.fromkeys(RANKS, INTEGERS) | dict.fromkeys(FLOATING, FLOATS)
        right = all(names[n] in types[n] and len(shapes[n]) == rank for n, rank in RANKS.items())
        same = [
            {shapes[name][:1] for name in RANKS if name not in ("contexts", "null_context")},
            {shapes["prompt_tokens"], shapes["caption_tokens"]},
            {shapes["contexts"][1:], shapes["null_context"]},
        ]
        if not right or any(len(these) > 1 for these in same):
            got = ", ".join(f"{name} {names[name]} {list(shapes[name])}" for name in RANKS)
            raise ModelFileError(
                f"data: {self.path} must hold latents [N,16,F,Y,X], contexts [U,C,E] and "
                f"null_context [C,E] in floats, tokens [N,T], prompt_lengths [N] and context_index "
                f"[N] in integers; got {got}. Run univigu preprocess again."
            )

    def __len__(self) -> int:
        return self.shapes["latents"][0]

    @property
    def bucket(self) -> tuple:
        """What samples of one batch have in common: shapes of latents, tokens and context."""
        return tuple(self.shapes[name][1:] for name in ("latents", "prompt_tokens", "contexts"))

    def row(self, name: str, index: int) -> Tensor:
        """Errors: ModelFileError where the file became unreadable."""
        shape = self.shapes[name][1:]
        size = torch.Size(shape).numel() * self._types[name].itemsize
        return self._read(name, shape, self._begins[name] + index * size)

    def _read(self, name: str, shape: tuple[int, ...], offset: int) -> Tensor:
        # By read and not by a map: a read lets the other threads run, and what a file has lost
        # is an error and not the end of the process.
        out = torch.empty(shape, dtype=self._types[name])
        left = out.view(torch.uint8).numpy().reshape(-1)
        while left.size:
            try:
                count = read_at(self.descriptor, left, offset)
            except OSError as error:
                raise ModelFileError(f"data: {self.path} must be readable; got {error}.") from error
            if not count:
                raise ModelFileError(
                    f"data: {self.path} ends inside {name}: it was cut off while it was read. "
                    "Run univigu preprocess again."
                )
            left, offset = left[count:], offset + count
        return out


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
        """Names and clips of the shards in order, which decide what a step reads."""
        return ", ".join(f"{shard.path.name} ({len(shard)})" for shard in self.shards)

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
    data: LatentSet, steps: range, batch: int, seed: int, rank: int = 0, world: int = 1
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(indices, batch) of each of `steps`, see `LatentSet`. One thread reads the next batch while
    the caller uses this one, into pinned memory where there is a CUDA device.

    Closing the generator waits for the read that is under way and ends the thread; a loop that may
    raise is best run under `contextlib.closing`. Errors: those of `indices` and `batch`."""
    cuda = torch.cuda.is_available()

    def read(step: int) -> tuple[Tensor, dict[str, Tensor]]:
        indices = data.indices(step, batch, seed, rank, world)
        rows = data.batch(indices)
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


def data_fingerprint(folder: str | Path) -> dict[str, str | int]:
    """What of a pipeline folder decides a shard's content: the SHA-256 of each part's weights and
    configuration, and two settings of pipeline.json. Errors: ModelFileError."""
    folder = Path(folder)
    config = read_pipeline_config(folder)
    facts: dict[str, str | int] = {
        "latent_space": config.latent_space,
        "context_rows": config.context_rows,
    }

    for part in ("vae", "text_encoder", "tokenizer"):
        suffixes = {".json", ".safetensors", ".model", ".txt"}
        held = sorted(path for path in (folder / part).glob("*") if path.suffix in suffixes)
        files = [path for path in held if path.name != MANIFEST]
        if not files:
            raise ModelFileError(
                f"data: {folder} must hold {part}; got none. Give a whole pipeline folder."
            )

        digest = hashlib.sha256()
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{content} {path.name}\n".encode())
        facts[part] = digest.hexdigest()
    return facts


def write_shard(
    parts,
    made_with: dict,
    path: str | Path,
    latents: list[Tensor],
    texts: list[tuple[str, str]],
    config: PipelineConfig,
    source: dict,
) -> None:
    """Encodes the (prompt, caption) pairs with a pipeline's text encoder and writes them beside
    their latents fp16 [n,16,F,Y,X], complete or not at all.

    made_with: the `data_fingerprint` of the pipeline's folder.
    config: size, rate and text rows of the clips.
    source: where they come from.

    Errors: UsageError (text too long), ModelFileError."""
    prompt_rows = [parts.text.encode_rows(prompt, config.text_rows) for prompt, _ in texts]
    caption_rows = [parts.text.encode_rows(caption, config.text_rows) for _, caption in texts]

    prompts = sorted({prompt for prompt, _ in texts})
    index = {prompt: i for i, prompt in enumerate(prompts)}
    # 256 at a time, for the encoder's activations grow with the batch.
    chunks = [prompts[i : i + 256] for i in range(0, len(prompts), 256)]
    tensors = {
        "latents": torch.cat(latents),
        "prompt_tokens": torch.stack([ids for ids, _ in prompt_rows]),
        "prompt_lengths": torch.tensor([n for _, n in prompt_rows]),
        "caption_tokens": torch.stack([ids for ids, _ in caption_rows]),
        "context_index": torch.tensor([index[prompt] for prompt, _ in texts]),
        "contexts": torch.cat([parts.encode_prompts(chunk) for chunk in chunks]),
        "null_context": parts.encode_prompts([""])[0],
    }

    size = {name: getattr(config, name) for name in ("num_frames", "height", "width", "fps")}
    info = {"format_version": FORMAT_VERSION, "made_with": made_with, "count": len(texts)}

    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            save_file(tensors, partial, {"info": json.dumps(info | size | {"source": source})})
    except (OSError, SafetensorError) as error:
        raise ModelFileError(
            f"data: {path} must be writable; got {error}. Check space and permissions."
        ) from error
