"""Doors: what a package offers, each name imported from the file that holds it on first use (PEP
562). So `import engine`, `univigu --help` and the planning modules stay free of torch."""

import sys
from collections.abc import Callable
from importlib import import_module


def attach(package: str, homes: dict[str, tuple[str, ...]]) -> tuple[Callable, Callable, list[str]]:
    """The `__getattr__`, `__dir__` and `__all__` of `package`, to be assigned in its `__init__`.

    homes: names by the module that holds them; a module with a leading dot is the package's own. No
    name may be that of a submodule, for importing the submodule binds its name over the lazy one.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def __getattr__(name: str) -> object:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(home_of[name], package), name)

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *home_of})

    return __getattr__, __dir__, list(home_of)
