"""Latent shards in the order that training reads them, and shards of a user's own videos."""

from engine.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        ".shard": ("data_fingerprint", "verify_shard", "write_shard"),
        ".shards": ("Batch", "LatentSet", "stream"),
        ".manifest": ("preprocess_manifest",),
    },
)
