"""Training: the step and its losses, the loop around it, Muon, adapters, metrics, dry runs."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".step": ("TrainState", "train_step"),
        ".loop": ("fit",),
    },
)
