"""Several devices: mesh and FSDP2, sequence parallel, sampling on several ranks, who is alive."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".world": ("World",),
        ".sampling": ("Ranks",),
        ".torchrun": ("restarts", "place_on_node"),
    },
)
