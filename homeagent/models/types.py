"""Field types of the models: bounded text, instants, durations and JSON, each with its column type.

What a field accepts is decided here once, and used by the models when they validate and by the stores when an
argument comes in by itself, so that a bad id is refused alike at every door.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, JsonValue, TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from sqlalchemy import BigInteger, Dialect, Integer, Text
from sqlalchemy.types import TypeDecorator, TypeEngine

from homeagent.errors import CorruptDatabaseError, InvalidArgumentError

__all__ = [
    "EPOCH",
    "MILLISECOND",
    "UNREADABLE",
    "Flag",
    "Identifier",
    "Instant",
    "InstantColumn",
    "Json",
    "JsonColumn",
    "Label",
    "OptionalLabel",
    "Word",
    "WorkspacePath",
    "check_duration",
    "check_identifier",
    "check_instant",
    "check_label",
    "check_limit",
    "check_optional_label",
    "decode_json",
    "encode_json",
    "loaded",
    "text_column",
    "to_milliseconds",
    "unreadable",
]

T = TypeVar("T")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND = timedelta(milliseconds=1)

_ZERO = timedelta(0)
_INSTANTS_KEPT = 8192
# Taking one of these off is four times as fast as `replace(microsecond=…)`, and the clock is floored in every unit.
_MICROSECONDS = tuple(timedelta(microseconds=excess) for excess in range(1000))

# Python may refuse to read an integer of more digits than that: sys.set_int_max_str_digits.
_READABLE_DIGITS = sys.int_info.str_digits_check_threshold

MAX_JSON_BYTES = 256 * 1024
MAX_LIMIT = 2**31 - 1

# Line and paragraph separators break a log line as a newline does; bidirectional controls make a name read as another.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_REFUSED_CHARACTERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# Text


def _check_text(value: str, what: str, *, characters: int, octets: int) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be text, not {type(value).__name__}")
    if not 1 <= len(value) <= characters:
        raise InvalidArgumentError(f"{what} must have 1 to {characters} characters, and has {len(value)}")
    if not value.isprintable() and any(
        character in _REFUSED_CHARACTERS or unicodedata.category(character) in _REFUSED_CATEGORIES
        for character in value
    ):
        raise InvalidArgumentError(f"{what} has a control character or a lone surrogate: take it out")
    if not value.isascii() and len(value.encode()) > octets:
        raise InvalidArgumentError(f"{what} must be at most {octets} bytes of UTF-8")
    return value


# A gateway names the same few ids again and again: remembering the good ones makes a check a dictionary look-up.
@lru_cache(maxsize=8192, typed=True)
def check_identifier(value: str, what: str = "an id") -> str:
    """Return `value` if it may be the id of a device, agent or session.

    Such an id may end up in a file name: 1 to 128 characters and at most 200 bytes of UTF-8, no control character,
    neither slash nor backslash, and not `.` or `..`.

    Raises:
        InvalidArgumentError: it may not.
    """
    _check_text(value, what, characters=128, octets=200)
    if "/" in value or "\\" in value or value in {".", ".."}:
        raise InvalidArgumentError(f"{what} may end up in a file name: no '/', no '\\', and not '.' or '..'")
    return value


def check_label(value: str, what: str = "a name") -> str:
    """Return `value` if it may be a key, nonce, sender, channel, method or name.

    1 to 256 characters and at most 512 bytes of UTF-8, anything printable.

    Raises:
        InvalidArgumentError: it may not.
    """
    if value.__class__ is str and 0 < len(value) <= 256 and value.isascii() and value.isprintable():
        return value
    return _check_text(value, what, characters=256, octets=512)


def check_optional_label(value: str | None, what: str) -> str | None:
    """Return `value` if it is None or may be a label (`check_label`)."""
    return None if value is None else check_label(value, what)


def _check_path(value: str) -> str:
    return _check_text(value, "a workspace path", characters=4096, octets=4096)


def _as_identifier(value: str) -> str:
    return check_identifier(value)


def _as_label(value: str) -> str:
    return check_label(value)


Identifier = Annotated[str, AfterValidator(_as_identifier)]
"""The id of a device, agent or session: see `check_identifier`."""

Label = Annotated[str, AfterValidator(_as_label)]
"""A key, nonce, sender, channel, method or name: see `check_label`."""

OptionalLabel = Label | None

WorkspacePath = Annotated[str, AfterValidator(_check_path)]
"""A directory on the owner's machine, 1 to 4,096 bytes. It is stored as it is given, and never opened."""


def text_column() -> TypeEngine[str]:
    """Return the column type of text: TEXT, compared by bytes on every engine.

    SQLite's default collation BINARY compares UTF-8 by `memcmp`; PostgreSQL does the same only under "C". With one
    order on both, a page of a list is the same page.
    """
    return Text().with_variant(Text(collation="C"), "postgresql")


# Instants and durations


def check_instant(value: datetime, what: str = "an instant") -> datetime:
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


def later(instant: datetime, duration: timedelta, what: str) -> datetime:
    """Return `instant + duration`, floored to whole milliseconds.

    Raises:
        InvalidArgumentError: the sum lies after the year 9999.
    """
    try:
        return check_instant(instant + duration)
    except OverflowError:
        raise InvalidArgumentError(f"{what} reaches past the year 9999") from None


def to_milliseconds(value: datetime) -> int:
    """Return the whole milliseconds from the epoch to `value`, floored; negative before 1970. Never through floats."""
    return (value - EPOCH) // MILLISECOND


