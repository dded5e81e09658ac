"""Latent shards in the order that training reads them, and shards of a user's own videos."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".shards": ("Batch", "LatentSet", "stream", "data_fingerprint", "write_shard"),
        ".manifest": ("preprocess_manifest",),
    },
)
