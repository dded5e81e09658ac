"""Uni-ViGU: one diffusion transformer that makes videos and writes their captions.

The public names load on first use, so `import engine` costs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "engine.config",
    "TrainConfig": "engine.config",
    "UniViGU": "engine.model",
    "load_model": "engine.weights",
    "save_pretrained": "engine.weights",
    "Pipeline": "engine.pipeline",
    "TrainState": "engine.train",
    "train_step": "engine.train",
    "explain": "univigu_kernels",
    "UsageError": "engine.errors",
    "MissingPackage": "engine.errors",
    "ModelFileError": "engine.errors",
    "NonFinite": "engine.errors",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
