"""What torchrun tells the processes that it starts, and PyTorch has no function for."""

import os


def restarts() -> int:
    """How often torchrun --max-restarts has restarted this process's rank; 0 without it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def place_on_node() -> tuple[int, int]:
    """This process's number on its machine, and how many there are; (0, 1) without torchrun."""
    environ = os.environ
    return int(environ.get("LOCAL_RANK", "0")), int(environ.get("LOCAL_WORLD_SIZE", "1"))
