"""Canonical JSON (RFC 8785, JSON Canonicalization Scheme). Equal parameters have the same canonical text.

Unlike RFC 8785, homeagent keeps all digits of an int. Rounding could give two large ids the same text.
"""

from __future__ import annotations

import hashlib
import json
import math
from decimal import Decimal
from typing import TYPE_CHECKING

from homeagent.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pydantic import JsonValue

# Do not call `json.dumps(…, ensure_ascii=False)`, which would create an encoder for each call.
_ENCODER = json.JSONEncoder(ensure_ascii=False)


def canonical_json(value: JsonValue, what: str = "params") -> bytes:
    """Return the canonical text of a JSON value, in UTF-8. If the value is not JSON, raise InvalidArgumentError."""
    try:
        return _write(value).encode()
    except InvalidArgumentError:
        raise
    except (ValueError, RecursionError):
        pass  # do not raise here: the chained error could contain the value
    raise InvalidArgumentError(f"{what} contain a lone surrogate or an int with too many digits, or nest too deeply")


def fingerprint_of(params: JsonValue) -> str:
    """Return the SHA-256 of `canonical_json(params)`, in hexadecimal."""
    return hashlib.sha256(canonical_json(params)).hexdigest()


def _write(value: object) -> str:
    if value is None or value is True or value is False:
        return "null" if value is None else "true" if value else "false"
    if isinstance(value, str):
        return _ENCODER.encode(value)
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list):
        return f"[{','.join(map(_write, value))}]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be", "surrogatepass"))
        return "{" + ",".join(f"{_write(key)}:{_write(value[key])}" for key in keys) + "}"
    raise InvalidArgumentError(
        "params must be plain JSON: None, bool, int, float, text, lists and dicts with text keys"
    )


def _number(value: float) -> str:
    """Return the text of a double (ECMA-262, section 6.1.6.1.20, Number::toString)."""
    if not math.isfinite(value):
        raise InvalidArgumentError("params contain NaN or an infinity, which JSON can't represent")
    if value == 0:
        return "0"
    if 1e-6 <= abs(value) < 1e21:
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, _, exponent = repr(value).partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent):+d}"
