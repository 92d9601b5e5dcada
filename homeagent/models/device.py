"""A device: who may enter. It pairs with a secret, and waits until an admin approves it."""

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import CheckConstraint, Column, Connection, event, inspect, select, text
from sqlalchemy.orm import Mapper, object_session
from sqlmodel import Field

from homeagent.clock import system_clock
from homeagent.models.base import PartialIndex, Table
from homeagent.models.types import (
    EnumColumn,
    FlagColumn,
    Identifier,
    Json,
    JsonColumn,
    Label,
    Timestamp,
    TimestampColumn,
    text_column,
)

__all__ = ["PENDING", "Device", "DeviceStatus", "Role"]


class Role(StrEnum):
    """What a device may do. It is bound when the device pairs, and never changes."""

    CLIENT = "client"
    NODE = "node"
    ADMIN = "admin"


class DeviceStatus(StrEnum):
    """Where a device stands: never approved yet, approved, or not approved after an approval or a revocation."""

    PENDING = "pending"
    APPROVED = "approved"
    REVOKED = "revoked"


# As the index says it, or SQLite does not use the index: https://sqlite.org/partialindex.html, section 3.
PENDING = text("approved = 0 AND approved_at IS NULL AND revoked_at IS NULL")
"""Devices that wait for their first approval."""


class Device(Table, table=True):
    """A row of `devices`. Never a request body (a client could set `approved`), never a reply: see the shapes."""

    __tablename__ = "devices"
    __table_args__ = (
        CheckConstraint("role IN ('client', 'node', 'admin')", name="role"),
        CheckConstraint("approved IN (0, 1)", name="approved"),
        # With the columns of its condition, or SQLite reads each row, metadata and all, to count it.
        PartialIndex("idx_devices_pending", "paired_at", "approved", "approved_at", "revoked_at", where=PENDING),
    )

    id: Identifier = Field(sa_column=Column("id", text_column(), primary_key=True, nullable=False))
    role: Role = Field(sa_column=Column("role", EnumColumn(Role), nullable=False))
    shared_secret_hash: Label = Field(
        repr=False,
        exclude=True,
        sa_column=Column("shared_secret_hash", text_column(), nullable=False),
        description=(
            "The hash of the present secret; its prefix says which kind of hash it is. In no repr and in no dump."
        ),
    )
    approved: bool = Field(
        default=False, sa_column=Column("approved", FlagColumn, nullable=False, server_default=text("0"))
    )
    paired_at: Timestamp = Field(sa_column=Column("paired_at", TimestampColumn, nullable=False))
    last_seen_at: Timestamp | None = Field(
        default=None,
        sa_column=Column("last_seen_at", TimestampColumn),
        description="Null until the device is seen for the first time; written at most once a minute.",
    )
    metadata_: Json = Field(default=None, alias="metadata", sa_column=Column("metadata", JsonColumn))
    approved_at: Timestamp | None = Field(
        default=None,
        sa_column=Column("approved_at", TimestampColumn),
        description="When it was approved last. Null where it never was, and where that was before this was recorded.",
    )
    revoked_at: Timestamp | None = Field(
        default=None,
        sa_column=Column("revoked_at", TimestampColumn),
        description="When it was revoked. Null where it never was, or was approved again since.",
    )
    revoked_reason: Label | None = Field(default=None, sa_column=Column("revoked_reason", text_column()))
    previous_secret_hash: Label | None = Field(
        default=None,
        repr=False,
        exclude=True,
        sa_column=Column("previous_secret_hash", text_column()),
        description=(
            "The hash of the secret before the last rotation. Null where that one never served beside the present one."
            " After its time it serves no more, and stays until the next rotation, a revocation or a repair."
        ),
    )
    previous_secret_expires_at: Timestamp | None = Field(
        default=None,
        exclude=True,
        sa_column=Column("previous_secret_expires_at", TimestampColumn),
        description="Until when the previous secret serves beside the present one.",
    )
    proof_verifier: Label | None = Field(
        default=None,
        repr=False,
        exclude=True,
        sa_column=Column("proof_verifier", text_column()),
        description=(
            "What `Database.verify_proof` checks a proof against. Null where the device can only present its secret."
        ),
    )

    @property
    def status(self) -> DeviceStatus:
        """Where the device stands: pending, approved or revoked."""
        if self.approved:
            return DeviceStatus.APPROVED
        # An UPDATE in `uow.session` may withdraw an approval without a time of revocation.
        was_approved = self.approved_at is not None
        return DeviceStatus.REVOKED if was_approved or self.revoked_at is not None else DeviceStatus.PENDING


@event.listens_for(Device, "before_insert")
@event.listens_for(Device, "before_update")
def _record_approval(mapper: Mapper[Any], connection: Connection, device: Device) -> None:
    """Record a change of `approved` through the ORM as `devices.approve` and `devices.revoke` do."""
    attributes = inspect(device).attrs
    if not attributes["approved"].history.has_changes():
        return
    columns: Any = mapper.local_table.c
    # An expired attribute is not loaded before it is set, so the history need not hold the old value.
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
