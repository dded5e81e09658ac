"""Arithmetic of sizes before anything runs, and what this machine has: bytes, FLOPs. No torch."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".memory": ("Job", "estimate", "peaks", "format_estimate"),
        ".machine": ("process_peak",),
        ".flops": ("forward_flops", "train_flops", "peak_flops"),
    },
)
