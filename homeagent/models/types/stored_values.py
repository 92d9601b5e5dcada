"""Stored values that stand for nothing: what nothing of ours has written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from homeagent.errors import CorruptDatabaseError

__all__ = ["UNREADABLE", "loaded", "unreadable"]

T = TypeVar("T")

UNREADABLE = (KeyError, OverflowError, RecursionError, ValueError)
"""What a conversion raises for a stored value that homeagent has not written. A TypeError is a mistake in the code."""


def unreadable() -> CorruptDatabaseError:
    """Return the error for such a value, which it does not show."""
    return CorruptDatabaseError(
        "a stored value is none that its column can hold: the database is damaged, restore the newest good backup"
    )


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
