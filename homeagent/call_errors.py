"""Errors about a call or its caller. The module `homeagent.errors` exports these errors."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from typing import Unpack

    from pydantic import JsonValue

    from homeagent.models import IdempotencyState


class HomeAgentError(Exception):
    """Base class of all errors of this package."""

    def __reduce__(self) -> tuple[object, ...]:
        # A pickled error contains the message and not the arguments of `__init__()`.
        return type(self).__new__, (type(self), *self.args), self.__dict__


class InvalidArgumentError(HomeAgentError, ValueError):
    """An argument is invalid. Most methods check the arguments before they use the database. Remedy: correct the
    argument that the message names.
    """


class UnitStateError(HomeAgentError):
    """A caller used an ended unit of work, nested write units, or a unit in two threads. Remedy: open another unit
    after the end of the first unit. SQLite can end a unit early, for example on a full disk. SQL such as COMMIT also
    ends a unit early.
    """


class TooManyAttemptsError(HomeAgentError):
    """Too many checks of a secret failed, or too many callers wait for a slow hash. The refused call computes no slow
    hash (HTTP status 429). Remedy: wait for `error.retry_after`, or give the device a generated secret.

    The time to wait is `error.retry_after`. If too many callers wait, `error.device_id` is None.
    """

    def __init__(self, reason: str, *, retry_after: timedelta, device_id: str | None = None) -> None:
        self.retry_after = retry_after
        self.device_id = device_id
        super().__init__(
            f"{reason}: try again in {retry_after.total_seconds():.3f} s, or give the device a generated secret, whose "
            "checks have no limit"
        )


class AuthenticationError(HomeAgentError):
    """The credentials or the proof are absent or wrong (HTTP status 401). Remedy: send the id and the present secret of
    a paired device.
    """


class AccessDeniedError(HomeAgentError):
    """The device is pending or revoked, or lacks the required role (HTTP status 403). The secret or the proof is right.
    Remedy: approve the device, or use a device with the right role.
    """


class HandshakeError(HomeAgentError):
    """A handshake's message is invalid, late or from a wrong sender. Remedy: correct the clock, address or message that
    the error names.
    """


class RefusingRecord(TypedDict, total=False):
    """State and expiry time of an idempotency key's stored record."""

    state: IdempotencyState
    expires_at: datetime


class IdempotencyError(HomeAgentError):
    """An idempotency key can't be claimed, renewed or completed.

    If a record prevents the claim, `error.state` and `error.expires_at` describe the record. For other causes, both
    attributes are None.
    """

    def __init__(
        self,
        message: str,
        *,
        device_id: str,
        method: str,
        state: IdempotencyState | None = None,
        expires_at: datetime | None = None,
    ) -> None:
        self.device_id = device_id
        self.method = method
        self.state = state
        self.expires_at = expires_at
        super().__init__(message)


class IdempotencyInProgressError(IdempotencyError):
    """Another caller runs the effect of the idempotency key (HTTP status 409). The lease of the other caller ends after
    `error.retry_after`. Remedy: repeat the call after `retry_after`.
    """

    def __init__(
        self, *, device_id: str, method: str, retry_after: timedelta, **record: Unpack[RefusingRecord]
    ) -> None:
        self.retry_after = retry_after
        seconds = max(retry_after.total_seconds(), 0)
        message = f"{method!r} of device {device_id!r} is in progress under this key: try again in {seconds:.3f} s"
        super().__init__(message, device_id=device_id, method=method, **record)


class FingerprintMismatchError(IdempotencyError):
    """An earlier call used the idempotency key with different parameters (HTTP status 422). Remedy: use a new key for
    each new call.
    """

    def __init__(self, *, device_id: str, method: str, **record: Unpack[RefusingRecord]) -> None:
        message = f"this key of {method!r} by device {device_id!r} was used with other parameters: "
        message += "a new call needs a new key"
        super().__init__(message, device_id=device_id, method=method, **record)


class OutcomeUnknownError(IdempotencyError):
    """An earlier attempt's lease expired, and the outcome is unknown. Remedy: check whether the effect took place, and
    call `resolve()` or `forget()`. Alternatively, pass `on_abandoned` to `run_once()`.
    """

    def __init__(self, *, device_id: str, method: str, attempt: int, **record: Unpack[RefusingRecord]) -> None:
        self.attempt = attempt
        message = f"attempt {attempt} of {method!r} by device {device_id!r} was abandoned and its outcome is unknown: "
        message += "find out, then resolve() or forget() the key, or pass on_abandoned"
        super().__init__(message, device_id=device_id, method=method, **record)


class LeaseLostError(IdempotencyError):
    """An attempt no longer owns its idempotency key. The call that raised the error did not change the store. Remedy:
    do not use the outcome of this attempt.
    """

    def __init__(self, *, device_id: str, method: str, attempt: int) -> None:
        self.attempt = attempt
        message = f"attempt {attempt} of {method!r} by device {device_id!r} no longer owns its key: "
        message += "another attempt, an operator or a deletion took it; do not act on this attempt's outcome"
        super().__init__(message, device_id=device_id, method=method)


class EffectFailedError(HomeAgentError):
    """An effect raises EffectFailedError to record a permanent failure. Later calls with the same key raise the stored
    error again. Remedy: read `error.detail`, and make a new call with a new key.

    Args:
        detail: JSON value that homeagent stores.
        replayed: True if the call read the stored error and ran no effect.
    """

    def __init__(self, detail: JsonValue = None, *, replayed: bool = False) -> None:
        self.detail = detail
        self.replayed = replayed
        super().__init__("the effect failed; .detail says how" + (" (replayed)" if replayed else ""))


class EffectNotStartedError(HomeAgentError):
    """The application raises EffectNotStartedError if its effect did not begin. The next call with the idempotency key
    can run the effect. Remedy: repeat the call.
    """
