"""What a bulk run does to its items: captions of clips that are decoded ahead, or videos.

Clips of one shape run as one batch. A batch holds items of one group alone, see
`engine.bulk.parts`, so that it is the same whichever run computes it.
"""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import ClassVar

import numpy as np

from engine.bulk.ahead import ahead
from engine.bulk.items import Item, seed_of, shown
from engine.bulk.parts import Output
from engine.config import PipelineConfig
from engine.errors import ModelFileError, UsageError
from engine.media import read_clips


@dataclass(frozen=True, eq=False)
class Piece:
    """A clip of an item, or the error in its place.

    window: its number among the item's clips.
    begin: seconds into the file at which it begins.
    clip: an `engine.media.clip.Excerpt`, or None.
    shape: of what can share a batch.
    """

    item: Item
    window: int = 0
    begin: float = 0.0
    clip: object = None
    shape: tuple[int, ...] = ()
    error: str | None = None

    @property
    def id(self) -> str:
        return self.item.id(self.begin)

    def row(self, **values) -> dict:
        error = None if self.error is None else shown(self.error)
        return {"at": [self.item.number, self.window], "id": self.id, **values, "error": error}


class Captions:
    """Captions of the clips of videos.

    pipe: an `engine.Pipeline`.
    config: frames, rate and size of a clip.
    batch_size: clips of a batch.
    every: seconds from one clip of a file to the next; None takes one clip.
    seed: of the run, from which each clip has its own.
    choices: what else `Pipeline.caption` takes.
    threads: files that are decoded at a time; 0 decodes in turn with the captions.
    """

    COLUMNS: ClassVar = {
        **dict.fromkeys(("id", "video"), "string"),
        **dict.fromkeys(("start", "end"), "double"),
        **dict.fromkeys(("num_frames", "seed"), "int64"),
        **dict.fromkeys(("caption", "error"), "string"),
    }

    def __init__(
        self,
        pipe,
        config: PipelineConfig,
        batch_size: int = 8,
        every: float | None = None,
        seed: int = 0,
        choices: dict | None = None,
        threads: int = 4,
    ):
        self.pipe, self.config, self.batch_size, self.every = pipe, config, batch_size, every
        self.seed, self.choices, self.threads = seed, choices or {}, threads

    def pieces(self, items: Iterable[Item]) -> Iterator[Piece]:
        """The clips of all items in order, decoded ahead: at most a batch of them waits."""
        if self.threads == 0:
            return (piece for item in items for piece in self.decode(item))
        return ahead(items, self.decode, self.threads, self.batch_size)

    def decode(self, item: Item) -> Iterator[Piece]:
        """The clips of an item, and an error where they end early; at least one of both."""
        window, begin = 0, item.start
        if item.error is not None:
            yield Piece(item, 0, begin, error=item.error)
            return
        try:
            for clip in read_clips(item.path, self.config, item.start, item.end, self.every):
                yield Piece(item, window, clip.start, clip, tuple(clip.frames.shape))
                window += 1
                begin = item.start + window * (self.every or 0.0)
        except (UsageError, ModelFileError, OSError) as error:
            yield Piece(item, window, begin, error=str(error))

    def make(self, batch: list[Piece]) -> list[dict]:
        """Rows of one batch."""
        frames = np.stack([piece.clip.frames.numpy() for piece in batch])
        seeds = [seed_of(self.seed, piece.id) for piece in batch]
        found = self.pipe.caption(frames, seed=seeds, progress=False, **self.choices)
        return [
            self.row(piece, result.caption, result.seed)
            for piece, result in zip(batch, found, strict=True)
        ]

    def row(self, piece: Piece, caption: str | None = None, seed: int | None = None) -> dict:
        clip = piece.clip
        return piece.row(
            video=piece.item.text,
            start=round(piece.begin, 6),
            end=None if clip is None else round(clip.end, 6),
            num_frames=None if clip is None else len(clip.frames),
            seed=seed,
            caption=caption,
        )


