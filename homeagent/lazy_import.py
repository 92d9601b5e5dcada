"""Import the names of a package at their first use, to shorten the start of a process.

Python can still evaluate annotations that contain lazy names, for example `models.AgentCreate`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a function `__getattr__` for a package (PEP 562). The returned function imports a name when a program
    first uses the name.

    Args:
        package: name of the package.
        modules: for each name, the module that defines the name, relative to the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
