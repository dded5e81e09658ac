"""Arithmetic of sizes, before anything runs: bytes by part and stage, FLOPs. No torch."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".memory": ("Job", "estimate", "peaks", "format_estimate"),
        ".flops": ("forward_flops", "train_flops", "peak_flops"),
    },
)
