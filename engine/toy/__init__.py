"""The synthetic set: its scenes, their judge, the models made from it, the demo."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".scenes": ("draw_scenes", "render"),
        ".shard": ("preprocess_scenes",),
        ".evaluation": ("evaluate",),
    },
)