def _as_instant(value: datetime) -> datetime:
    return check_instant(value)


def _no_bare_number(value: object) -> object:
    # Pydantic would take a number for seconds or milliseconds since the epoch, guessing by its size.
    if isinstance(value, (int, float)):
        raise ValueError("must be an aware datetime or its ISO 8601 text, not a number")
    return value


Instant = Annotated[datetime, BeforeValidator(_no_bare_number), AfterValidator(_as_instant)]
"""An aware datetime, held in UTC and floored to milliseconds. A naive one is refused."""


UNREADABLE = (KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What a conversion raises for a stored value that nothing of ours has written."""


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


class _Instants(dict[int, datetime]):
    """The instants that were loaded last, by their milliseconds, for the pages of rows that are read again and again.

    A hit takes a fifth of the time of making one, and less than any call; a miss takes twice as long.
    """

    def __missing__(self, milliseconds: int) -> datetime:
        if len(self) >= _INSTANTS_KEPT:
            self.clear()
        instant = self[milliseconds] = EPOCH + milliseconds * MILLISECOND
        return instant


class InstantColumn(TypeDecorator[datetime]):
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
        return EPOCH + value * MILLISECOND

    loaded_values = _Instants()


# JSON


# The core's own: what a TypeAdapter adds to each call takes longer than a small value.
_check_json = TypeAdapter(JsonValue, config=ConfigDict(allow_inf_nan=False)).validator.validate_python


def encode_json(value: JsonValue, what: str = "JSON") -> str:
    """Return `value` as JSON text: key order, numbers and Unicode as they are.

    Raises:
        InvalidArgumentError: it is no JSON value (a set, a key that is not text, NaN, a lone surrogate, itself
            inside itself), or its text is over 256 KiB.
    """
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    try:
        # Without this, the key 1 would be written as "1" and a tuple as a list: what is read back would differ.
        _check_json(value, strict=True)
        encoded = to_json(value)
        if len(encoded) > _READABLE_DIGITS:
            json.loads(encoded)
    except (ValidationError, ValueError, TypeError, RecursionError):
        # Not chained: the cause would show the value, which may be a secret.
        raise InvalidArgumentError(
            f"{what} must be plain JSON: None, bool, int, finite float, text, lists and dicts with text keys"
        ) from None
    if len(encoded) > MAX_JSON_BYTES:
        raise InvalidArgumentError(f"{what} must be at most {MAX_JSON_BYTES:,} bytes of JSON, and has {len(encoded):,}")
    return encoded.decode()


def decode_json(text: str) -> Any:
    """Return the value of JSON text.

    Raises:
        ValueError: it is no JSON text.
    """
    try:
        return from_json(text, cache_strings="keys")
    except ValueError:
        # It reads no value of more than 200 levels, and `encode_json` takes 254.
        return json.loads(text)


def _as_json(value: JsonValue) -> JsonValue:
    if value is not None:
        encode_json(value)
    return value


Json = Annotated[JsonValue, AfterValidator(_as_json)]
"""Any JSON value of at most 256 KiB of text."""


class JsonColumn(TypeDecorator[Any]):
    """JSON as text on every engine, so that key order, -0.0, large integers and NUL survive.

    Args:
        none_as_null: whether None is SQL NULL, or the JSON text `null`.
    """

    impl = Text
    cache_ok = True

    def __init__(self, *, none_as_null: bool = True) -> None:
        super().__init__()
        self.none_as_null = none_as_null

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text to store."""
        return None if value is None and self.none_as_null else encode_json(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        """Return the value that this text stands for."""
        return None if value is None else loaded(self.convert_loaded, value)

    convert_loaded = staticmethod(decode_json)


# Small closed types


class Word(TypeDecorator[StrEnum]):
    """A member of a StrEnum as the text of its value; a plain Enum column would hold the member's name.

    Args:
        kind: the StrEnum. A stored text that is none of its values is refused, though the CHECK keeps it out.
    """

    impl = Text
    cache_ok = True

    def __init__(self, kind: type[StrEnum]) -> None:
        super().__init__()
        self.kind = kind
        self.loaded_values = {member.value: member for member in kind}
        # A member equals its text, and finds it here.
        self.convert_bound = {member.value: member.value for member in kind}.__getitem__

    def process_bind_param(self, value: StrEnum | None, dialect: Dialect) -> str | None:
        """Return the member's value."""
        return None if value is None else self.kind(value).value

    def process_result_value(self, value: str | None, dialect: Dialect) -> StrEnum | None:
        """Return the member that has this value."""
        return None if value is None else loaded(self.loaded_values.__getitem__, value)


class Flag(TypeDecorator[bool]):
    """A bool as INTEGER 0 or 1; a plain bool column would be declared BOOLEAN."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: bool | None, dialect: Dialect) -> int | None:
        """Return 1 or 0."""
        return None if value is None else int(value)

    def process_result_value(self, value: int | None, dialect: Dialect) -> bool | None:
        """Return whether it is not 0."""
        return None if value is None else value != 0

    convert_bound = int
    convert_loaded = bool


def check_limit(value: int, what: str = "limit") -> int:
    """Return `value` if it is a number of rows to ask for, 1 or more.

    Raises:
        InvalidArgumentError: it is not.
    """
    if type(value) is not int or not 1 <= value <= MAX_LIMIT:
        raise InvalidArgumentError(f"{what} must be a whole number from 1 to {MAX_LIMIT:,}")
    return value
