"""An idempotency key: the record that makes a retried call safe."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from typing import Any

from pydantic import ConfigDict, GetCoreSchemaHandler, JsonValue
from pydantic_core import CoreSchema
from pydantic_core.core_schema import no_info_wrap_validator_function
from sqlalchemy import CheckConstraint, Column, Index, Integer, PrimaryKeyConstraint, text
from sqlmodel import Field

from homeagent.models.base import Table, hide_input
from homeagent.models.types import (
    EnumColumn,
    FlagColumn,
    Identifier,
    Json,
    JsonColumn,
    Label,
    Timestamp,
    TimestampColumn,
    check_identifier,
    check_label,
    text_column,
)

__all__ = ["Attempt", "IdempotencyKey", "IdempotencyScope", "IdempotencyState", "Outcome"]


class IdempotencyState(StrEnum):
    """How far the effect of a key has come."""

    IN_PROGRESS = "in_progress"
    """Claimed. While the lease is live somebody runs it; once that has lapsed nobody knows whether it took place."""
    COMPLETED = "completed"
    FAILED = "failed"
    """The effect failed for good, and its error is replayed like a result."""


class _PartialIndex(Index):
    """An index of some rows, on both engines.

    `Index(…, postgresql_where=…)` would import SQLAlchemy's whole PostgreSQL package at once, in a process that opens
    a file; here that is done when an engine's options are first asked for, to make or to compare the index.
    """

    def __init__(self, name: str, column: str, *, where: str) -> None:
        super().__init__(name, column)
        self._where = text(where)

    @cached_property
    def dialect_options(self) -> Any:
        """What each engine is told beyond the columns."""
        options = super().dialect_options
        for dialect in ("sqlite", "postgresql"):
            options[dialect]["where"] = self._where
        return options


class IdempotencyKey(Table, table=True):
    """A row of `idempotency_keys`: unique per device, method and key."""

    __tablename__ = "idempotency_keys"
    __table_args__ = (
        PrimaryKeyConstraint("device_id", "method", "key", name="pk_idempotency_keys"),
        CheckConstraint("state IN ('in_progress', 'completed', 'failed')", name="state"),
        Index("idx_idempotency_expires", "expires_at"),
        # Only the few rows in progress have a lease: what an operator lists as abandoned is found here.
        _PartialIndex("idx_idempotency_lease", "lease_expires_at", where="state = 'in_progress'"),
    )

    key: Label = Field(repr=False, sa_column=Column("key", text_column(), nullable=False))
    method: Label = Field(sa_column=Column("method", text_column(), nullable=False))
    device_id: Identifier = Field(sa_column=Column("device_id", text_column(), nullable=False))
    result: Json = Field(
        repr=False,
        sa_column=Column("result", JsonColumn(none_as_null=False), nullable=False),
        description=(
            "What the effect returned, or the detail of its failure. JSON null while it runs, and where `omitted`"
            " says so."
        ),
    )
    created_at: Timestamp = Field(sa_column=Column("created_at", TimestampColumn, nullable=False))
    expires_at: Timestamp = Field(
        sa_column=Column("expires_at", TimestampColumn, nullable=False),
        description=(
            "From this very instant on the record is dead, unless it is in progress: such a row outlives its time."
        ),
    )
    state: IdempotencyState = Field(
        default=IdempotencyState.COMPLETED,
        sa_column=Column("state", EnumColumn(IdempotencyState), nullable=False, server_default=text("'completed'")),
    )
    fingerprint: Label | None = Field(
        default=None,
        repr=False,
        sa_column=Column("fingerprint", text_column()),
        description="SHA-256 of the canonical parameters. Null where the record was inserted without any.",
    )
    owner: Label | None = Field(
        default=None,
        repr=False,
        exclude=True,
        sa_column=Column("owner", text_column()),
        description="The random token of the attempt that may record the outcome, or did. Null where no attempt did.",
    )
    attempt: int = Field(
        default=1,
        sa_column=Column("attempt", Integer, nullable=False, server_default=text("1")),
        description="How often the effect was begun.",
    )
    lease_expires_at: Timestamp | None = Field(
        default=None,
        sa_column=Column("lease_expires_at", TimestampColumn),
        description="When the running attempt counts as abandoned unless it renews. Null once the outcome is recorded.",
    )
    downstream_key: Label | None = Field(
        default=None,
        repr=False,
        sa_column=Column("downstream_key", text_column()),
        description="What every attempt passes on as its own idempotency key. Null where no effect was ever claimed.",
    )
    omitted: bool = Field(
        default=False,
        sa_column=Column("omitted", FlagColumn(otherwise=True), nullable=False, server_default=text("0")),
        description="Whether the effect ended but what it returned could not be stored.",
    )


@dataclass(frozen=True, slots=True, init=False)
class IdempotencyScope:
    """What makes a call the same call: the device, the method, and the key that the device chose.

    The three stay apart wherever they are stored, so that ids that hold a separator never collide.

    Raises:
        InvalidArgumentError: one of them is no id, method or key.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    # Where it is a field of a model or a request body, Pydantic goes by these and calls no `__init__`.
    device_id: Identifier
    method: Label
    key: Label = field(repr=False)

    # By hand, for it is made in every unit that names a key: a frozen dataclass's own takes three times as long.
    def __init__(self, device_id: str, method: str, key: str) -> None:
        _set_device_id(self, check_identifier(device_id, "device_id"))
        _set_method(self, check_label(method, "method"))
        _set_key(self, check_label(key, "key"))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Have Pydantic validate each part, and show none of them in what it refuses."""
        return no_info_wrap_validator_function(hide_input, handler(source))


_SLOTS: dict[str, Any] = dict(vars(IdempotencyScope))
_set_device_id = _SLOTS["device_id"].__set__
_set_method = _SLOTS["method"].__set__
_set_key = _SLOTS["key"].__set__


@dataclass(frozen=True, slots=True)
class Attempt:
    """The right to run the effect of a key once, until its lease lapses.

    Attributes:
        number: 1 for the first attempt of a key, one more for each that took over an abandoned one.
        downstream_key: what to pass to another service as the idempotency key: the same on every attempt.
        scope: whose attempt it is.
        lease_expires_at: from this instant on it counts as abandoned.
        expires_at: until when its outcome is replayed.
        ttl: the same as a duration, which counts from the outcome where that came later than `expires_at`.
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
    """How the effect of a key ended.

    Attributes:
        value: what the effect returned, as JSON gives it back.
        replayed: whether this was read from the store, the effect having run before.
        attempt: the number of the attempt that ended it.
        omitted: whether the effect ended but its result could not be stored (over 256 KiB, or no JSON). The value
            of a replay is None then; the first caller still gets it.
    """

    value: JsonValue = field(repr=False)
    replayed: bool
    attempt: int
    omitted: bool = False
