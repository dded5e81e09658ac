"""Tensors in safetensors files: what a file holds, from its header; one file's or all shards'.

An inventory is every tensor's name, shape and dtype; data is read later, tensor by tensor, through
`Entry.read`. Nothing is unpickled and no file outside of the folder is opened.
"""

import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from engine.errors import ModelFileError, listed
from engine.files.manifest import Digest
from engine.files.reading import check_regular, file_errors, read_json

CODES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
MOST_TENSORS = 2**14  # in a file; Wan2.1's 14B has 1,095
DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor, not yet read: its key in the file, shape, safetensors dtype code, how to read."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Tensors that are at hand, as entries."""
    return {
        name: Entry(name, tuple(t.shape), CODES.get(t.dtype, str(t.dtype)), t.detach)
        for name, t in tensors.items()
    }


def read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """A file's entries and its metadata. Errors: ModelFileError."""

    def read(key: str) -> Tensor:
        with file_errors(path):
            return file.get_tensor(key)

    entries = {}
    with file_errors(path):
        check_regular(path)
        file = safe_open(path, framework="pt")
        keys = file.keys()
        check_count(len(keys), path)
        for key in keys:
            view = file.get_slice(key)
            entries[key] = Entry(key, tuple(view.get_shape()), view.get_dtype(), partial(read, key))
        return entries, file.metadata() or {}


def check_count(count: int, path: Path) -> None:
    """Errors: ModelFileError for more tensors than any model has: their names alone would take
    minutes."""
    if count > MOST_TENSORS:
        raise ModelFileError(
            f"{path}: must hold at most {MOST_TENSORS} tensors; got {count}. Do not use this file."
        )


def _entries(path: Path) -> dict[str, Entry]:
    return read_safetensors(path)[0]


def read_sharded(
    index: Path,
    read_file: Callable[[Path], dict[str, Entry]] = _entries,
    endings: tuple[str, ...] = (".safetensors",),
) -> dict[str, Entry]:
    """The entries of all shards; every shard must hold exactly the tensors that the index says.

    index: a JSON file whose "weight_map" has the file of each tensor.
    read_file: reads one shard.
    endings: of the names that shards may have.

    Errors: ModelFileError, also for a shard outside of the folder.
    """
    files = _shards(index, endings)
    entries: dict[str, Entry] = {}
    for file, said in files.items():
        shard = read_file(index.parent / file)
        if shard.keys() != said:
            raise ModelFileError(
                f"{index.parent / file}: a shard must hold exactly what the index says; "
                f"got missing: {listed(sorted(said - shard.keys())) or 'none'}, "
                f"unexpected: {listed(sorted(shard.keys() - said)) or 'none'}. "
                "Download index and shards from one version."
            )
        entries |= shard
    return entries


def _shards(index: Path, endings: tuple[str, ...]) -> dict[str, set[str]]:
    """The tensors that an index says are in each file. Errors: ModelFileError."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelFileError(
            f"{index}: weight_map must map tensor names to file names; got something else. "
            "Download the index again."
        )

    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    for file in files:
        if not re.fullmatch(r"[\w.-]+", file) or not file.endswith(endings):
            raise ModelFileError(
                f"{index}: a shard must be the plain name of a {' or '.join(endings)} file beside "
                f"the index; got {file!r}. Do not use this index."
            )
        if not (index.parent / file).is_file():
            raise ModelFileError(
                f"{index}: every shard must be in the folder; got no {file}. Download it again."
            )
    return dict(sorted(files.items()))


def is_finite(x: Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or infinite: one pass, and no copy."""
    if x.numel() == 0:
        return True
    if x.dtype == torch.float8_e4m3fn:  # NaN is 0x7F, the largest int8, and 0xFF, the largest uint8
        return bool((x.view(torch.int8).amax() != 127) & (x.view(torch.uint8).amax() != 255))
    low, high = x.aminmax()  # both are NaN where one number is
    return bool(low.isfinite() & high.isfinite())


def checked(entry: Entry, file: Path) -> Entry:
    """The entry, whose `read` raises a ModelFileError for NaN and infinity."""

    def read() -> Tensor:
        tensor = entry.read()
        check_finite(tensor, entry.key, file)
        return tensor

    return Entry(entry.key, entry.shape, entry.dtype, read)


def check_finite(x: Tensor, key: str, file: Path) -> None:
    """Errors: ModelFileError that names the tensor, for NaN and infinity in it."""
    if x.is_floating_point() and not is_finite(x):
        raise ModelFileError(
            f"{file}: every number must be finite; got NaN or infinity in {key}, {x.dtype}. "
            "Download it again, or use an earlier save of its training."
        )


def file_chunks(
    entries: Mapping[str, Entry],
    metadata: dict[str, str] | None = None,
    digests: dict[str, Digest] | None = None,
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor at a time: the library's own writer wants all of
    them in memory, and turns a full disk into an error that is no OSError.

    digests: is filled with the hashes of the tensors.
    """
    order = sorted(entries, key=lambda name: -DTYPES[entries[name].dtype].itemsize)  # so: aligned
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in order:
        entry = entries[name]
        begin, end = end, end + entry.nbytes
        at = {"data_offsets": [begin, end]}
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape)} | at
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text

    for name in order:
        data = _bytes(entries[name].read())
        if digests is not None:
            digests[name] = _digest(entries[name], data)
        yield data


def digest_of(entry: Entry) -> Digest:
    """The hash of a tensor in a file. Errors: ModelFileError."""
    return _digest(entry, _bytes(entry.read()))


def _digest(entry: Entry, data: memoryview) -> Digest:
    return entry.dtype, list(entry.shape), hashlib.sha256(data).hexdigest()


def _bytes(x: Tensor) -> memoryview:
    """The numbers of a CPU tensor, in the order of its dimensions."""
    return memoryview(x.contiguous().reshape(-1).view(torch.uint8).numpy())
