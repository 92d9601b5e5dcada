"""Stores of a database, such as `database.devices`. Each call of a method has a separate transaction."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import cache, wraps
from inspect import getattr_static
from types import FunctionType
from typing import Any, TypeVar

from pydantic import BaseModel

from homeagent.engine.statements import Statement, no_statement
from homeagent.errors import UnitStateError
from homeagent.frame_locals import clears_locals
from homeagent.retry import Runner
from homeagent.stores.store import Access, Store, access_of
from homeagent.transaction import UnitSettings
from homeagent.unit_of_work import UnitOfWork

R = TypeVar("R")
S = TypeVar("S", bound=Store)


def one_call_store(kind: type[S], settings: UnitSettings, runner: Runner) -> S:
    """Return a store that belongs to a database, not to a unit."""
    store: S = _one_call_type(kind)(AutocommitReads(settings, runner))  # type: ignore[arg-type]  # a class is hashable
    return store


class AutocommitReads:
    """Runs each SELECT of a store in autocommit mode, without a unit."""

    def __init__(self, settings: UnitSettings, runner: Runner) -> None:
        self.settings: UnitSettings = settings
        self.runner: Runner = runner
        self.now: Callable[[], datetime] = settings.now

    def one(self, statement: Statement[R], /, **parameters: Any) -> R | None:
        """Run a statement. Return the first row's object, or None without rows."""
        rows = self.settings.engine.read_alone(statement, parameters, self.settings.timeout)
        return rows[0] if rows else None

    def all(self, statement: Statement[R], /, **parameters: Any) -> list[R]:
        """Run a statement, and return the objects of all rows."""
        return self.settings.engine.read_alone(statement, parameters, self.settings.timeout)

    def run_once(self, work: Callable[[UnitOfWork], R]) -> R:
        """Run a write in a new unit, without retries. An iterator can be read only once."""
        with self.settings.unit(self.settings, read_only=False) as unit:
            return work(unit)


@cache
def _one_call_type(kind: type[Store]) -> Any:
    """Return a subclass of a store class. Methods that write run in a new unit of work."""
    methods: dict[str, Any] = {"__slots__": ()}
    for name in dir(kind):
        method = getattr(kind, name)
        access = access_of(method)
        if access is not None:
            if access is not Access.READ:
                methods[name] = _in_own_unit(kind, method)
        elif not name.startswith("_") and isinstance(getattr_static(kind, name), FunctionType):
            methods[name] = _in_unit_if_necessary(kind, method)
    return type(kind.__name__, (kind,), methods)


def _have_stream(*arguments: object) -> bool:
    """Return True if one of a method's arguments can perhaps be read only once, such as an iterator."""
    return any(
        hasattr(each, "__iter__") and not hasattr(each, "__len__") and not isinstance(each, BaseModel)
        for each in arguments
    )


def _in_own_unit(kind: type[Store], method: Callable[..., Any]) -> Callable[..., Any]:
    unless: Callable[..., tuple[bool, Any]] | None = method.homeagent_unless  # type: ignore[attr-defined]  # see `writing()`

    @clears_locals
    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        database: AutocommitReads = self._unit
        if unless is not None:
            known, answer = unless(self, *arguments, **named)
            if known:
                return answer
            if answer is not None:
                return database.runner.run(lambda unit: answer(kind(unit)))
        run = database.run_once if _have_stream(*arguments, *named.values()) else database.runner.run
        return run(lambda unit: method(kind(unit), *arguments, **named))

    return call


# Methods of the application's stores. At first, homeagent calls a method without a unit. A method that writes, or sends
# several statements, needs a unit. An error stops such a method. Then homeagent calls the method again in a unit.


class _NeedsUnitError(BaseException):
    """Stops a store's method that needs a unit. With `writes=False`, the method needs a read-only unit."""

    def __init__(self, *, writes: bool) -> None:
        self.writes = writes


class _Reads:
    """A stand-in for the unit, only for reads. The argument `allowed=` is the maximum number of statements."""

    def __init__(self, unit: AutocommitReads | UnitOfWork, allowed: int | None) -> None:
        self._unit = unit
        self._allowed = allowed
        self.is_over = False
        self.needed: _NeedsUnitError | None = None
        self.now = unit.now

    def one(self, statement: Statement[R], /, **parameters: Any) -> R | None:
        self._check(statement)
        return self._unit.one(statement, **parameters)

    def all(self, statement: Statement[R], /, **parameters: Any) -> list[R]:
        self._check(statement)
        return self._unit.all(statement, **parameters)

    def _check(self, statement: Statement[Any]) -> None:
        """Count the statement. Raise an error if the call has ended or needs a unit."""
        self._refuse_ended()
        if not isinstance(statement, Statement):
            raise no_statement(statement)
        if not statement.only_reads:
            raise self._need(writes=True)
        if self._allowed == 0:
            raise self._need(writes=False)
        if self._allowed is not None:
            self._allowed -= 1

    def _refuse_ended(self) -> None:
        """Raise UnitStateError if the call has ended."""
        if self.is_over:
            raise UnitStateError("the call of the store's method has ended: return the rows, not a generator")

    def _need(self, *, writes: bool) -> _NeedsUnitError:
        """Return the error that asks for a unit of work. The caller must raise the error."""
        # Also store the error, because the store's method can suppress the raised error.
        self.needed = _NeedsUnitError(writes=writes)
        return self.needed

    def __getattr__(self, name: str) -> Any:
        self._refuse_ended()
        # The store's method can write by means of the attribute, so require a write unit.
        raise self._need(writes=True)


def _in_unit_if_necessary(kind: type[Store], method: Callable[..., Any]) -> Callable[..., Any]:
    @clears_locals
    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        database: AutocommitReads = self._unit

        def write(unit: UnitOfWork) -> Any:
            return method(kind(unit), *arguments, **named)

        def read(unit: AutocommitReads | UnitOfWork, allowed: int | None = None) -> Any:
            reads: Any = _Reads(unit, allowed)
            try:
                value = method(kind(reads), *arguments, **named)
            except Exception:
                if reads.needed is None:
                    raise
            finally:
                reads.is_over = True
            if reads.needed is not None:
                raise reads.needed
            return value

        if _have_stream(*arguments, *named.values()):
            return database.run_once(write)
        try:
            return read(database, 1)
        except _NeedsUnitError as needed:
            writes = needed.writes
        if not writes:
            with suppress(_NeedsUnitError):
                return database.runner.run(read, read_only=True)
        return database.runner.run(write)

    return call
