"""What a folder holds, from its headers and configurations: no weights are read."""

from math import prod
from pathlib import Path

from engine.config import ModelConfig, VAEConfig, read_fields
from engine.errors import ModelFileError
from engine.files.reading import read_json
from engine.planning.memory import Codecs
from engine.weights.architecture import open_model
from engine.weights.files import find_model, inventory
from engine.weights.names import precision_of


def read_transformer(path: Path) -> tuple[ModelConfig, str]:
    """Architecture and precision of a model file or folder, from its headers. Errors:
    ModelFileError."""
    cfg, entries = open_model(Path(path))
    return cfg, precision_of(entries)


def read_codecs(path: Path) -> Codecs:
    """Reads the sizes of a folder's text encoder and VAE from configurations and headers. Errors:
    ModelFileError."""
    path = find_model(path)
    counts = (
        sum(prod(entry.shape) for entry in inventory(path / part)[0].values())
        for part in ("text_encoder", "vae")
    )
    file = path / "vae" / "config.json"
    stored = read_json(file)
    try:
        vae = read_fields(VAEConfig, stored)
    except ModelFileError as error:
        raise ModelFileError(
            f"memory: {file} must be the configuration of a VAE: {error}"
        ) from None
    return Codecs(*counts, vae.base_dim, vae.patch)
