"""Reads at an offset, on systems that have none too."""

import json
import os
import struct
from threading import Lock

SEEKING = Lock()  # a file has one position for all threads


def read_at(descriptor: int, out, offset: int) -> int:
    """Fill the writable buffer `out` from `offset` on, as far as one read goes -> bytes read.
    Errors: OSError."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [out], offset)
    with SEEKING, os.fdopen(descriptor, "rb", buffering=0, closefd=False) as file:
        file.seek(offset)
        return file.readinto(out)


def read_header(descriptor: int) -> tuple[int, dict]:
    """The length of a safetensors file's header, and what it says. Errors: OSError,
    json.JSONDecodeError."""
    size = bytearray(8)
    read_at(descriptor, size, 0)
    (length,) = struct.unpack("<Q", size)
    header = bytearray(length)
    read_at(descriptor, header, 8)
    return length, json.loads(header)
