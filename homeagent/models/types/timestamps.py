"""Instants and durations: whole milliseconds, in UTC, never through floats."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from sqlalchemy import BigInteger, Dialect, Integer
from sqlalchemy.types import TypeDecorator, TypeEngine

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import loaded

__all__ = [
    "EPOCH",
    "LONGEST_WAIT",
    "MILLISECOND",
    "Timestamp",
    "TimestampColumn",
    "check_duration",
    "check_timestamp",
    "check_wait",
    "earlier",
    "later",
    "not_after",
    "to_milliseconds",
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)

LONGEST_WAIT = timedelta(milliseconds=2**31 - 1)
"""How long anything waits at most, nearly 25 days: both engines count it in 32 bits, and locks have a bound too."""

_ZERO = timedelta(0)
_FIRST_INSTANT = datetime.min.replace(tzinfo=UTC)
_INSTANTS_KEPT = 8192
# Taking one of these off is four times as fast as `replace(microsecond=…)`, and the clock is floored in every unit.
_MICROSECONDS = tuple(timedelta(microseconds=excess) for excess in range(1000))


def check_timestamp(value: datetime, what: str = "an instant") -> datetime:
    """Return `value` in UTC, floored to whole milliseconds.

    Raises:
        InvalidArgumentError: it has no time zone, or lies outside the years 1 to 9999 in UTC.
    """
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
    """Return `value` in UTC, floored to whole milliseconds, or `now` if `value` is None or later than `now`.

    Something that has happened can't lie in the future: the clock of the caller is ahead.

    Raises:
        InvalidArgumentError: as in `check_timestamp`.
    """
    return now if value is None else min(check_timestamp(value, what), now)


def check_duration(value: timedelta, what: str, *, zero: bool = False) -> timedelta:
    """Return `value` if it is a duration above zero, or zero itself where `zero` allows that.

    Raises:
        InvalidArgumentError: it is not.
    """
    if not isinstance(value, timedelta):
        raise InvalidArgumentError(f"{what} must be a timedelta, not {type(value).__name__}")
    if value < _ZERO or (not zero and value < MILLISECOND):
        raise InvalidArgumentError(f"{what} must be {'zero or more' if zero else 'a millisecond or more'}")
    return value


def check_wait(value: timedelta, what: str, *, zero: bool = False) -> timedelta:
    """Return for how long to wait: `value`, and `LONGEST_WAIT` where that is shorter.

    Raises:
        InvalidArgumentError: as in `check_duration`.
    """
    return min(check_duration(value, what, zero=zero), LONGEST_WAIT)


def later(instant: datetime, duration: timedelta, what: str) -> datetime:
    """Return `instant + duration`, floored to whole milliseconds.

    Raises:
        InvalidArgumentError: the sum lies after the year 9999.
    """
    try:
        return check_timestamp(instant + duration)
    except OverflowError:
        raise InvalidArgumentError(f"{what} reaches past the year 9999") from None


def earlier(instant: datetime, duration: timedelta) -> datetime:
    """Return `instant - duration`; the first instant of the year 1 where that lies before it."""
    try:
        return instant - duration
    except OverflowError:
        return _FIRST_INSTANT


def to_milliseconds(value: datetime) -> int:
    """Return the whole milliseconds from the epoch to `value`, floored; negative before 1970. Never through floats."""
    return (value - EPOCH) // MILLISECOND


def _as_timestamp(value: datetime) -> datetime:
    return check_timestamp(value)


def _no_bare_number(value: object) -> object:
    # Pydantic would take a number for seconds or milliseconds since the epoch, guessing by its size.
    if isinstance(value, (int, float)):
        raise ValueError("must be an aware datetime or its ISO 8601 text, not a number")
    return value


Timestamp = Annotated[datetime, BeforeValidator(_no_bare_number), AfterValidator(_as_timestamp)]
"""An aware datetime, held in UTC and floored to milliseconds. A naive one is refused."""


def _timestamp_of(milliseconds: float) -> datetime:
    """Return the timestamp of a stored value, which is a text or a BLOB if another program wrote it."""
    if not isinstance(milliseconds, (int, float)):
        raise ValueError("a timestamp is stored as a number")
    return EPOCH + milliseconds * MILLISECOND


class _Timestamps(dict[int, datetime]):
    """The instants that were loaded last, by their milliseconds, for the pages of rows that are read again and again.

    A hit takes a fifth of the time of making one, and less than any call; a miss takes twice as long.
    """

    def __missing__(self, milliseconds: int) -> datetime:
        if len(self) >= _INSTANTS_KEPT:
            self.clear()
        instant = self[milliseconds] = _timestamp_of(milliseconds)
        return instant


class TimestampColumn(TypeDecorator[datetime]):
    """An instant as whole milliseconds since the epoch: INTEGER on SQLite, BIGINT on PostgreSQL."""

    impl = BigInteger
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        """Return the engine's own integer of 64 bits."""
        return dialect.type_descriptor(Integer() if dialect.name == "sqlite" else BigInteger())

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Return the milliseconds of an aware datetime."""
        return None if value is None else self.convert_bound(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Return the instant of these milliseconds, in UTC."""
        return None if value is None else loaded(self.convert_loaded, value)

    # What generated code uses, past SQLAlchemy's layers, the last one for many rows; none is given None.

    @staticmethod
    def convert_bound(value: datetime) -> int:
        """Return the milliseconds of an aware datetime, floored."""
        since = value - EPOCH
        return since.days * 86_400_000 + since.seconds * 1000 + since.microseconds // 1000

    @staticmethod
    def convert_loaded(value: int) -> datetime:
        """Return the instant of these milliseconds, in UTC."""
        return _timestamp_of(value)

    loaded_values = _Timestamps()
