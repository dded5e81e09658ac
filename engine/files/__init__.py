"""Files without their meaning: read strictly, written whole or not at all, compared with their
hashes."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".hashes": ("check_hashes", "faults", "write_manifest"),
        ".tensors": ("Entry", "read_safetensors", "read_sharded"),
        ".writing": ("replacing",),
    },
)
