"""A checkpoint as files, and the commit that is all or nothing, by one process or by many.

    <folder>/step-00000500/tensors-00000-of-00002.safetensors   one rank's rows of the tensors
                           tensors-00001-of-00002.safetensors   another's
                           state.json      the step, two configurations, and which rows are where
                           manifest.json   size and SHA-256 of the others

Ranks write into step-00000500.writing on a file system that they share, sync, and report; rank 0
writes the manifest last, syncs files and folder, and commits by one rename. The newest two whole
checkpoints are kept. What a killed save or removal left ends in .writing or .removing: the loader
does not see it and the next save removes it.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from engine.errors import ModelFileError, NonFinite
from engine.files.tensors import entries_of, file_chunks
from engine.files.writing import sync, write_hashed
from engine.parallel.liveness import Channel
from engine.weights.checkpoints import FORMAT, as_text, steps, verify

NOT_FINITE = 0  # no error of the system's has this number; it travels as they do


class FilePart(NamedTuple):
    """What a rank writes: file `index` of `count`, with these tensors. rows: parameter -> (all of
    its rows, where the file's begin); a parameter that is not there is whole in file 0."""

    index: int
    count: int
    tensors: dict[str, torch.Tensor]
    rows: dict[str, tuple[int, int]]

    @property
    def names(self) -> list[str]:
        """The names of all ranks' files."""
        count = f"of-{self.count:05d}.safetensors"
        return [f"tensors-{index:05d}-{count}" for index in range(self.count)]


def _is_whole(path: Path) -> bool:
    try:
        verify(path)
    except ModelFileError:
        return False
    return True


def _discard(path: Path) -> None:
    aside = path.with_name(path.name + ".removing")
    path.rename(aside)
    shutil.rmtree(aside)


def _prepare(folder: Path, fresh: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True)
        sync(folder.parent)
    for leftover in (*folder.glob("*.writing"), *folder.glob("*.removing")):
        shutil.rmtree(leftover)
    fresh.mkdir()


def _failure(fresh: Path, act: Callable, *args) -> list | None:
    """[errno, text, file] of the OSError that it raises."""
    try:
        act(*args)
    except OSError as error:  # a failed write does not name its file
        return [error.errno, error.strerror or str(error), error.filename or str(fresh)]
    return None


def _bounds(parts: list[dict]) -> dict[str, list[int]]:
    """Parameter -> where each file's rows begin, and the number of all."""
    return {
        name: [*(part["rows"][name][1] for part in parts), total]
        for name, (total, _) in parts[0]["rows"].items()
    }


def _finish(fresh: Path, record: dict, reports: list[dict], names: list[str]) -> None:
    """Commits what all ranks have written. Errors: OSError, the first of any rank's."""
    for rank, report in enumerate(reports):
        if report["failed"]:
            number, text, file = report["failed"]
            raise OSError(number, text if len(reports) == 1 else f"{text} (rank {rank})", file)
    final, parts = fresh.with_suffix(""), [report for report in reports if report["file"]]
    files = {name: part["file"] for name, part in zip(names, parts, strict=True)}
    state = as_text(record | {"rows": _bounds(parts)})
    files["state.json"] = write_hashed(fresh / "state.json", [state])
    manifest = {"format": FORMAT, "step": record["step"], "files": files}
    write_hashed(fresh / "manifest.json", [as_text(manifest)])
    sync(fresh)
    if final.exists():  # damaged, or of a run that was started over: a resumed one is past it
        _discard(final)
    fresh.rename(final)


def _prune(folder: Path, step: int, trusted: set[Path]) -> None:
    """Removes what the checkpoint of `step` replaces."""
    sync(folder)
    final = folder / f"step-{step:08d}"
    trusted.add(final)
    older = (p for s, p in steps(folder).items() if s < step and (p in trusted or _is_whole(p)))
    kept = {final, next(older, final)}
    for path in steps(folder).values():
        if path not in kept:
            _discard(path)


def commit(
    folder: Path,
    record: dict,
    part: FilePart | None,
    not_finite: str | None,
    trusted: set[Path],
    channel: Channel,
    save: int,
) -> None:
    """Write one checkpoint and remove those that it replaces.

    part: None of a rank that writes none.
    not_finite: what of this rank's state is not, in words.
    trusted: paths that need no reading to be known as whole; the new one is added.
    save: a number that the channel has not seen.

    Errors, the same on all ranks, with the last checkpoint unharmed: OSError, NonFinite.
    """
    first, fresh = channel.rank == 0, folder / f"step-{record['step']:08d}.writing"
    failed = _failure(fresh, _prepare, folder, fresh) if first else None
    failed = channel.tell(f"{save}/begin", failed)
    if failed is None:
        report = {"file": None, "rows": part and part.rows}

        def write():
            if not_finite is not None:
                raise OSError(NOT_FINITE, not_finite)
            chunks = file_chunks(entries_of(part.tensors))
            report["file"] = write_hashed(fresh / part.names[part.index], chunks)

        def finish():
            _finish(fresh, record, channel.hear(f"{save}/written", report), part.names)
            _prune(folder, record["step"], trusted)

        report["failed"] = None if part is None else _failure(fresh, write)
        if first:
            failed = _failure(fresh, finish)
            if failed is not None:  # room on a full disk now, not at the next save
                shutil.rmtree(fresh, ignore_errors=True)
        else:
            channel.hear(f"{save}/written", report)
        failed = channel.tell(f"{save}/end", failed)
    channel.hear(f"{save}/seen")
    if failed is not None and failed[0] == NOT_FINITE:
        raise NonFinite(
            f"checkpoint: numbers must be finite to be saved; got NaN or infinity in {failed[1]} "
            f"after step {record['step']}. The last checkpoint is unharmed: go on from it with a "
            "lower --lr, or look at the data."
        )
    if failed is not None:
        raise OSError(*failed)


def newest_whole(folder: Path, channel: Channel, required: bool = True) -> Path | None:
    """The newest checkpoint whose hashes are right, the same on all ranks, each of which reads its
    share of the files; rank 0 says on stderr which damaged ones it passed over. None only where
    there is no checkpoint and none is required. Errors: ModelFileError."""
    names = channel.tell("names", [path.name for path in steps(folder).values()])
    if not names and not required:
        return None

    # Each rank reads its share of the files; where one share is damaged, all pass the step over.
    damaged = []
    for name in names:
        try:
            verify(folder / name, channel.rank, channel.size)
            found = channel.hear(name)
        except ModelFileError as error:
            found = channel.hear(name, str(error))
        text = channel.tell(f"{name}/found", found and next(filter(None, found), None))
        if text is not None:
            damaged.append(text)
            continue
        if damaged and channel.rank == 0:
            print(f"{' '.join(damaged)} Resuming from {name} instead.", file=sys.stderr)
        return folder / name

    got = " ".join(damaged)
    if not got:
        held = sorted(os.listdir(folder)) if folder.is_dir() else []
        got = f"{', '.join(held) or 'nothing'}."
    raise ModelFileError(
        f"checkpoint: {folder} must hold a whole checkpoint (step-00000500, ...); got {got} "
        "Leave out --resume and choose another --output-path."
    )
