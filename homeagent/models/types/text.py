"""Types for text of limited length, such as ids, labels and paths, and the column type of text."""

from __future__ import annotations

import unicodedata
from typing import Annotated

from pydantic import AfterValidator, SecretStr
from sqlalchemy import Text
from sqlalchemy.types import TypeEngine

from homeagent.errors import InvalidArgumentError

__all__ = [
    "Identifier",
    "Label",
    "OptionalLabel",
    "WorkspacePath",
    "check_identifier",
    "check_label",
    "check_new_secret",
    "check_optional_label",
    "text_column",
]

# Line and paragraph separators break a log line. Bidirectional controls make a name look like another name.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
_REFUSED_CHARACTERS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _check_text(value: str, what: str, *, characters: int, octets: int) -> str:
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be text, not {type(value).__name__}")
    if not 1 <= len(value) <= characters:
        raise InvalidArgumentError(f"{what} must have 1 to {characters} characters, and has {len(value)}")
    if not value.isprintable() and any(
        character in _REFUSED_CHARACTERS or unicodedata.category(character) in _REFUSED_CATEGORIES
        for character in value
    ):
        raise InvalidArgumentError(f"{what} has a control character or a lone surrogate: remove it")
    if not value.isascii() and len(value.encode()) > octets:
        raise InvalidArgumentError(f"{what} must be at most {octets} bytes of UTF-8")
    return value


# Cache of valid ids from recent checks. A gateway uses the same few ids again and again.
_valid: set[str] = set()
_VALID_KEPT = 8192


def check_identifier(value: str, what: str = "an id") -> str:
    """Return `value` if it is a valid id of a device, agent or session, else raise InvalidArgumentError.

    An id has 1 to 128 characters, at most 200 bytes of UTF-8 and no control character. An application may use an id as
    a file name, so an id has neither slash nor backslash, and is not `.` or `..`.
    """
    # Look up only a str, because an object of another type can be unhashable or can compare equal to a str.
    if value.__class__ is str and value in _valid:
        return value
    _check_text(value, what, characters=128, octets=200)
    if "/" in value or "\\" in value or value in {".", ".."}:
        raise InvalidArgumentError(f"{what} may become a file name: it must not have '/' or '\\', or be '.' or '..'")
    if value.__class__ is str:
        if len(_valid) >= _VALID_KEPT:
            _valid.clear()
        _valid.add(value)
    return value


def check_label(value: str, what: str = "a name") -> str:
    """Return `value` if it is a valid key, nonce, sender, channel, method or name, else raise InvalidArgumentError.

    A label has 1 to 256 characters, at most 512 bytes of UTF-8 and no control character.
    """
    if value.__class__ is str and 0 < len(value) <= 256 and value.isascii() and value.isprintable():
        return value
    return _check_text(value, what, characters=256, octets=512)


def check_optional_label(value: str | None, what: str) -> str | None:
    """Return `value` if the value is None or passes `check_label`."""
    return None if value is None else check_label(value, what)


MIN_SECRET_CHARACTERS = 8
"""Minimum length of a secret that a person chose, from NIST SP 800-63B, revision 3, section 5.1.1.2."""


def check_new_secret(secret: SecretStr) -> SecretStr:
    """Return a new secret of a device if it is a `SecretStr` and long enough, else raise InvalidArgumentError."""
    if not isinstance(secret, SecretStr):
        raise InvalidArgumentError(f"a secret must be a SecretStr, not {type(secret).__name__}")
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise InvalidArgumentError(
            f"a secret that a person chose must have at least {MIN_SECRET_CHARACTERS} characters, and this has "
            f"{len(secret)}: choose a longer one, or leave it out to get a generated secret"
        )
    return secret


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
"""The path of a directory, 1 to 4,096 bytes. homeagent stores the path and does not open the directory."""


def text_column() -> TypeEngine[str]:
    """Return the column type TEXT, which both engines compare by bytes, so that lists have the same order.

    SQLite's default collation BINARY compares UTF-8 by `memcmp`. PostgreSQL compares bytes only with the collation "C".
    """
    return Text().with_variant(Text(collation="C"), "postgresql")
