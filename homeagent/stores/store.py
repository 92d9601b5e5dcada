"""What every store stands on: a unit that runs its statements, and the clock that it reads once per method."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Protocol, TypeVar

from homeagent.engine.statements import Parameters, Statement
from homeagent.errors import InvalidArgumentError

__all__ = ["Store", "Unit", "check_kind"]

R = TypeVar("R")
T = TypeVar("T")


def check_kind(value: T, kind: type[T], what: str) -> T:
    """Return `value` if it is of the kind that a method takes: a dict, or another table's, was validated by nobody.

    Raises:
        InvalidArgumentError: it is not.
    """
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{what} must be {kind.__name__}(…), not {type(value).__name__}")
    return value


class Unit(Protocol):
    """The unit of work as a store sees it. Each method raises UnitStateError once the unit has ended."""

    def one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Return what the first row stands for, None where there is none."""

    def all(self, statement: Statement[R], **parameters: Any) -> list[R]:
        """Return what the rows stand for."""

    def write(self, statement: Statement[Any], **parameters: Any) -> int:
        """Change rows, and return how many."""

    def write_one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Change a row, and return what it stands for now, None where none was changed."""

    def write_many(self, statement: Statement[Any], parameters: Iterable[Parameters]) -> int:
        """Change rows once for each set of parameters, and return how many."""

    def now(self) -> datetime:
        """Read the clock: an instant in UTC, floored to milliseconds."""

    @property
    def shared(self) -> dict[str, Any]:
        """What the stores of one `Database` remember between units; never anything that must survive it."""

    @property
    def connection_memory(self) -> dict[str, Any]:
        """What the stores remember of this unit's connection: only what can't change while that is open."""


class Store:
    """The base of the stores: bound to one unit, and of no use after its end."""

    __slots__ = ("_unit",)

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