class Generations:
    """Videos of prompts, with their captions in mode t2vt.

    pipe: an `engine.Pipeline`.
    folder: gets ID.mp4 and its sidecar ID.json of each prompt.
    batch_size: prompts of a batch.
    seed: of the run, from which each prompt has its own.
    choices: what else `Pipeline.generate` takes.
    """

    COLUMNS: ClassVar = {
        **dict.fromkeys(("id", "video", "prompt"), "string"),
        "seed": "int64",
        **dict.fromkeys(("caption", "error"), "string"),
    }

    def __init__(
        self,
        pipe,
        folder: Path,
        batch_size: int = 1,
        seed: int = 0,
        choices: dict | None = None,
    ):
        self.pipe, self.folder, self.batch_size = pipe, folder, batch_size
        self.seed, self.choices = seed, choices or {}

    def pieces(self, items: Iterable[Item]) -> Iterator[Piece]:
        for item in items:
            error = item.error
            if error is None:
                try:
                    self.check(item.text)
                except UsageError as wrong:
                    error = str(wrong)
            yield Piece(item, error=error)

    def check(self, prompt: str) -> None:
        """Errors: UsageError where the prompt is too long for the model, or is empty."""
        rows = self.choices.get("text_rows")
        rows = self.pipe.config.text_rows if rows is None else rows
        self.pipe.encode_prompts([prompt])
        if self.choices.get("mode", "t2v") == "t2v" and rows:
            self.pipe.text.encode_rows(prompt, rows)

    def make(self, batch: list[Piece]) -> list[dict]:
        """Rows of one batch, after its videos were written."""
        paths = [self.folder / f"{piece.id}.mp4" for piece in batch]
        seeds = [seed_of(self.seed, piece.id) for piece in batch]
        prompts = [piece.item.text for piece in batch]
        found = self.pipe.generate(
            prompts, seed=seeds, output_path=paths, progress=False, **self.choices
        )
        return [
            self.row(piece, result.caption, result.seed)
            for piece, result in zip(batch, found, strict=True)
        ]

    def row(self, piece: Piece, caption: str | None = None, seed: int | None = None) -> dict:
        video = None if piece.error else f"{self.folder.name}/{piece.id}.mp4"
        prompt = piece.item.text
        return piece.row(video=video, prompt=prompt, seed=seed, caption=caption)


Work = Captions | Generations


@dataclass(frozen=True)
class Part:
    """Pieces whose rows are written together: full batches one by one, and with the group's last
    part all smaller batches and errors."""

    batches: list[list[Piece]]
    errors: list[Piece]
    last: bool

    @property
    def places(self) -> list[list]:
        """What tells the rows of this part from others."""
        pieces = [piece for batch in [*self.batches, self.errors] for piece in batch]
        return [[piece.item.number, piece.window, piece.id] for piece in pieces]


def parts_of(pieces: Iterable[Piece], batch_size: int) -> Iterator[Part]:
    """The pieces of a group, in parts."""
    waiting: dict[tuple, list[Piece]] = {}
    errors = []
    for piece in pieces:
        if piece.error is not None:
            errors.append(piece)
            continue
        batch = waiting.setdefault(piece.shape, [])
        batch.append(piece)
        if len(batch) == batch_size:
            yield Part([waiting.pop(piece.shape)], [], last=False)
    yield Part(list(waiting.values()), errors, last=True)


def do(work: Work, output: Output, items: Iterable[Item]) -> Iterator[dict[str, int]]:
    """Write the parts of whole groups of items that are not there; yields after each part how many
    rows it has, and how many of them are errors.

    Errors: ModelFileError where a part cannot be written; those of `Pipeline.caption` and
    `generate`. The parts until then stay.
    """
    with closing(iter(work.pieces(items))) as pieces:
        for group, members in groupby(pieces, lambda piece: output.group_of(piece.item)):
            for number, part in enumerate(parts_of(members, work.batch_size)):
                path = output.part(group, number, part.last)
                if not (path.exists() and _places(output.read(path)) == part.places):
                    rows = [row for batch in part.batches for row in work.make(batch)]
                    output.write(path, rows + [work.row(piece) for piece in part.errors])
                yield {"rows": len(part.places), "errors": len(part.errors)}


def _places(rows: list[dict]) -> list[list]:
    return [[*row["at"], row["id"]] for row in rows]
