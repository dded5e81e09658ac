"""Model files without their meaning: inventories of what a file holds.

Sources: folders (one file, or shards with an index), safetensors files, and torch files through the
reader that unpickles no code. `engine.weights.forms` names the forms that are not read. Anything
wrong is a ModelFileError naming the file.
"""

import zipfile
from pathlib import Path
from typing import Any

import torch

from engine.errors import ModelFileError, listed
from engine.files.manifest import SAFETENSORS
from engine.files.reading import check_regular, file_errors, parse_json, read_json
from engine.files.tensors import Entry, check_count, entries_of, read_safetensors, read_sharded
from engine.media.parts import HUB_ID, find_folder
from engine.weights.forms import pickled_error, refuse_file, refuse_folder, state_dict_of

FORMAT = {"format": "univigu", "format_version": 1}
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CODES = {dtype: code for code, dtype in FLOATS.items()}
FP8_CODE = "F8_E4M3"
DTYPES = FLOATS | {FP8_CODE: torch.float8_e4m3fn}

TORCH = (".pth", ".pt", ".bin", ".ckpt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILES = (
    INDEX,
    SINGLE,
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
)
_BIN_FILES = (  # of older releases; read where there is no safetensors file beside them
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def find_model(path: str | Path) -> Path:
    """The file or folder `path`, or the folder of the model with this id in Hugging Face's cache.

    Errors: ModelFileError; MissingPackage where an id needs huggingface_hub.
    """
    path = Path(path)
    if path.exists():
        return path
    if path.suffix not in SAFETENSORS + TORCH and HUB_ID.fullmatch(str(path)):
        return find_folder(path)
    raise ModelFileError(
        f"{path}: the model path must be an existing folder or file; got neither. "
        "Check the spelling, or download the model first."
    )


def inventory(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """A folder's or file's entries, and its config (config.json; of a safetensors, metadata)."""
    if path.is_dir():
        return _read_folder(path)
    with file_errors(path):
        check_regular(path)
        refuse_file(path)
    if path.suffix in SAFETENSORS:
        entries, metadata = read_safetensors(path)
        return entries, parse_json(metadata.get("config", "{}"), f"{path}: metadata config")
    if path.suffix in TORCH:
        return _read_torch(path), {}
    raise ModelFileError(
        f"{path}: a model file must end in {', '.join(SAFETENSORS + TORCH)}; "
        f"got {path.suffix!r}. Pass the folder or one of these files."
    )


def model_folder(path: Path) -> Path:
    """The transformer/ of a pipeline folder; any other folder or file as it is."""
    inside = path / "transformer"
    return inside if inside.is_dir() and not (path / "config.json").is_file() else path


def _read_folder(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    path = model_folder(path)
    config_file = path / "config.json"

    refuse_folder(path)
    found = [name for name in _WEIGHT_FILES if (path / name).is_file()]
    found = found or [name for name in _BIN_FILES if (path / name).is_file()]
    if len(found) != 1:
        held = sorted(p.name for p in path.iterdir() if p.suffix in SAFETENSORS + TORCH)
        got = found or held
        raise ModelFileError(
            f"{path}: a model folder must hold exactly one of "
            f"{', '.join(_WEIGHT_FILES + _BIN_FILES)}; got {listed(got) or 'none'}. "
            "Pass a .safetensors, .pth or .bin file by its own name."
        )
    if not config_file.is_file() and found[0] in (SINGLE, INDEX):
        raise ModelFileError(
            f"{path}: the folder must hold config.json beside {found[0]}; got none. "
            "A save was interrupted; save or convert the model again."
        )
    config = read_json(config_file) if config_file.is_file() else {}
    if found[0].endswith(".json"):
        return read_sharded(path / found[0], _read_weights, (".safetensors", ".bin")), config
    return _read_weights(path / found[0]), config


def _read_weights(path: Path) -> dict[str, Entry]:
    return _read_torch(path) if path.suffix in TORCH else read_safetensors(path)[0]


def _read_torch(path: Path) -> dict[str, Entry]:
    """A torch file's entries: its state dict at the top, or in the nesting of a trainer."""
    check_regular(path)
    _refuse_compressed(path)
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # on bad bytes the restricted unpickler raises a dozen types
        raise pickled_error(path, error) from error
    state = state_dict_of(data, path)
    check_count(len(state), path)
    for key, value in state.items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ModelFileError(
                f"{path}: every value must be a dense tensor; got {key!r}: {type(value).__name__}. "
                "Save model.state_dict() under `model`."
            )
    return entries_of(state)


def _refuse_compressed(path: Path) -> None:
    """Errors: ModelFileError where a zip's member is compressed, as torch.save never does: a
    mebibyte could take gibibytes of memory before anything is known of it."""
    try:
        with file_errors(path), zipfile.ZipFile(path) as file:
            members = file.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # no zip, or a damaged one: torch says so
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed:
        largest = max(packed, key=lambda member: member.file_size)
        raise ModelFileError(
            f"{path}: must be as torch.save writes it, uncompressed; got {largest.filename} "
            f"of {largest.file_size} bytes in {largest.compress_size}. Do not use this file."
        )


def _is_plain(value: object) -> bool:
    """A dense tensor whose storage holds all its elements; an expanded view costs no bytes."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.nbytes <= value.untyped_storage().nbytes()
    )
