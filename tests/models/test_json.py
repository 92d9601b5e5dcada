"""Stored JSON: an accepted value is read back equal, and a value that could not be read back is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeagent.errors import InvalidArgumentError
from homeagent.models.types import MAX_JSON_BYTES, decode_json, encode_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def nested(levels: int) -> Any:
    """Return a list inside this many lists."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@given(VALUES.filter(lambda value: "\\ud" not in ascii(value)))
def test_value_is_read_back_unchanged(value: Any) -> None:
    """Types, signs, digits and the order of keys are kept, and other JSON readers return the same value."""
    text = encode_json(value)
    assert repr(decode_json(text)) == repr(json.loads(text)) == repr(value)


FAR_ENDS: list[Any] = [2**70, -0.0, 5e-324, 1e22, "\0\u2028\x7f", 10**4299, nested(250)]
REFUSED: list[Any] = [
    10**4300, [10**5000], nested(255), {1: 2}, (1,), [{1}], float("inf"), [float("nan")], "\ud800", b"x",
]  # fmt: skip


def test_extreme_values_are_read_back() -> None:
    """The largest, the smallest and the deepest value are read back too."""
    for value in FAR_ENDS:
        assert repr(decode_json(encode_json(value))) == repr(value)


def test_unreadable_values_are_refused() -> None:
    """An integer too long for Python, too deep nesting and a key that is not text raise errors with the same words."""
    for value in REFUSED:
        with pytest.raises(InvalidArgumentError, match="plain JSON"):
            encode_json(value)


def test_limit_counts_utf8_bytes() -> None:
    """The size limit counts the bytes of the stored UTF-8 text."""
    fits = "é" * (MAX_JSON_BYTES // 2 - 1)
    assert decode_json(encode_json(fits)) == fits
    with pytest.raises(InvalidArgumentError, match="at most 262,144 bytes"):
        encode_json(fits + "é")


@pytest.mark.parametrize("text", ["", "{", "[1] 2", "nul", "{'a': 1}", "NaN", "[1, -Infinity]"])
def test_invalid_stored_json_raises(text: str) -> None:
    """If another program stored a text that is not JSON, reading raises an error and does not return null."""
    with pytest.raises(ValueError, match=r"."):
        decode_json(text)
