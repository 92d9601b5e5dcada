"""A device proves its identity with a secret. A device has access only after an administrator's approval.

| state | event | next state |
|---|---|---|
| no row | `Database.pair` or `devices.create` adds the device | pending |
| pending | `devices.approve()` | approved |
| pending | `devices.revoke()` | revoked |
| pending for longer than `Limits.pending_ttl` | a sweep deletes the row | no row |
| approved | `devices.revoke()`, or `uow.session` sets `approved` to False | revoked |
| revoked | `devices.approve()` with `expected_status=DeviceStatus.REVOKED` | approved |
| any | `devices.delete` | no row |

`Device.status` is computed from the columns `approved`, `approved_at` and `revoked_at`.
"""

from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import CheckConstraint, Column, Connection, event, inspect, select, text
from sqlalchemy.orm import Mapper, object_session
from sqlmodel import Field

from homeagent.clock import system_clock
from homeagent.models.base import PartialIndex, Table
from homeagent.models.types import FlagColumn, HashColumn, Identifier, Json, JsonColumn, Name, Timestamp


class Role(StrEnum):
    """Role that a device chooses when it pairs. The role does not change later."""

    CLIENT = "client"
    NODE = "node"
    ADMIN = "admin"


class DeviceStatus(StrEnum):
    """State of a device."""

    PENDING = "pending"
    APPROVED = "approved"
    REVOKED = "revoked"


# Do not reword the condition of this partial index. SQLite uses the index only for queries that contain the condition
# (https://sqlite.org/partialindex.html, section 3; test_the_index_counts).
PENDING = text("approved = 0 AND approved_at IS NULL AND revoked_at IS NULL")
"""SQL condition for the pending devices."""


class Device(Table, table=True):
    """A row of the table `devices`."""

    __tablename__ = "devices"
    __table_args__: ClassVar[Any] = (
        CheckConstraint("role IN ('client', 'node', 'admin')", name="role"),
        CheckConstraint("approved IN (0, 1)", name="approved"),
        # With all four columns, SQLite counts pending devices by the index alone.
        PartialIndex("idx_devices_pending", "paired_at", "approved", "approved_at", "revoked_at", where=PENDING),
    )

    id: Identifier = Field(primary_key=True, description="Id that the device chose when it paired.")
    role: Role = Field(description="Role that the device chose when it paired.")
    shared_secret_hash: Name = Field(
        sa_type=HashColumn,
        repr=False,
        exclude=True,
        description="Hash of the present secret, with a prefix for the kind of hash. The repr and dumps omit the hash.",
    )
    approved: bool = Field(
        default=False,
        sa_column=Column("approved", FlagColumn, nullable=False, server_default=text("0")),
        description="True if the device has access.",
    )
    paired_at: Timestamp = Field(description="Time of the pairing.")
    last_seen_at: Timestamp | None = Field(
        default=None,
        description=(
            "Time that the application stored by `update_last_seen()`, usually at most once a minute. Null before the"
            " first call of `update_last_seen()`."
        ),
    )
    metadata_: Json = Field(
        default=None,
        alias="metadata",
        sa_column=Column("metadata", JsonColumn),
        description="Data of the application, as JSON.",
    )
    approved_at: Timestamp | None = Field(
        default=None,
        description="Time of the last approval. Null if the device was not approved, or if an old version approved it.",
    )
    revoked_at: Timestamp | None = Field(
        default=None,
        description="Time of the revocation. Null if the device was not revoked, or was approved after the revocation.",
    )
    revoked_reason: Name | None = Field(
        default=None, description="Reason that the administrator gave for the revocation."
    )
    previous_secret_hash: Name | None = Field(
        default=None,
        sa_type=HashColumn,
        repr=False,
        exclude=True,
        description=(
            "Hash of the secret before the last rotation. Null if the rotation had no overlap. After the overlap, the"
            " secret no longer works, but the hash stays until the next rotation or a revocation."
        ),
    )
    previous_secret_expires_at: Timestamp | None = Field(
        default=None, exclude=True, description="End of the overlap, during which the previous secret also works."
    )
    proof_verifier: Name | None = Field(
        default=None,
        sa_type=HashColumn,
        repr=False,
        exclude=True,
        description="Verifier of the device's proofs. Null if the device must send its secret.",
    )

    @property
    def status(self) -> DeviceStatus:
        """State of the device: pending, approved or revoked."""
        if self.approved:
            return DeviceStatus.APPROVED
        # An UPDATE by `uow.session` can withdraw an approval without setting `revoked_at`.
        was_approved = self.approved_at is not None
        return DeviceStatus.REVOKED if was_approved or self.revoked_at is not None else DeviceStatus.PENDING


@event.listens_for(Device, "before_insert")
@event.listens_for(Device, "before_update")
def _record_approval(mapper: Mapper[Any], connection: Connection, device: Device) -> None:
    """If a flush changes `Device.approved`, update the times and the previous secret."""
    attributes = inspect(device).attrs
    if not attributes["approved"].history.has_changes():
        return
    columns: Any = mapper.local_table.c
    # SQLAlchemy does not know the old value of an expired attribute.
    stored = connection.execute(select(columns.approved).where(columns.id == device.id)).scalar()
    if device.approved == (stored is True):
        return
    session = object_session(device)
    now: datetime = (session.info.get("now", system_clock) if session is not None else system_clock)()
    if device.approved:
        if not attributes["approved_at"].history.has_changes():
            device.approved_at = now
        device.revoked_at = device.revoked_reason = None
    elif not attributes["revoked_at"].history.has_changes():
        device.revoked_at = now
    device.previous_secret_hash = device.previous_secret_expires_at = None
