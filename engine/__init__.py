"""Uni-ViGU: one diffusion transformer that makes videos and writes their captions."""

from engine.lazy import attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".config": ("ModelConfig", "TrainConfig"),
        ".model": ("UniViGU",),
        ".weights": ("load_model", "save_pretrained"),
        ".pipeline": ("Pipeline",),
        ".train": ("TrainState", "train_step", "fit"),
        ".checkpoint": ("load_checkpoint", "save_checkpoint"),
        ".data": ("Batch", "LatentSet"),
        ".parallel": ("World",),
        "univigu_kernels": ("explain",),
        ".errors": ("UsageError", "MissingPackage", "ModelFileError", "NonFinite"),
    },
)
