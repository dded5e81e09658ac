"""Captions of many videos and videos of many prompts: runs that a kill does not undo."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".items": ("Item", "identity", "read_prompts", "read_videos"),
        ".parts": ("Output", "model_identity"),
        ".work": ("Captions", "Generations", "do"),
        ".cluster": ("on_ray",),
    },
)
