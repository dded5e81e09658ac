"""The command `univigu`."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".entry": ("main", "parse", "exit_code", "one_line"),
    },
)
