"""Errors for stored values that a column type can't convert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Column, Dialect, Table
from sqlalchemy.types import TypeDecorator

from homeagent.errors import CorruptDatabaseError

T = TypeVar("T")

UNREADABLE = (CorruptDatabaseError, KeyError, OverflowError, RecursionError, ValueError)
"""Exceptions that a column type raises for an unreadable value. A TypeError shows a bug in the code."""


def naming_column(table: Table) -> str:
    """Return the name of the column by which an error identifies a row. An error must not show a nonce or an
    idempotency key.
    """
    return "device_id" if "device_id" in table.columns else next(iter(table.primary_key.columns)).name


def problem_of_stored(column: Column[Any]) -> Callable[[Any], str | None]:
    """Return a function that checks a stored value. The function returns the problem, or None for a valid value."""
    stored: type = getattr(column.type, "impl_instance", column.type).python_type
    allowed = getattr(column.type, "allowed", None)

    def problem(value: Any) -> str | None:
        if value is None:
            return None if column.nullable else "is NULL"
        if not isinstance(value, stored):
            return f"holds a value of type {type(value).__name__}"
        if isinstance(value, str) and "\0" in value:
            return "holds a value with a NUL"
        if allowed is not None and value not in allowed:
            return f"holds a value that is neither {' nor '.join(map(str, allowed))}"
        return None

    return problem


def unreadable(
    table: Table | None = None,
    column: str | None = None,
    key: object = None,
    what: str = "holds a value that can't be read",
) -> CorruptDatabaseError:
    """Return the error for an unreadable value. The argument `key=` is the value that identifies the row (see
    `naming_column()`).
    """
    if table is None:
        place = "a stored value can't be read; 'homeagent doctor' names its row"
    else:
        row = "" if key is None else f", in the row with {naming_column(table)} {key!r}"
        place = f"{table.name}{'' if column is None else f'.{column}'} {what}{row}"
    return CorruptDatabaseError(
        f"{place}; another program wrote it, or the database is damaged: correct or delete that row, "
        "or restore the newest good backup"
    )


class StoredColumn(TypeDecorator[T]):
    """Base class of homeagent's column types, which convert values. NULL and None need no conversion.

    Generated code for a statement calls `convert_bound()` and `convert_loaded()`. Each column type sets `cache_ok`,
    because SQLAlchemy does not inherit the setting.
    """

    convert_bound: Callable[[Any], Any]
    convert_loaded: Callable[[Any], Any]
    allowed: tuple[Any, ...] | None = None
    """All values that a store writes, or None for no restriction."""

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Return the value to store."""
        return None if value is None else self.convert_bound(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> T | None:
        """Return the Python value of a stored value."""
        try:
            return None if value is None else self.convert_loaded(value)
        except UNREADABLE:
            failure = unreadable()
        # Do not raise inside the `except` block. The error's `__context__` can show the stored text.
        raise failure
