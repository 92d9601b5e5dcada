"""Messages of the handshake: JSON objects of limited size."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from homeagent.errors import HandshakeError
from homeagent.models.types import check_duration, from_milliseconds, to_milliseconds

MAX_MESSAGE = 8_192
"""Maximum size of a message in bytes. The web server needs a separate limit for buffered bytes."""

Send = Callable[[str], Awaitable[Any]]
"""Function that sends a text frame, such as `websocket.send_text` of Starlette or `send` of websockets."""

Receive = Callable[[], Awaitable[Any]]
"""Function that receives a frame, such as `websocket.receive_text` of Starlette or `recv` of websockets."""

T = TypeVar("T")

_LATEST = datetime(9999, 1, 1, tzinfo=UTC)


def check_durations(time_limit: timedelta, skew: timedelta) -> None:
    """Raise InvalidArgumentError if the time limit is below a millisecond, or if the skew is negative."""
    check_duration(time_limit, "time_limit")
    check_duration(skew, "skew", zero=True)


def write(**fields: str | int | bytes | datetime) -> str:
    """Return a message. A message contains bytes as base64, and times as milliseconds since 1970."""
    return json.dumps(fields, ensure_ascii=False, default=_plain)


def _plain(value: bytes | datetime) -> str | int:
    return to_milliseconds(value) if isinstance(value, datetime) else base64.b64encode(value).decode()


def read(message: object, *kinds: str) -> dict[str, Any]:
    """Return the fields of a message whose type is in `kinds`. For any other message, raise HandshakeError."""
    if not isinstance(message, str) or len(message.encode("utf-8", "replace")) > MAX_MESSAGE:
        raise HandshakeError(f"a message of a handshake is text of at most {MAX_MESSAGE:,} bytes")
    try:
        fields = json.loads(message)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict) or fields.get("type") not in kinds:
        raise HandshakeError(f"the handshake expects a message of the type {' or '.join(kinds)}")
    return fields


def field(fields: dict[str, Any], name: str, kind: type[T]) -> T:
    """Return a field of a message. If the field is absent or has a wrong type, raise HandshakeError."""
    value = fields.get(name)
    if type(value) is not kind:
        raise HandshakeError(f"the field {name!r} of the handshake must be {kind.__name__}")
    return value


def bytes_of(fields: dict[str, Any], name: str) -> bytes:
    """Decode a field in base64. If the field is absent or invalid, raise HandshakeError."""
    try:
        return base64.b64decode(field(fields, name, str), validate=True)
    except ValueError:
        raise HandshakeError(f"the field {name!r} of the handshake must be base64") from None


def time_of(fields: dict[str, Any]) -> datetime:
    """Return the field `"time"` as a timestamp. If the field is absent or invalid, raise HandshakeError."""
    milliseconds = field(fields, "time", int)
    if not 0 <= milliseconds <= to_milliseconds(_LATEST):
        raise HandshakeError("the field 'time' of the handshake must be milliseconds since 1970")
    return from_milliseconds(milliseconds)
