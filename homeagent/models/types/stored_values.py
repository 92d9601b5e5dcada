"""Stored values that stand for nothing: what nothing of ours has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import Table

from homeagent.errors import CorruptDatabaseError

__all__ = ["UNREADABLE", "loaded", "naming_column", "unreadable", "unreadable_in"]

T = TypeVar("T")

UNREADABLE = (CorruptDatabaseError, KeyError, OverflowError, RecursionError, ValueError)
"""What a conversion raises for a stored value that homeagent has not written. A TypeError is a mistake in the code."""

_REMEDY = (
    "another program wrote it, or the database is damaged: "
    "correct or delete that row, or restore the newest good backup"
)


def naming_column(table: Table) -> str:
    """Return the column whose value names a row in an error: its key, but the device of a nonce or idempotency key.

    Nonces and idempotency keys are secret.
    """
    return "device_id" if "device_id" in table.columns else next(iter(table.primary_key.columns)).name


def unreadable() -> CorruptDatabaseError:
    """Return the error for a stored value that can't be read, if it is not known in which row it is."""
    return CorruptDatabaseError(f"a stored value can't be read; 'homeagent doctor' names its row; {_REMEDY}")


def unreadable_in(
    table: Table, column: str | None, key: object, what: str = "holds a value that can't be read"
) -> CorruptDatabaseError:
    """Return the error for a stored value that can't be read, which the error does not show.

    Args:
        table: the table.
        column: the column that holds the value; None if it is not known.
        key: the value of `naming_column` in the same row; None if it is not known.
        what: what is wrong with the value.
    """
    row = "" if key is None else f", in the row with {naming_column(table)} {key!r}"
    return CorruptDatabaseError(f"{table.name}{'' if column is None else f'.{column}'} {what}{row}; {_REMEDY}")


def loaded(convert: Callable[[Any], T], value: Any) -> T:
    """Return a stored value as what it stands for.

    Raises:
        CorruptDatabaseError: it stands for nothing.
    """
    try:
        return convert(value)
    except UNREADABLE:
        # Not chained: json's error holds the text.
        raise unreadable() from None
