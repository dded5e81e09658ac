"""Training state that survives kills, full disks and flipped bits, for any number of ranks."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".state": ("load", "save", "load_checkpoint", "save_checkpoint", "Saver", "Interrupted"),
    },
)
