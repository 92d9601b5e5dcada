"""Limit of the number of rows that a caller can request."""

from __future__ import annotations

from homeagent.errors import InvalidArgumentError

MAX_LIMIT = 2**31 - 1


def check_limit(value: int, what: str = "limit") -> int:
    """Return the value if it is an int from 1 to `MAX_LIMIT`. Otherwise raise InvalidArgumentError."""
    if type(value) is not int or not 1 <= value <= MAX_LIMIT:
        raise InvalidArgumentError(f"{what} must be a whole number from 1 to {MAX_LIMIT:,}")
    return value
