"""What this machine has, and what a process took of it. Bytes everywhere; None where the system
does not say."""

import os
import sys


def process_peak() -> int | None:
    """The most bytes that this process held. None on Windows, where Python has no such figure."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory() -> int | None:
    """Bytes of this machine's memory."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_cores() -> int | None:
    """Cores that this process may run on, or where the system has no such limit all of them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()
