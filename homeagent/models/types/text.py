from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

from pydantic import AfterValidator, SecretStr, WithJsonSchema
from sqlalchemy import Text
from sqlalchemy.types import TypeEngine

from homeagent.credentials.secret_format import what_is_wrong
from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import StoredColumn

MAX_ID_BYTES = 512
"""Maximum length of device ids, agent ids, methods and names, in UTF-8 bytes."""

MAX_LABEL_BYTES = 1024
"""Maximum length of session ids, senders, channels, keys and nonces, in UTF-8 bytes.

On PostgreSQL, one entry of an index has at most 2,704 bytes. So an index must not have three columns of this length
(test_the_longest_texts_are_stored).
"""

# A line separator or paragraph separator splits a log record into two lines.
_REFUSED_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
# Bidirectional controls make a name look like another name.
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""The characters with the property Default_Ignorable_Code_Point.

Source: https://www.unicode.org/Public/UCD/latest/ucd/DerivedCoreProperties.txt.
"""

_JOINERS = frozenset("\u200c\u200d")
_EMOJI_STYLES = frozenset("\ufe0e\ufe0f")


def _check_text(value: str, what: str, octets: int) -> str:
    """Return the value if the text is valid. An empty text, a control character and a lone surrogate are invalid. The
    argument `octets=` is the maximum number of UTF-8 bytes.
    """
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be text, not {type(value).__name__}")
    # Check the number of characters first, to avoid reading a long text. Check the characters before the bytes: UTF-8
    # can't encode a lone surrogate.
    if 1 <= len(value) <= octets:
        if not value.isprintable() and any(unicodedata.category(each) in _REFUSED_CATEGORIES for each in value):
            raise InvalidArgumentError(f"{what} has a control character or a lone surrogate: remove it")
        if value.isascii() or len(value.encode()) <= octets:
            return value
    raise InvalidArgumentError(
        f"{what} must have 1 to {octets:,} bytes of UTF-8, and has {len(value.encode(errors='replace')):,}"
    )


def check_identifier(value: str, what: str = "an id", octets: int = MAX_ID_BYTES) -> str:
    """Return the value if it is a valid id. The argument `octets=` is the greatest number of bytes. The page on limits
    lists the rules.
    """
    _check_text(value, what, octets)
    # The conditions `"." in value` and `is_plain` only save time.
    if "\\" in value or ("." in value and not {".", ".."}.isdisjoint(value.split("/"))):
        raise InvalidArgumentError(f"{what} must not have a backslash, or a segment '.' or '..' between slashes")
    is_plain = value.isascii() or (value.isprintable() and not INVISIBLE.search(value))
    if not is_plain and not all(_is_visible(value, place) for place in range(len(value))):
        raise InvalidArgumentError(
            f"{what} has an invisible character, so it can look like another id: remove the character"
        )
    return value


def _is_visible(text: str, place: int) -> bool:
    """Return True if an id can contain the character `text[place]`."""
    character = text[place]
    if not INVISIBLE.match(character) and unicodedata.category(character) != "Cf":
        return True
    if character in _JOINERS:
        # Find the base character before the joiner. Skip modifiers, such as a virama or a skin tone.
        before = next((each for each in reversed(text[:place]) if not _is_modifier(each)), "")
        return _is_letter_or_emoji(before) and _is_letter_or_emoji(text[place + 1 : place + 2])
    return character in _EMOJI_STYLES and place > 0 and _is_emoji(text[place - 1])


def _is_modifier(character: str) -> bool:
    return unicodedata.category(character).startswith("M") or "\U0001f3fb" <= character <= "\U0001f3ff"


def _is_emoji(character: str) -> bool:
    """Return True for the Unicode category So and for U+2194."""
    # The emoji U+2194 has the Unicode category Sm.
    return character == "\u2194" or unicodedata.category(character) == "So"


def _is_letter_or_emoji(character: str) -> bool:
    return character != "" and (unicodedata.category(character).startswith("L") or _is_emoji(character))


def check_label(value: str, what: str = "a label") -> str:
    """Check a new key, nonce, sender or channel, and return the value. Allow invisible characters: a copied telephone
    number can contain bidirectional marks.
    """
    return _check_text(value, what, MAX_LABEL_BYTES)


def check_optional_label(value: str | None, what: str) -> str | None:
    """Return the value if it is None or passes `check_label()`."""
    return None if value is None else check_label(value, what)


def check_name(value: str, what: str = "a name") -> str:
    """Return the value if it is a valid method, name, reason or hash. Otherwise raise InvalidArgumentError."""
    _check_text(value, what, MAX_ID_BYTES)
    if not value.isascii() and not _BIDIRECTIONAL.isdisjoint(value):
        raise InvalidArgumentError(f"{what} has a bidirectional control character: remove it")
    return value


def check_searched(value: str, what: str) -> str:
    """Return the value if it is a str. An old row can contain a text that is no longer valid."""
    if not isinstance(value, str):
        raise InvalidArgumentError(f"{what} must be text, not {type(value).__name__}")
    return value


MIN_SECRET_CHARACTERS = 8
"""Minimum length of a secret that a person chose, from NIST SP 800-63B, revision 3, section 5.1.1.2."""


def check_new_secret(secret: SecretStr) -> SecretStr:
    """Return the value if it is a SecretStr that is long enough and usable. An error does not show the secret."""
    if not isinstance(secret, SecretStr):
        raise InvalidArgumentError(f"a secret must be a SecretStr, not {type(secret).__name__}")
    if len(secret) < MIN_SECRET_CHARACTERS:
        raise InvalidArgumentError(
            f"a secret that a person chose must have at least {MIN_SECRET_CHARACTERS} characters, and this has "
            f"{len(secret)}: choose a longer one, or leave it out to get a generated secret"
        )
    # Do not keep the secret's text in a local variable, which the error's traceback would show.
    problem = what_is_wrong(secret.get_secret_value())
    if problem is not None:
        raise InvalidArgumentError(problem)
    return secret


def _described(octets: int, *, refused: str = "") -> WithJsonSchema:
    """Return the JSON schema of a text. JSON Schema can't express a length in bytes."""
    pattern = f"^[^\\u0000-\\u001f\\u007f-\\u009f\\u2028\\u2029{refused}]*$"
    return WithJsonSchema({"type": "string", "minLength": 1, "maxLength": octets, "pattern": pattern})


