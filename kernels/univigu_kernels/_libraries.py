"""Attention of libraries, and the one place that imports the optional ones: flash-attn 4, 3 and 2,
and xformers. A package that is absent is reported with the extra that installs it, one that does
not import with its error.

Each attends one whole problem, q [B, Q, H, K] and k, v [B, L, H, K] -> [B, Q, H, K], without a
mask. They take head_dim as the library does (multiples of 8 in most) and raise its errors.
"""

import importlib
from collections.abc import Callable
from functools import cache, wraps
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._card import lacks_nvidia
from ._rows import packed
from ._triton import triton_version

DTYPES = (torch.float16, torch.bfloat16)


class Library(NamedTuple):
    """Where a function comes from, and the major compute capabilities that it is for."""

    module: str
    function: str
    distribution: str
    majors: tuple[int, ...]


FLASH_ATTN = (  # the newest first; flash-attn-4 has no backward for capability 8, 3 is for Hopper
    Library("flash_attn.cute", "flash_attn_func", "flash-attn-4", (9, 10, 11, 12)),
    Library("flash_attn_interface", "flash_attn_func", "flash-attn-3", (9,)),
    Library("flash_attn", "flash_attn_func", "flash-attn", (8, 9, 10, 11, 12)),
)
XFORMERS = (Library("xformers.ops", "memory_efficient_attention", "xformers", (8, 9, 10, 11, 12)),)
EXTRAS = {"flash_attn": ("flash-attn", FLASH_ATTN), "xformers": ("xformers", XFORMERS)}


class Loaded(NamedTuple):
    """An importable function and its package's version; or no function, and `broken` says why
    unless the package is absent."""

    call: Callable | None = None
    version: str | None = None
    broken: str | None = None


@cache
def load(library: Library) -> Loaded:
    try:
        module = importlib.import_module(library.module)
    except Exception as error:  # what a binary built for another torch raises is not foreseeable
        own = f"{library.module}.".startswith(f"{getattr(error, 'name', None)}.")
        if isinstance(error, ModuleNotFoundError) and own:
            return Loaded()
        return Loaded(broken=f"{type(error).__name__}: {' '.join(str(error).split())}")
    call = getattr(module, library.function, None)
    if call is not None:
        return Loaded(call, _version(library))
    if getattr(module, "__file__", None) is None:  # the folder that flash_attn.cute alone leaves
        return Loaded()
    return Loaded(broken=f"{library.module} has no {library.function}")


def _version(library: Library) -> str:
    root = importlib.import_module(library.module.partition(".")[0])
    try:
        return metadata.version(library.distribution)
    except metadata.PackageNotFoundError:  # a source tree on the path
        return getattr(root, "__version__", "of unknown version")


@cache
def _chosen(libraries: tuple[Library, ...], device: torch.device) -> Callable | None:
    """The newest function that is there and is for the device."""
    major, _ = torch.cuda.get_device_capability(device)
    loaded = (load(library) for library in libraries if major in library.majors)
    return next((found.call for found in loaded if found.call), None)


def describe(name: str) -> str:
    """The versions of "flash_attn" or "xformers" that are there, and what is broken or absent."""
    extra, libraries = EXTRAS[name]
    texts = []
    for library in libraries:
        found = load(library)
        label = f"{library.distribution} " if len(libraries) > 1 else ""
        texts += [f"{label}{found.version}"] if found.call else []
        texts += [f"{label}broken: {found.broken}"] if found.broken else []
    return ", ".join(texts) or f"not installed (pip install 'univigu-engine[{extra}]')"


def versions() -> dict[str, str | None]:
    """What attention may run, for a trial's key and for `explain`."""
    cudnn = torch.backends.cudnn.version()
    return {
        "torch": torch.__version__,
        "cudnn": None if cudnn is None else str(cudnn),
        "triton": triton_version(),
        **{name: describe(name) for name in EXTRAS},
    }


def _lacks_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := lacks_nvidia(device):
        return reason
    return None if dtype in DTYPES else "needs float16 or bfloat16"


def _supports(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    extra, libraries = EXTRAS[name]
    ready = [library for library in libraries if load(library).call]
    if not ready:
        broken = any(load(library).broken for library in libraries)
        return describe(name) if broken else f"needs the package {extra}, which is {describe(name)}"
    if reason := _lacks_gpu(device, dtype):
        return reason
    if _chosen(libraries, device) is None:
        majors = sorted({major for library in ready for major in library.majors})
        return f"{describe(name)} is for compute capability {', '.join(map(str, majors))}"
    return None


def supports_cudnn(device: torch.device, dtype: torch.dtype) -> str | None:
    if reason := _lacks_gpu(device, dtype):
        return reason
    return None if torch.backends.cudnn.is_available() else "needs a PyTorch with cuDNN"


def supports_flash_attn(device: torch.device, dtype: torch.dtype) -> str | None:
    return _supports("flash_attn", device, dtype)


def supports_xformers(device: torch.device, dtype: torch.dtype) -> str | None:
    return _supports("xformers", device, dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return o.transpose(1, 2)


def dense(attend: Callable) -> Callable:
    """`attend` for any problem: libraries want a last stride of 1, and refuse to have no rows."""

    @wraps(attend)
    def attend_dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.numel() == 0 or k.numel() == 0:
            return _sdpa(q, k, v)
        return attend(packed(q), packed(k), packed(v))

    return attend_dense


@dense
def attend_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


@dense
def attend_flash_attn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ordered = torch.are_deterministic_algorithms_enabled()  # else its backward adds in any order
    o = _chosen(FLASH_ATTN, q.device)(q, k, v, deterministic=ordered)
    return o[0] if isinstance(o, tuple) else o  # some versions give the log-sum-exp too


@dense
def attend_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _chosen(XFORMERS, q.device)(q, k, v)


LIBRARIES = (  # name, attention of a whole problem, supports
    ("flash_attn", attend_flash_attn, supports_flash_attn),
    ("cudnn", attend_cudnn, supports_cudnn),
    ("xformers", attend_xformers, supports_xformers),
)
