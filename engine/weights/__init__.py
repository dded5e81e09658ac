"""Files of weights: found, checked, named, loaded, converted, written. Nothing is unpickled."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".load": ("load_model", "save_pretrained", "convert"),
        ".architecture": ("open_model",),
        ".adapters": ("read_adapter",),
        ".headers": ("read_transformer", "read_codecs"),
    },
)
