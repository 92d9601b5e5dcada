"""Base class of the stores, and decorators for their methods."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, TypeVar

from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clears_locals
from homeagent.models.types import MILLISECOND, check_duration, check_searched

if TYPE_CHECKING:
    from homeagent.unit_of_work import UnitOfWork

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


def check_kind(value: T, kind: type[T], what: str) -> T:
    """Return the value if it is an instance of the class. Otherwise raise InvalidArgumentError."""
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{what} must be {kind.__name__}(…), not {type(value).__name__}")
    return value


class Access(Enum):
    """Kind of a store's method. The kind says how homeagent runs the method outside a unit of work."""

    READ = auto()
    WRITE = auto()
    """If the database is busy, homeagent repeats the unit of the method, unless an argument is an iterator."""


def access_of(method: object) -> Access | None:
    """Return the kind of a store's method, or None for other objects."""
    return getattr(method, "homeagent_access", None)


def reading(method: F) -> F:
    """Mark a store's method that only reads. The method must send only one statement."""
    method.homeagent_access = Access.READ  # type: ignore[attr-defined]  # mypy does not allow new attributes of a function
    return method


def writing(*, unless: Callable[..., tuple[bool, Any]] | None = None) -> Callable[[F], F]:
    """Declare that a store's method writes. If the method raises a HomeAgentError, clear local variables.

    If some calls of the method do not write, pass a function as `unless=`. Outside a unit, homeagent first calls the
    function with the method's arguments. If the function returns `(True, result)`, homeagent returns the result at
    once. If the function returns `(False, write)`, homeagent calls `write(store)` in a unit instead of the method. For
    `(False, None)`, homeagent calls the method.
    """

    def declare(method: Any) -> Any:
        method = clears_locals(method)
        method.homeagent_access, method.homeagent_unless = Access.WRITE, unless
        return method

    return declare


class Store:
    """Base class of the stores. An application derives one subclass for each table that it adds.

    A method of a store runs statements by the methods of `self.unit`. Pass the value of each `bindparam()` as a keyword
    argument. If a value is absent, the unit raises InvalidArgumentError. After the end of the unit, the methods of
    `self.unit` raise UnitStateError. A store's method must have no side effect outside the unit. If the database is
    busy, homeagent can call the method again.
    """

    __slots__ = ("_unit",)

    def __init__(self, unit: UnitOfWork) -> None:
        self._unit = unit

    @property
    def unit(self) -> UnitOfWork:
        """The store's unit of work. The unit runs statements and returns the current time."""
        return self._unit

    def _searched(self, value: str, what: str) -> str | None:
        """Return the text, or None if the database can't store the text. A search for None finds no row."""
        # For a lone surrogate or NUL, `isprintable()` returns False.
        if value.__class__ is str and value.isprintable():
            return value
        check_searched(value, what)
        if any("\ud800" <= character <= "\udfff" for character in value):
            return None
        return None if "\0" in value and self._unit.settings.engine.dialect_name == "postgresql" else value

    def _check_ttl(self, ttl: timedelta, what: str) -> timedelta:
        """Return the duration if it is from 1 ms to `Limits.longest_ttl`."""
        longest = self._unit.settings.limits.longest_ttl
        if not (isinstance(ttl, timedelta) and MILLISECOND <= ttl <= longest):
            check_duration(ttl, what)
            raise InvalidArgumentError(f"{what} is {ttl}, over {longest}: shorten it, or raise Limits.longest_ttl")
        return ttl
