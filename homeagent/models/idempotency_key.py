"""An idempotency key is a record that makes a retried call safe.

| state | event | next state |
|---|---|---|
| no row | an attempt claims the key | in progress |
| no row | `insert()` stores a result | completed |
| in progress | the effect returns, or an operator resolves the abandoned key | completed |
| in progress | the effect fails for good | failed |
| in progress, lease expired | an attempt with `rerun=True` takes over the key | in progress |
| in progress | an attempt releases the key, and no earlier effect can have begun | no row |
| in progress | an attempt releases the key, and an earlier attempt was abandoned | in progress, lease expired |
| in progress, lease expired | an operator forgets the abandoned key | no row |
| completed or failed, and expired | an attempt claims the key | in progress |
| completed or failed, and expired | `insert()` stores a result | completed |
| completed or failed, and expired | a sweep deletes the row | no row |
| completed or failed | `Database.pair` pairs a new device with the id | no row |
| any | `devices.delete` deletes the device | no row |
"""

import base64
import hmac
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, ClassVar

from pydantic import ConfigDict, GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_wrap_validator_function
from sqlalchemy import CheckConstraint, Column, Index, Integer, PrimaryKeyConstraint, text
from sqlmodel import Field

from homeagent.errors import InvalidArgumentError
from homeagent.frame_locals import clear_locals, clears_locals
from homeagent.models.base import PartialIndex, Table, hide_input
from homeagent.models.types import (
    MAX_RESULT_BYTES,
    EnumColumn,
    FlagColumn,
    Identifier,
    JsonColumn,
    Label,
    Name,
    ResultJson,
    Timestamp,
    check_identifier,
    check_label,
    check_name,
    check_searched,
)

OWNER_CHARACTERS = 22
"""Length of the secret part of a webhook's `device_id`. A text of 22 base64 characters has 132 random bits."""


def webhook_owner(sender: str, proof_key: str) -> str:
    """Return the `device_id` of a webhook sender's idempotency keys. Keep the `device_id` secret. Otherwise a stranger
    could pair a device with the sender's `device_id`. The deletion of the device would delete the sender's idempotency
    keys. Without the keys, homeagent could accept a message twice.
    """
    digest = hmac.digest(proof_key.encode(), b"homeagent-webhook-1" + sender.encode(), "sha256")
    return f"{sender}/{base64.urlsafe_b64encode(digest).decode()[:OWNER_CHARACTERS]}"


class IdempotencyState(StrEnum):
    """State of the effect that an idempotency key protects."""

    IN_PROGRESS = "in_progress"
    """An attempt runs the effect. If the lease has expired, the effect has perhaps taken place."""
    COMPLETED = "completed"
    FAILED = "failed"
    """The effect failed for good. A retry raises the recorded error."""


class IdempotencyKey(Table, table=True):
    """A row of the table `idempotency_keys`. Device, method and key together identify the row."""

    __tablename__ = "idempotency_keys"
    __table_args__: ClassVar[Any] = (
        PrimaryKeyConstraint("device_id", "method", "key", name="pk_idempotency_keys"),
        CheckConstraint("state IN ('in_progress', 'completed', 'failed')", name="state"),
        Index("idx_idempotency_expires", "expires_at"),
        # The method `list_abandoned()` uses this index.
        PartialIndex("idx_idempotency_lease", "lease_expires_at", where=text("state = 'in_progress'")),
    )

    key: Label = Field(repr=False, description="Key that the caller chose for one call.")
    method: Name = Field(description="Method that the caller called.")
    device_id: Identifier = Field(description="Device that called the method.")
    result: ResultJson = Field(
        repr=False,
        sa_column=Column("result", JsonColumn(none_as_null=False, limit=MAX_RESULT_BYTES), nullable=False),
        description=(
            "Return value of the effect, or detail of the failed effect. JSON null while the effect runs, or if the"
            " return value could not be stored."
        ),
    )
    created_at: Timestamp = Field(description="Time of the last claim, or of the insertion.")
    expires_at: Timestamp = Field(description="Time at which the record expires. A record in progress does not expire.")
    state: IdempotencyState = Field(
        default=IdempotencyState.COMPLETED,
        sa_column=Column("state", EnumColumn(IdempotencyState), nullable=False, server_default=text("'completed'")),
        description="State of the call: see the diagram in the page on idempotent effects.",
    )
    fingerprint: Name | None = Field(
        default=None,
        repr=False,
        description="SHA-256 of the canonical parameters. Null if the record was inserted without parameters.",
    )
    owner: Name | None = Field(
        default=None,
        repr=False,
        exclude=True,
        description=(
            "Random token of the attempt that claimed the key last. Null if `insert()` or an operator recorded the"
            " result."
        ),
    )
    attempt: int = Field(
        default=1,
        sa_column=Column("attempt", Integer, nullable=False, server_default=text("1")),
        description="Number of attempts.",
    )
    lease_expires_at: Timestamp | None = Field(
        default=None,
        description=(
            "End of the lease. If the lease ends before the outcome is recorded, the attempt is abandoned."
            " Null after the outcome was recorded."
        ),
    )
    downstream_key: Name | None = Field(
        default=None,
        repr=False,
        description="Idempotency key that each attempt passes to another service. Null if no effect was claimed.",
    )
    omitted: bool = Field(
        default=False,
        sa_column=Column("omitted", FlagColumn(otherwise=True), nullable=False, server_default=text("0")),
        description="True if the return value of the effect could not be stored.",
    )


