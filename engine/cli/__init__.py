"""The command `univigu`."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".entry": ("main", "program", "exit_code"),
        ".console": ("one_line",),
        ".parsing": ("parse",),
    },
)
