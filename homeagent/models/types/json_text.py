"""JSON values and their stored text."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, JsonValue
from pydantic_core import from_json, to_json
from sqlalchemy import Dialect, Text
from sqlalchemy.types import TypeEngine

from homeagent.errors import InvalidArgumentError
from homeagent.models.types.stored_values import StoredColumn

MAX_JSON_BYTES = 256 * 1024
"""Maximum length of the JSON text of a configuration and of metadata."""

MAX_PAIRING_JSON_BYTES = 16 * 1024
"""Maximum length of a pairing request's metadata, which a stranger can send."""

MAX_RESULT_BYTES = 1024 * 1024
"""Maximum length of the JSON text of a result."""

# Python can refuse an integer with more than `_READABLE_DIGITS` digits (see `sys.set_int_max_str_digits()`).
_READABLE_DIGITS = sys.int_info.str_digits_check_threshold


def encode_json(value: JsonValue, what: str = "JSON", *, limit: int = MAX_JSON_BYTES) -> str:
    """Return the value as JSON text. Raise InvalidArgumentError if the text is longer than `limit` bytes. Raise
    InvalidArgumentError if JSON can't represent the value exactly.
    """
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    try:
        encoded = to_json(value, inf_nan_mode="null")
        # Compare the decoded text with the value: `to_json()` turns tuples into lists. Pydantic's validator would take
        # three times as long.
        decoded = json.loads(encoded) if len(encoded) > _READABLE_DIGITS else decode_json(encoded)
        is_json = bool(value == decoded)
    except (ValueError, RecursionError):
        is_json = False
    if not is_json:
        # Do not raise inside the `except` block. The error's `__context__` would show the value.
        raise InvalidArgumentError(
            f"{what} must be plain JSON: None, bool, int, finite float, text, lists and dicts with text keys"
        )
    if len(encoded) > limit:
        raise InvalidArgumentError(f"{what} must be at most {limit:,} bytes of JSON, and has {len(encoded):,}")
    return encoded.decode()


def decode_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. If the text is not JSON, raise ValueError."""
    if not isinstance(text, (str, bytes)):
        raise ValueError("JSON is stored as text")
    try:
        return from_json(text, allow_inf_nan=False, cache_strings="keys")
    except ValueError:
        # For more than 200 nested levels, `from_json()` raises ValueError.
        return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"JSON has no {name}")


def _within(limit: int) -> AfterValidator:
    def check(value: JsonValue) -> JsonValue:
        if value is not None:
            encode_json(value, limit=limit)
        return value

    return AfterValidator(check)


Json = Annotated[JsonValue, _within(MAX_JSON_BYTES)]
"""A JSON value with at most 256 KiB of text."""

PairingJson = Annotated[JsonValue, _within(MAX_PAIRING_JSON_BYTES)]
"""A JSON value with at most 16 KiB of text."""

ResultJson = Annotated[JsonValue, _within(MAX_RESULT_BYTES)]
"""A JSON value with at most 1 MiB of text."""


class JsonColumn(StoredColumn[Any]):
    """Column type for JSON, stored as text. A database's JSON type can change key order or large integers. With
    `none_as_null=False`, None is stored as the JSON text `null`.
    """

    impl: TypeEngine[Any] | type[TypeEngine[Any]] = Text
    cache_ok: bool | None = True
    convert_loaded: Callable[[Any], Any] = staticmethod(decode_json)

    def __init__(self, *, none_as_null: bool = True, limit: int = MAX_JSON_BYTES) -> None:
        super().__init__()
        self.none_as_null = none_as_null
        self.limit = limit

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        """Return the text to store."""
        return None if value is None and self.none_as_null else encode_json(value, limit=self.limit)
