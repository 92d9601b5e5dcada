"""Equal parameters have the same canonical text, in whichever order a client writes the keys."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homeagent.canonical_json import canonical_json, fingerprint_of
from homeagent.errors import InvalidArgumentError

# RFC 8785, appendix B: the bits of a double and the text that ECMAScript gives for it, with minus zero.
NUMBERS = """
0000000000000000:0 8000000000000000:0 0000000000000001:5e-324 8000000000000001:-5e-324
7fefffffffffffff:1.7976931348623157e+308 ffefffffffffffff:-1.7976931348623157e+308 4340000000000000:9007199254740992
c340000000000000:-9007199254740992 4430000000000000:295147905179352830000 44b52d02c7e14af5:9.999999999999997e+22
44b52d02c7e14af6:1e+23 44b52d02c7e14af7:1.0000000000000001e+23 444b1ae4d6e2ef4e:999999999999999700000
444b1ae4d6e2ef4f:999999999999999900000 444b1ae4d6e2ef50:1e+21 3eb0c6f7a0b5ed8c:9.999999999999997e-7
3eb0c6f7a0b5ed8d:0.000001 41b3de4355555553:333333333.3333332 41b3de4355555554:333333333.33333325
41b3de4355555555:333333333.3333333 41b3de4355555556:333333333.3333334 41b3de4355555557:333333333.33333343
becbf647612f3696:-0.0000033333333333333333 43143ff3c1cb0959:1424953923781206.2
"""

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("pair", NUMBERS.split())
def test_number(pair: str) -> None:
    """The text of a double is the text in appendix B of RFC 8785."""
    bits, _, text = pair.partition(":")
    (number,) = struct.unpack(">d", bytes.fromhex(bits))
    assert canonical_json(number) == text.encode()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_without_json_form_are_refused(number: float) -> None:
    """If a number is NaN or infinite, `canonical_json` refuses the number (RFC 8785, section 3.2.2.3)."""
    with pytest.raises(InvalidArgumentError):
        canonical_json([number])


def test_keys_are_sorted_by_utf16_code_units() -> None:
    """The key of an emoji (two UTF-16 surrogates) sorts before U+FB33 despite its higher code point (section 3.2.3)."""
    value: Any = dict.fromkeys(["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"])
    assert list(json.loads(canonical_json(value))) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


def test_document() -> None:
    """The canonical text of the document in section 3.2.2 is the text in section 3.2.3."""
    source = r"""{
      "numbers": [333333333.33333329, 1E30, 4.50, 2e-3, 0.000000000000000000000000001],
      "string": "\u20ac$\u000F\u000aA'\u0042\u0022\u005c\\\"\/",
      "literals": [null, true, false]
    }"""
    assert canonical_json(json.loads(source)).decode() == (
        '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        '"string":"\u20ac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    )


def test_large_ids_have_different_fingerprints() -> None:
    """If two ints are the same double, their fingerprints differ: an intended difference from the RFC."""
    assert fingerprint_of(2**53) != fingerprint_of(2**53 + 1)
    assert fingerprint_of(1) == fingerprint_of(1.0)
    values: Any = (1, True, "1", [1], None, 0, False, "", [1, 2], [2, 1])
    assert len({fingerprint_of(value) for value in values}) == len(values)


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "value",
    [{1: 2}, (1, 2), {1, 2}, b"x", object(), "\ud800", {"\udfff": 1}, 10**5000, nested(100_000)],
    ids=["int key", "tuple", "set", "bytes", "object", "surrogate", "surrogate key", "endless int", "deep"],
)
def test_values_without_json_form_are_refused(value: Any) -> None:
    """If a value has no single JSON text, the error is a bad argument, and its message does not show the value."""
    with pytest.raises(InvalidArgumentError) as refusal:
        canonical_json(value)
    assert refusal.value.__cause__ is None
    assert len(str(refusal.value)) < 150


@given(JSON, st.randoms(use_true_random=False))
def test_permuted_keys_give_the_same_text(value: Any, order: random.Random) -> None:
    """If every dict's keys are permuted, the value keeps its canonical text, and the text parses to the value."""

    def permute(inner: Any) -> Any:
        if isinstance(inner, list):
            return [permute(item) for item in inner]
        if isinstance(inner, dict):
            keys = list(inner)
            order.shuffle(keys)
            return {key: permute(inner[key]) for key in keys}
        return inner

    text = canonical_json(value)
    assert canonical_json(permute(value)) == text
    # Compare as doubles: the canonical text of a whole double has no point, and JSON reads an int.
    assert json.loads(text, parse_int=float) == json.loads(json.dumps(value), parse_int=float)