_ID = r"\\"  # An id contains no backslash.
_NAME = r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # Bidirectional controls of Unicode.

Identifier = Annotated[str, AfterValidator(check_identifier), _described(MAX_ID_BYTES, refused=_ID)]

SessionId = Annotated[
    str, AfterValidator(partial(check_identifier, octets=MAX_LABEL_BYTES)), _described(MAX_LABEL_BYTES, refused=_ID)
]

Label = Annotated[str, AfterValidator(check_label), _described(MAX_LABEL_BYTES)]
"""A key, nonce, sender or channel."""

Name = Annotated[str, AfterValidator(check_name), _described(MAX_ID_BYTES, refused=_NAME)]
"""A method, name, reason or hash."""

WorkspacePath = Annotated[
    str, AfterValidator(partial(_check_text, what="a workspace path", octets=4096)), _described(4096)
]


def text_column() -> TypeEngine[str]:
    """Return a column type for text that both engines compare by bytes. On PostgreSQL, the column has the collation
    "C".
    """
    return Text().with_variant(Text(collation="C"), "postgresql")


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a hash is stored as text")
    return value


class HashColumn(StoredColumn[str]):
    """Column type for the text of a hash, a verifier or a key. A stored BLOB counts as unreadable."""

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = text_column()
    cache_ok: bool | None = True
    # For an enum that is a str, `str()` would return the name of the member.
    convert_bound: Callable[[Any], Any] = staticmethod(str.__str__)
    convert_loaded: Callable[[Any], Any] = staticmethod(_require_text)
