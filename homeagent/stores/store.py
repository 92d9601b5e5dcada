"""What every store stands on: a unit that runs its statements, and the clock that it reads once per method."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Any, Protocol, TypeVar

from homeagent.engine.statements import Parameters, Statement
from homeagent.errors import InvalidArgumentError

__all__ = ["Access", "Store", "Unit", "access_of", "check_kind", "reading", "writing"]

R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


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


@dataclass(frozen=True, slots=True)
class Access:
    """What a store's method does to the database.

    Attributes:
        kind: see `Kind`.
        unless: for a method that writes only sometimes: takes the same arguments, reads, and returns whether the
            answer is known without writing, and the answer.
    """

    class Kind(Enum):
        """How a call that is a unit of its own runs."""

        READ = auto()
        """One statement that reads."""
        WRITE = auto()
        """A unit that is run again if the database is busy."""
        STREAM = auto()
        """A unit that is run once, since it reads an iterable."""

    kind: Kind
    unless: Callable[..., tuple[bool, Any]] | None = None


def access_of(method: object) -> Access | None:
    """Return what a store's method was declared as; None for what is no method of a store's."""
    return getattr(method, "homeagent_access", None)


def reading(method: F) -> F:
    """Declare a store's method as one statement that reads."""
    method.homeagent_access = Access(Access.Kind.READ)  # type: ignore[attr-defined]
    return method


def writing(*, unless: Callable[..., tuple[bool, Any]] | None = None, stream: bool = False) -> Callable[[F], F]:
    """Declare a store's method as one that writes.

    Args:
        unless: finds out by reading whether there is something to write: see `Access`.
        stream: whether the method reads an iterable, which a second run would find empty.
    """

    def declare(method: F) -> F:
        method.homeagent_access = Access(Access.Kind.STREAM if stream else Access.Kind.WRITE, unless)  # type: ignore[attr-defined]
        return method

    return declare


class Store:
    """The base of the stores: bound to one unit, and of no use after its end."""

    __slots__ = ("_unit",)

    def __init__(self, unit: Unit) -> None:
        self._unit = unit
