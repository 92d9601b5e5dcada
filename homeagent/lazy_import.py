"""Names of a package that are imported when one is first asked for: a process that needs none of them starts sooner.

An annotation that goes through the package, such as `models.AgentCreate`, can be evaluated all the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package (PEP 562) that imports these names.

    Hide it from type checkers, which would take any misspelt name for one of them.

    Args:
        package: its name.
        modules: the module of each name, relative to the package.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{modules[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get
