"""The one place that asks whether Triton is there. CPU installs of PyTorch come without it."""

import functools
import importlib
import importlib.util


@functools.cache
def triton_version() -> str | None:
    """Version of the importable Triton, or None. A Triton that is installed but broken raises."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("triton").__version__


def triton_missing() -> str | None:
    """Why no Triton backend can be offered, or None when Triton is there."""
    if triton_version() is None:
        return "needs the package triton, which is not installed"
    return None
