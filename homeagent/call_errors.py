"""Errors about a call or its caller. `homeagent.errors` exports the errors of this module."""

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
    """A unit of work was used after its end, or a thread opened a second write unit inside the first. Remedy: open
    another unit after the end of the first unit.
    """


class TooManyAttemptsError(HomeAgentError):
    """Too many checks of a device's secret failed, or too many slow hashes are waiting. homeagent refuses the check
    before the computation of a hash (HTTP status 429). Remedy: wait for the time in `error.retry_after`, or give the
    device a generated secret.

    `error.retry_after` is the time to wait. `error.device_id` is None if too many slow hashes are waiting.
    """

    def __init__(self, reason: str, *, retry_after: timedelta, device_id: str | None = None) -> None:
        self.retry_after = retry_after
        self.device_id = device_id
        super().__init__(
            f"{reason}: try again in {retry_after.total_seconds():.3f} s, or give the device a generated secret, whose "
            "checks have no limit"
        )


class AuthenticationError(HomeAgentError):
    """The credentials of a request, or the proof of a handshake, are absent or wrong (HTTP status 401). Remedy: send
    the id and the present secret of a paired device.
    """


class AccessDeniedError(HomeAgentError):
    """The secret or the proof is right, but the device is pending, is revoked, or does not have the required role (HTTP
    status 403). Remedy: approve the device, or use a device with the right role.
    """


class HandshakeError(HomeAgentError):
    """A message of a handshake is invalid or late, or comes from a wrong device or gateway. Remedy: the error names the
    cause; correct the clock, the address or the message.
    """


class RefusingRecord(TypedDict, total=False):
    """State and expiry time of an idempotency key's stored record."""

    state: IdempotencyState
    expires_at: datetime


class IdempotencyError(HomeAgentError):
    """homeagent can't claim an idempotency key, renew the key's lease or record the key's outcome.

    `error.state` and `error.expires_at` are the values of the stored record that prevents the claim, or None.
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
    """Another caller is running the effect of the idempotency key (HTTP status 409). The lease of the other caller ends
    after `error.retry_after`. Remedy: repeat the call after `retry_after`.
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
    """The lease of an earlier attempt expired, and homeagent does not know whether the effect took place. Remedy: find
    out whether the effect took place, and then call `resolve()` or `forget()`. Alternatively, pass `on_abandoned` to
    `run_once()`.
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
    """The application's function for `run_once` raises EffectFailedError to record a permanent failure. Each later call
    of `run_once` with the same key raises the stored error again. Remedy: read `error.detail`, and make a new call with
    a new key.

    Args:
        detail: JSON value that homeagent stores.
        replayed: True if the call read the error from the store and did not run the effect.
    """

    def __init__(self, detail: JsonValue = None, *, replayed: bool = False) -> None:
        self.detail = detail
        self.replayed = replayed
        super().__init__("the effect failed; .detail says how" + (" (replayed)" if replayed else ""))


class EffectNotStartedError(HomeAgentError):
    """The application's function for `run_once` raises EffectNotStartedError if the function did not begin its effect.
    The idempotency key is free again, so the next call can run the effect. Remedy: repeat the call.
    """
