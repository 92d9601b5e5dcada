"""Timestamps and durations. Timestamps are in UTC and are rounded down to milliseconds. Do not compute with floats,
because floats are rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from sqlalchemy import BigInteger, Integer
from sqlalchemy.types import TypeEngine

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import StoredColumn

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)
_ZERO = timedelta(0)

LONGEST_WAIT = timedelta(milliseconds=2**31 - 1)
"""Maximum wait of nearly 25 days. Both engines store the milliseconds in 32 bits."""

_EARLIEST = datetime.min.replace(tzinfo=UTC)
# Create the durations once, because each unit of work calls `check_timestamp()`.
_MICROSECONDS = tuple(timedelta(microseconds=excess) for excess in range(1000))


def check_timestamp(value: datetime, what: str = "a timestamp") -> datetime:
    """Return the value in UTC, floored to milliseconds. Raise InvalidArgumentError if the value has no time zone."""
    if not isinstance(value, datetime):
        raise InvalidArgumentError(f"{what} must be a datetime, not {type(value).__name__}")
    if value.tzinfo is not UTC:
        if value.utcoffset() is None:
            raise InvalidArgumentError(f"{what} must be aware: give it a time zone, as in datetime.now(UTC)")
        try:
            value = value.astimezone(UTC)
        except OverflowError:
            raise InvalidArgumentError(f"{what} lies outside the years 1 to 9999") from None
    excess = value.microsecond % 1000
    return value - _MICROSECONDS[excess] if excess else value


def not_after(now: datetime, value: datetime | None, what: str) -> datetime:
    """Return the time of an event. If the time is None or in the future, return `now`."""
    return now if value is None else min(check_timestamp(value, what), now)


def check_duration(value: timedelta, what: str, *, zero: bool = False) -> timedelta:
    """Return the value if it is at least a millisecond. With `zero=True`, the minimum is zero."""
    if not isinstance(value, timedelta):
        raise InvalidArgumentError(f"{what} must be a timedelta, not {type(value).__name__}")
    if value < (_ZERO if zero else MILLISECOND):
        raise InvalidArgumentError(f"{what} must be {'zero or more' if zero else 'a millisecond or more'}")
    return value


def check_wait(value: timedelta, what: str, *, zero: bool = False) -> timedelta:
    """Check the duration. Return the smaller of the duration and `LONGEST_WAIT`."""
    return min(check_duration(value, what, zero=zero), LONGEST_WAIT)


def later(timestamp: datetime, duration: timedelta, what: str) -> datetime:
    """Return `timestamp + duration`, floored to milliseconds. If the sum is after the year 9999, raise
    InvalidArgumentError.
    """
    try:
        return check_timestamp(timestamp + duration)
    except OverflowError:
        raise InvalidArgumentError(f"{what} reaches past the year 9999") from None


def earlier(timestamp: datetime, duration: timedelta) -> datetime:
    """Return `timestamp - duration`, but at least the start of year 1."""
    try:
        return timestamp - duration
    except OverflowError:
        return _EARLIEST


def to_milliseconds(value: datetime) -> int:
    """Return the number of milliseconds from 1970 to `value`, rounded down."""
    return (value - EPOCH) // MILLISECOND


def _refuse_number(value: Any) -> Any:
    # Refuse numbers, also as text, because Pydantic guesses seconds or milliseconds.
    if isinstance(value, datetime):
        return value
    try:
        float(value)
    except OverflowError:
        pass  # an integer of more than 308 digits
    except (TypeError, ValueError):
        return value
    raise ValueError("must be an aware datetime or its ISO 8601 text, not a number")


TIMESTAMP_CHECK = AfterValidator(check_timestamp)
"""Validator that distinguishes `Timestamp` from a plain datetime."""

Timestamp = Annotated[datetime, BeforeValidator(_refuse_number), TIMESTAMP_CHECK]
"""Field type for an aware datetime, converted to UTC and floored to milliseconds. A naive datetime and a number are
invalid, also as text.

In a `Table`, the column stores whole milliseconds since 1970. The column type is INTEGER on SQLite and BIGINT on
PostgreSQL.
"""


def from_milliseconds(milliseconds: float) -> datetime:
    """Return the timestamp of a stored number. If the stored value is not a number, raise ValueError."""
    if not isinstance(milliseconds, (int, float)):
        raise ValueError("a timestamp is stored as a number")
    return EPOCH + milliseconds * MILLISECOND


class TimestampColumn(StoredColumn[datetime]):
    """Column type for a timestamp in milliseconds since 1970."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = BigInteger().with_variant(Integer(), "sqlite")
    cache_ok: bool | None = True
    # A look-up in the cache is faster than creating a timestamp.
    convert_loaded: Callable[[Any], Any] = staticmethod(lru_cache(8192)(from_milliseconds))

    @staticmethod
    def convert_bound(value: datetime) -> int:
        """Return the milliseconds of an aware datetime, floored."""
        # Do not call `check_timestamp()` for each value: the conversion would take 40% longer.
        if value.__class__ is not datetime or value.tzinfo is not UTC:
            value = check_timestamp(value)
        since = value - EPOCH
        return since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000
