"""Stores that belong to a database, such as `database.devices`. Each method call is a separate unit of work.

A method with the decorator `reading` runs its statement in autocommit mode, without BEGIN and COMMIT. A method with the
decorator `writing` goes through `Runner.run`, with batches and retries.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from functools import cache, wraps
from typing import Any, TypeVar

from homeagent.engine.statements import Statement
from homeagent.errors import HomeAgentError
from homeagent.frame_locals import clear_locals, clears_locals
from homeagent.retry import Runner
from homeagent.stores.store import Access, Store, access_of
from homeagent.unit_settings import UnitSettings, read_clock

__all__ = ["one_call_store"]

R = TypeVar("R")
S = TypeVar("S", bound=Store)


def one_call_store(kind: type[S], settings: UnitSettings, runner: Runner) -> S:
    """Return a store of the class `kind`. The store is bound to a database, not to a unit."""
    store: S = _one_call_type(kind)(AutocommitReads(settings, runner))  # type: ignore[arg-type]  # a class is hashable
    return store


class AutocommitReads:
    """A replacement for the unit in a one-call store. Each read is one statement in autocommit mode, without a lock."""

    def __init__(self, settings: UnitSettings, runner: Runner) -> None:
        self.settings = settings
        self.runner = runner

    def one(self, statement: Statement[R], **parameters: Any) -> R | None:
        """Run a statement, and return the object of the first row. Return None if there is no row."""
        settings = self.settings
        try:
            return settings.engine.read_alone("one", statement, parameters, settings.timeout)  # type: ignore[no-any-return]
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise

    def all(self, statement: Statement[R], **parameters: Any) -> list[R]:
        """Run a statement, and return the objects of all rows."""
        settings = self.settings
        try:
            return settings.engine.read_alone("all", statement, parameters, settings.timeout)  # type: ignore[no-any-return]
        except HomeAgentError as error:
            del parameters
            clear_locals(error)
            raise

    def now(self) -> datetime:
        """Return the time of the clock, as a timestamp in UTC, floored to milliseconds."""
        return read_clock(self.settings.clock)


@cache
def _one_call_type(kind: type[Store]) -> Any:
    """Return a subclass of a store. In the subclass, each writing method runs in a new unit of work.

    The reading methods are inherited.
    """
    methods: dict[str, Any] = {"__slots__": ()}
    for name in dir(kind):
        method = getattr(kind, name)
        access = access_of(method)
        if access is not None and access.kind is not Access.Kind.READ:
            methods[name] = _in_own_unit(kind, method, access)
    return type(kind.__name__, (kind,), methods)


def _in_own_unit(kind: type[Store], method: Callable[..., Any], access: Access) -> Callable[..., Any]:
    @clears_locals
    @wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        database: AutocommitReads = self._unit
        if access.kind is Access.Kind.STREAM:
            # Do not run this unit again after an error, because an iterable can be read only once.
            with database.settings.unit(database.settings, read_only=False) as unit:
                return method(kind(unit), *arguments, **named)
        if access.unless is not None:
            known, answer = access.unless(self, *arguments, **named)
            if known:
                return answer
        return database.runner.run(lambda unit: method(kind(unit), *arguments, **named))

    return call
