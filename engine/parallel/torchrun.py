"""What torchrun tells the processes that it starts, and PyTorch has no function for."""

import os


def restarts() -> int:
    """How often torchrun --max-restarts has restarted this process's rank; 0 without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