@dataclass(frozen=True, slots=True, init=False)
class IdempotencyScope:
    """The identity of a call: a device, a method and a key. The device chooses the key. An invalid value raises
    InvalidArgumentError.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    # Pydantic validates by the annotations, without a call of the constructor.
    device_id: Identifier
    method: Name
    key: Label = field(repr=False)

    # The constructor removes the key from tracebacks. Do not use a decorator, because look-ups would be slower.
    def __init__(self, device_id: str, method: str, key: str) -> None:
        try:
            _set_device_id(self, check_identifier(device_id, "device_id"))
            _set_method(self, check_name(method, "method"))
            _set_key(self, check_label(key, "key"))
        except InvalidArgumentError as error:
            del key
            clear_locals(error)
            raise

    @classmethod
    @clears_locals
    def of_record(cls, device_id: str, method: str, key: str) -> "IdempotencyScope":
        """Return the scope of a stored record. An old record can contain texts that are no longer valid. The methods
        `insert()` and `claim()` raise an error for an invalid text.
        """
        with suppress(InvalidArgumentError):
            return cls(device_id, method, key)
        return _RecordedScope(device_id, method, key)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Return a schema whose validation errors do not show the input."""
        return no_info_wrap_validator_function(hide_input, handler(source))


# The next three functions set frozen fields faster than `object.__setattr__()`.
_slots: Any = vars(IdempotencyScope)
_set_device_id, _set_method, _set_key = (_slots[name].__set__ for name in ("device_id", "method", "key"))


class _RecordedScope(IdempotencyScope):
    """Scope of a stored record. The class also accepts texts that are no longer valid."""

    __slots__ = ()

    def __init__(self, device_id: str, method: str, key: str) -> None:
        _set_device_id(self, check_searched(device_id, "device_id"))
        _set_method(self, check_searched(method, "method"))
        _set_key(self, check_searched(key, "key"))


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to run an effect until the lease ends. An effect is the action that `run_once` protects.

    Attributes:
        number: number of the attempt for the key, beginning with 1.
        downstream_key: idempotency key that the effect can pass to another service. All attempts of the same call get
            the same value.
        scope: device, method and key of the call.
        lease_expires_at: end of the lease.
        expires_at: time until which a repeated call gets the stored outcome.
        ttl: time from the claim to `expires_at`. If the effect ends after `expires_at`, the ttl begins when the effect
            ends.
        owner: random text that identifies this attempt.
    """

    number: int
    downstream_key: str = field(repr=False)
    scope: IdempotencyScope
    lease_expires_at: datetime
    expires_at: datetime
    ttl: timedelta
    owner: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of the effect (the action that `run_once` protects).

    Attributes:
        value: return value of the effect. A replayed value was encoded as JSON and decoded.
        replayed: True if the outcome was read from the store. False if this call ran the effect.
        attempt: number of the attempt that recorded the outcome.
        omitted: True if the return value is not JSON or exceeds 1 MiB. The call that ran the effect returns the value.
            Later calls return None.
    """

    value: JsonValue = field(repr=False)
    replayed: bool
    attempt: int
    omitted: bool = False
