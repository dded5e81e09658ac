"""Reads at an offset, on systems that have none too."""

import os
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


def bytes_at(descriptor: int, count: int, offset: int) -> bytes:
    """At most `count` bytes. Errors: OSError."""
    out = bytearray(count)
    return bytes(out[: read_at(descriptor, out, offset)])
