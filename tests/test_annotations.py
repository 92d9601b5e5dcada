"""The package for type checkers and other tools: evaluable annotations, and errors for unknown names."""

from __future__ import annotations

import ast
import inspect
import typing
from importlib.metadata import version
from pathlib import Path

import pytest

import homeagent
from homeagent import Database, ReplayGuard, UnitOfWork, stores
from tests import fork_server

PACKAGE = Path(homeagent.__file__).parent
PUBLIC = [Database, ReplayGuard, UnitOfWork, *(getattr(stores, name) for name in stores.__all__)]


def test_the_annotations_of_public_methods_can_be_evaluated() -> None:
    """`typing.get_type_hints` succeeds for every public method, also if an annotation names a lazily imported model."""
    methods = [
        method
        for kind in PUBLIC
        for name, method in inspect.getmembers(kind, lambda each: inspect.isfunction(each) or inspect.ismethod(each))
        if not name.startswith("_") and str(getattr(method, "__module__", None)).startswith("homeagent")
    ]
    assert len(methods) > 90
    assert all("return" in typing.get_type_hints(method) for method in methods)


@pytest.mark.parametrize("package", ["__init__.py", "models/__init__.py", "maintenance/__init__.py"])
def test_a_type_checker_knows_each_name(package: str) -> None:
    """A type checker reports `from homeagent import Devise`, as a module's `__getattr__` is hidden from the checker."""
    tree = ast.parse((PACKAGE / package).read_text(encoding="utf-8"))
    seen = {target.id for each in tree.body if isinstance(each, ast.Assign) for target in each.targets}
    assert "__getattr__" not in seen | {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}


def test_an_unknown_name_raises_attribute_error() -> None:
    """If a name does not exist, reading it raises AttributeError with the name of the package, as for any module."""
    for module in (homeagent, homeagent.models, homeagent.maintenance):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'Devise'"):
            getattr(module, "Devise")  # noqa: B009  a type checker refuses the other way


def test_the_version_is_the_installed_version() -> None:
    """`homeagent.__version__` and `homeagent --version` are the installed version."""
    assert homeagent.__version__ == version("homeagent")
    done = fork_server.run("import runpy; runpy.run_module('homeagent', run_name='__main__')", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"homeagent {version('homeagent')}\n", "")
