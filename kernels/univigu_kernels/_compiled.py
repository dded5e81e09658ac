"""The compiled module `_C`: whether it is there, what it was built for, and who may use it."""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from ._card import lacks_nvidia

REBUILD = "Rebuild it: pip install --no-build-isolation -e ."
DTYPES = (torch.float32, torch.bfloat16)


def _load():
    """The module, or None where it was not built. One that does not fit this torch is an error."""
    if importlib.util.find_spec(f"{__package__}._C") is None:
        return None
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError as error:
        raise RuntimeError(
            f"univigu_kernels._C: the compiled module must be built for torch {torch.__version__}; "
            f"got {error}. {REBUILD}"
        ) from error


_C = _load()


def built() -> bool:
    return _C is not None


@cache
def missing(part: str) -> str | None:
    """Why the compiled "cpu" or "cuda" kernels are not there, or None."""
    if _C is None:
        return "the compiled module is not built (pip install --no-build-isolation -e .)"
    if part == "cuda" and not _C.build_info()["cuda_architectures"]:
        return "the compiled module was built without CUDA"
    return None


def build_info() -> dict[str, object]:
    """The torch and compiler it was built with, CUDA architectures, CPU instruction sets; {} if it
    is not built."""
    return {} if _C is None else _C.build_info()


def supports_cpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a compiled CPU backend lacks on `device` in `dtype`, or None."""
    if reason := missing("cpu"):
        return reason
    if device.type != "cpu":
        return "needs a CPU"
    return None if dtype in DTYPES else "needs float32 or bfloat16"


def supports_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """What a compiled CUDA backend lacks on `device` in `dtype`, or None."""
    if reason := missing("cuda"):
        return reason
    if reason := lacks_nvidia(device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    built_for = build_info()["cuda_architectures"].split()
    fits = {"80": major == 8, "90a": (major, minor) == (9, 0), "100a": (major, minor) == (10, 0)}
    if not any(fits[name] for name in built_for):
        return f"was built for sm_{', sm_'.join(built_for)}, not for sm_{major}{minor}"
    return None if dtype in (*DTYPES, torch.float16) else "needs float32, float16 or bfloat16"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Within it, CPU kernels run with one of `build_info()["instruction_sets"]`. Not per thread:
    for tests and measurements."""
    before = build_info()["instruction_set"]
    _C.set_instruction_set(name)
    try:
        yield
    finally:
        _C.set_instruction_set(before)
