"""Folders compared with their `sha256.json`, and manifests for folders that have none.

Files are read in parallel threads: hashing leaves Python's lock.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.errors import ModelFileError
from engine.files.manifest import (
    NAME,
    SAFETENSORS,
    WEIGHTS,
    Digest,
    Manifest,
    group_of,
    hash_groups,
    read_manifest,
)
from engine.files.reading import check_regular, file_errors
from engine.files.tensors import digest_of, read_safetensors
from engine.files.writing import replacing, save_errors

THREADS = 8

OnEachNode = Callable[[str, Callable[[], str]], list[str]]


def check_hashes(paths: Iterable[Path], on_each_node: OnEachNode | None = None) -> None:
    """Compares every byte of folders and files with the manifests beside them; a folder without one
    is named on stderr.

    paths: folders, of which the files are read and no folders in them; or single files.
    on_each_node: `World.on_each_node`, where several ranks ask for the same. None: this process
        reads.

    Errors: ModelFileError that names every fault.
    """
    paths = [Path(path) for path in paths]

    def read() -> str:
        return " ".join(fault for path in paths for fault in faults(path, _say))

    found = [read()] if on_each_node is None else on_each_node("hashes", read)
    for text in filter(None, found):
        raise ModelFileError(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def parts_of(folder: Path) -> list[Path]:
    """A folder and those in it that hold files of a model: a pipeline's transformer, vae, ..."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    return [path for path in (folder, *inside) if _held(path) or (path / NAME).exists()]


def _held(folder: Path) -> list[str]:
    """The files that a manifest of the folder lists."""
    endings = (*WEIGHTS, ".json")
    return [n for n in sorted(os.listdir(folder)) if n.endswith(endings) and n != NAME]


def faults(path: Path, say: Callable[[str], None]) -> list[str]:
    """What is wrong with a folder's own files, or with one file, in a sentence each that begins
    with the path of the file.

    say: gets a notice where there is nothing to compare with.
    """
    folder, asked = (path, None) if path.is_dir() else (path.parent, path.name)
    try:
        manifest = read_manifest(folder)
    except ModelFileError as error:
        return [str(error)]
    if manifest is None or (asked is not None and asked not in manifest.files):
        say(f"{path}: no {NAME} has hashes of it; univigu verify {folder} --write makes them.")
        return []
    if asked is not None:
        return list(_compared(folder, manifest, [asked], whole=False))
    return list(_compared(folder, manifest, _held(folder), whole=True))


def _compared(folder: Path, manifest: Manifest, asked: list[str], whole: bool) -> Iterator[str]:
    """The faults of a folder's files.

    asked: the names of files that should be in the manifest.
    whole: compare the groups too.
    """
    names = list(manifest.files) if whole else asked
    present = [name for name in names if (folder / name).is_file()]
    files, tensors = _read(folder, present)
    read = {name: pairs for name, pairs in tensors.items() if isinstance(pairs, dict)}
    spare = [name for name in asked if name.endswith(WEIGHTS) and name not in manifest.files]

    found = hash_groups(pair for pairs in read.values() for pair in pairs.items())
    all_read = whole and len(read) == len(tensors) and not spare
    groups = manifest.groups | found if all_read else {}
    wrong = [group for group in groups if found.get(group) != manifest.groups.get(group)]

    for name in names:
        path, entry = folder / name, manifest.files[name]
        inside = {group_of(tensor) for tensor in read.get(name, ())}
        where = ", ".join(group for group in wrong if group in inside)
        if text := _fault(path, files.get(name), entry, where and f" in group {where}"):
            yield text
    for name in spare:
        yield f"{folder / name}: must be in {NAME}; got a file that is not. Remove it."
    if wrong and all(files.get(name) == manifest.files[name] for name in names):
        yield (
            f"{folder / NAME}: groups must be those of the tensors; got another hash of "
            f"{', '.join(wrong)}. Download it again."
        )


def _fault(path: Path, found: dict | ModelFileError | None, entry: dict, where: str) -> str:
    """What is wrong with a file; "" where nothing is."""
    if isinstance(found, ModelFileError):
        return str(found)
    if found == entry:
        return ""
    if found is None:
        rule = f"be in the folder, as {NAME} says; got none"
    elif found["size"] != entry["size"]:
        rule = f"have {entry['size']} bytes, as {NAME} says; got {found['size']}"
    else:
        rule = f"have the SHA-256 that {NAME} says; got another{where}"
    return f"{path}: must {rule}. Download it again."


def _read(folder: Path, names: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads files, and the tensors in those of safetensors. -> {"size", "sha256"} of each file, and
    the digests of its tensors; in the place of either the ModelFileError."""
    inside = [name for name in names if name.endswith(SAFETENSORS)]
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        files = pool.map(_hash_file, [folder / name for name in names])
        tensors = pool.map(_hash_tensors, [folder / name for name in inside])
        return dict(zip(names, files, strict=True)), dict(zip(inside, tensors, strict=True))


def _hash_file(path: Path) -> dict[str, int | str] | ModelFileError:
    try:
        with file_errors(path), path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"size": file.tell(), "sha256": digest}
    except ModelFileError as error:
        return error


def _hash_tensors(path: Path) -> dict[str, Digest] | ModelFileError:
    try:
        entries, _ = read_safetensors(path)
        return {name: digest_of(entry) for name, entry in entries.items()}
    except ModelFileError as error:
        return error


def write_manifest(folder: Path) -> Manifest:
    """Reads the files of a folder and writes its manifest, in the place of one that is there.

    Errors: ModelFileError for a file that cannot be read.
    """
    names = _held(folder)
    for name in names:
        check_regular(folder / name)
    files, tensors = _read(folder, names)
    for error in (*files.values(), *tensors.values()):
        if isinstance(error, ModelFileError):
            raise error

    groups = hash_groups(pair for pairs in tensors.values() for pair in pairs.items())
    manifest = Manifest(files, groups)
    save_manifest(manifest, folder)
    return manifest


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes a folder's manifest. Errors: ModelFileError."""
    path = folder / NAME
    with save_errors(path), replacing(path) as partial:
        partial.write_bytes(manifest.text())
