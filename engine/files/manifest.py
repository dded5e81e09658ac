"""`sha256.json`: what the files of a folder were when it was written.

    {"format": "univigu-sha256", "format_version": 1,
     "files": {"model.safetensors": {"size": 7936042, "sha256": "..."}, "config.json": ...},
     "groups": {"blocks.0": "...", "blocks.1": "...", "rest": "..."}}

A group is the tensors whose names are the same up to their first number, and "rest" those without
one. Its hash is the SHA-256 of a line for each of them, in the order of their names,

    ["blocks.0.norm2.bias", "F32", [128], "the SHA-256 of its bytes"]

as JSON without spaces: it is the same however the tensors are cut into files.
"""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ModelFileError
from engine.files.reading import read_json

NAME = "sha256.json"
FORMAT = {"format": "univigu-sha256", "format_version": 1}
REST = "rest"
SAFETENSORS = (".safetensors", ".sft")
WEIGHTS = (*SAFETENSORS, ".pth", ".pt", ".bin", ".ckpt")

_GROUP = re.compile(r"(.*?\.)??\d+(?=\.)")  # up to the first part of a name that is a number
_PLAIN = re.compile(r"[^/\\:]*[^/\\:.][^/\\:]*")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Digest = tuple[str, list[int], str]  # of a tensor: dtype code, shape, SHA-256 of its bytes


@dataclass(frozen=True)
class Manifest:
    """What a folder's files and groups of tensors must be.

    files: {"size", "sha256"} by name.
    groups: SHA-256 by name.
    """

    files: dict[str, dict]
    groups: dict[str, str]

    def text(self) -> bytes:
        content = FORMAT | {"files": self.files, "groups": self.groups}
        return (json.dumps(content, indent=2) + "\n").encode()


def group_of(tensor: str) -> str:
    """The group of a tensor by its name: "blocks.3", "encoder.block.0", "rest"."""
    found = _GROUP.match(tensor)
    return found[0] if found else REST


def hash_groups(tensors: Iterable[tuple[str, Digest]]) -> dict[str, str]:
    """The hash of each group, in the order of their numbers."""
    lines = defaultdict(list)
    for name, (dtype, shape, digest) in tensors:
        lines[group_of(name)].append([name, dtype, list(shape), digest])

    hashes = {}
    for group in sorted(lines, key=_by_number):
        text = "".join(json.dumps(x, separators=(",", ":")) + "\n" for x in sorted(lines[group]))
        hashes[group] = hashlib.sha256(text.encode()).hexdigest()
    return hashes


def _by_number(group: str) -> tuple[str, int]:
    stem, _, number = group.rpartition(".")
    return (stem, int(number)) if number.isdigit() else (group, 0)


def read_manifest(folder: Path) -> Manifest | None:
    """The folder's manifest; None where it has none. Errors: ModelFileError."""
    path = folder / NAME
    if not path.exists():
        return None
    content = read_json(path)
    files, groups = content.get("files"), content.get("groups")

    whole = content.keys() == {*FORMAT, "files", "groups"} and content.items() >= FORMAT.items()
    whole = whole and isinstance(files, dict) and isinstance(groups, dict)
    whole = whole and all(_PLAIN.fullmatch(name) and _is_entry(x) for name, x in files.items())
    if not whole or not all(map(_is_digest, groups.values())):
        raise ModelFileError(
            f"{path}: must list plain names with sizes and SHA-256, as it was written; got "
            f"something else. Download it again, or renew it: univigu verify {folder} --write"
        )
    return Manifest(files, groups)


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and type(entry["size"]) is int
        and _is_digest(entry["sha256"])
    )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def check_sizes(path: Path) -> None:
    """Compares the sizes of the weights that are there with those in the manifest, if there is one.
    Of documents, which people edit, `engine.files.hashes` compares the hashes when asked to.

    path: a folder, or one file.

    Errors: ModelFileError.
    """
    folder = path if path.is_dir() else path.parent
    manifest = read_manifest(folder)
    listed = {} if manifest is None else manifest.files
    for name in listed if path.is_dir() else listed.keys() & {path.name}:
        file = folder / name
        if not name.endswith(WEIGHTS) or not file.is_file():
            continue
        if file.stat().st_size != listed[name]["size"]:
            raise ModelFileError(
                f"{file}: must have {listed[name]['size']} bytes, as {NAME} says; got "
                f"{file.stat().st_size}. Download it again, or, if you changed it, run univigu "
                f"verify {folder} --write"
            )
