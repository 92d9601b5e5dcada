"""Accept signed messages of the specification Standard Webhooks (https://www.standardwebhooks.com)."""

from __future__ import annotations

import base64
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from fastapi import Request, Response
from pydantic import SecretBytes, SecretStr

from homeagent.errors import (
    AuthenticationError,
    CorruptDatabaseError,
    HomeAgentError,
    InvalidArgumentError,
    UnitStateError,
)
from homeagent.fastapi.lifespan import DatabaseDep
from homeagent.fastapi.once import (
    MAX_BODY,
    Once,
    check_options,
    is_body_gone,
    params_of,
    read_body,
    route_of,
)
from homeagent.fastapi.problems import HTTPProblem, as_http
from homeagent.idempotency import OnAbandoned
from homeagent.models.idempotency_key import OWNER_CHARACTERS, IdempotencyScope, webhook_owner
from homeagent.models.types import check_duration, check_identifier, check_searched
from homeagent.stores.nonces import FIND_RECORD
from homeagent.unit_of_work import UnitOfWork

_PREFIX = "whsec_"
_MIN_KEY_BYTES = 24  # Standard Webhooks requires a secret of at least 24 bytes.


class Webhook(Once):
    """Message with a right signature and time. Handle the message in a function, and call `await webhook(function)`.
    The function runs once for each message. A repeated message gets the first answer.

    Attributes:
        id: id of the message.
        sent_at: time at which the sender signed the message.
        body: bytes of the message.
    """

    id: str
    sent_at: datetime
    body: bytes

    def json(self) -> Any:
        """Return the body as JSON. If the body is not JSON or is nested too deeply, raise an HTTPProblem with
        the status 422.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            raise HTTPProblem(InvalidArgumentError("the body is not JSON"), detail="The body is not JSON.") from None


def signed_webhook(
    secret: SecretStr | str | Sequence[SecretStr | str],
    *,
    sender: str,
    tolerance: timedelta = timedelta(minutes=5),
    lease: timedelta = timedelta(minutes=1),
    ttl: timedelta = timedelta(hours=24),
    on_abandoned: OnAbandoned = "refuse",
    max_body: int = MAX_BODY,
) -> Callable[..., Awaitable[Webhook]]:
    """Return a dependency for `Annotated[Webhook, Depends(signed_webhook(secret, sender=…))]`.

    A message with a wrong signature or time gets status 401.

    Args:
        secret: secret `whsec_…` from the sender, or several secrets during a rotation. A secret has at least 24 bytes.
        sender: name of the sender, at most 489 bytes. The store keeps an idempotency key for each message. The key's
            field `device_id` begins with the sender's name and a slash.
        tolerance: longest difference between the time of the message and the gateway's clock.
        lease: see `Database.run_once()`.
        ttl: lifetime of the stored answer. A repeated message gets the stored answer. The lifetime must be longer than
            twice the tolerance.
        on_abandoned: see `Database.run_once()`.
        max_body: largest message in bytes, 1 MiB by default. A larger message gets a reply with status 413.

    Raises:
        InvalidArgumentError: if an argument is invalid.
    """
    keys = _keys_of(secret)
    check_identifier(check_searched(sender, "sender") and f"{sender}/{'x' * OWNER_CHARACTERS}", "sender")
    check_options(lease, ttl, on_abandoned, max_body)
    if ttl / 2 <= check_duration(tolerance, "tolerance"):
        raise InvalidArgumentError(
            "ttl must be more than twice the tolerance: otherwise an old message is accepted again"
        )

    create = partial(Webhook, stored=True, lease=lease, ttl=ttl, on_abandoned=on_abandoned)

    async def webhook(request: Request, response: Response, database: DatabaseDep) -> Webhook:
        message_id, sent_at, body = await _read(request, keys, max_body)
        try:
            fresh, owner = await database.arun(
                lambda unit: (_is_fresh(unit, sent_at, tolerance), _owner(unit, sender)), read_only=True
            )
            scope = IdempotencyScope(device_id=owner, method=route_of(request), key=message_id)
        except InvalidArgumentError:
            raise _refused() from None
        except HomeAgentError as error:
            raise as_http(error) from error
        if not fresh:
            raise _refused()
        params = await params_of(request, max_body)
        found = create(database, request, response, scope, params=params)
        found.id, found.sent_at, found.body = message_id, sent_at, body
        return found

    return webhook


async def _read(request: Request, keys: list[SecretBytes], max_body: int) -> tuple[str, datetime, bytes]:
    """Check a message's signature. Return the message's id, time and body."""
    message_id, timestamp, signatures = (
        request.headers.get(f"webhook-{name}", "") for name in ("id", "timestamp", "signature")
    )
    if is_body_gone(request):
        raise UnitStateError(
            "FastAPI has parsed the body as a form, so its signature can't be checked: remove Form() and File() from "
            "the route of the webhook, and read the fields from webhook.body"
        )
    body = await read_body(request, max_body)
    signed = f"{message_id}.{timestamp}.".encode() + body
    # Compute one signature for each key. A header can contain thousands of signatures.
    digests = (hmac.digest(key.get_secret_value(), signed, "sha256") for key in keys)
    expected = [b"v1," + base64.b64encode(digest) for digest in digests]
    # Compare all signatures, to hide the position of the right signature.
    right = [hmac.compare_digest(each.encode(), one) for each in signatures.split(" ") for one in expected]
    # Refuse an id with a full stop. With such ids, different messages could have the same signed text.
    if not any(right) or not re.fullmatch("[0-9]{1,11}", timestamp) or "." in message_id:
        raise _refused()
    return message_id, datetime.fromtimestamp(int(timestamp), UTC), body


def _refused() -> HTTPProblem:
    """Return the error for a message with a wrong signature, id or time. The text does not name the wrong value."""
    problem = HTTPProblem(AuthenticationError("the signature or the time of the message is wrong"))
    problem.headers = {"WWW-Authenticate": "Webhook"}
    return problem


def _keys_of(given: Any) -> list[SecretBytes]:
    """Return the keys of a secret or of several secrets. Raise InvalidArgumentError for any other value."""
    is_single = isinstance(given, (SecretStr, str, bytes)) or not isinstance(given, Iterable)
    keys = [_key_of(each) for each in ([given] if is_single else given)]
    if not keys:
        raise InvalidArgumentError("signed_webhook needs a secret")
    return keys


def _key_of(secret: SecretStr | str) -> SecretBytes:
    text = secret.get_secret_value() if isinstance(secret, SecretStr) else secret
    try:
        key = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except (AttributeError, TypeError, ValueError):
        key = b""
    del text
    if len(key) < _MIN_KEY_BYTES:
        raise InvalidArgumentError(f"the secret must be {_PREFIX} and the base64 of at least {_MIN_KEY_BYTES} bytes")
    return SecretBytes(key)


def _owner(unit: UnitOfWork, sender: str) -> str:
    """Return the `device_id` of a sender's idempotency keys, in the unit's store."""
    key, _ = unit.devices.find_proof_secrets(sender)
    return webhook_owner(sender, key)


def _is_fresh(unit: UnitOfWork, sent_at: datetime, tolerance: timedelta) -> bool:
    """Return False if the message's time is wrong. Also return False if a restore may have lost the idempotency key."""
    record = unit.one(FIND_RECORD)
    if record is None:
        raise CorruptDatabaseError("the table `store` has lost its row: restore the newest good backup")
    restored_at = record[1]
    if restored_at is not None and sent_at - restored_at <= tolerance:
        return False
    return abs(unit.now() - sent_at) <= tolerance
