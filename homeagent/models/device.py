"""A device: who may enter. It pairs with a secret, and waits until an admin approves it."""

from datetime import datetime
from enum import StrEnum

from sqlalchemy import CheckConstraint, Column, text
from sqlmodel import Field

from homeagent.models.base import Table
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

__all__ = ["Device", "DeviceStatus", "Role"]


class Role(StrEnum):
    """What a device may do. It is bound when the device pairs, and never changes."""

    CLIENT = "client"
    NODE = "node"
    ADMIN = "admin"


class DeviceStatus(StrEnum):
    """Where a device stands: never approved yet, approved, or approved once (or not) and then revoked."""

    PENDING = "pending"
    APPROVED = "approved"
    REVOKED = "revoked"


def _status(approved: bool, revoked_at: datetime | None) -> DeviceStatus:
    if approved:
        return DeviceStatus.APPROVED
    return DeviceStatus.PENDING if revoked_at is None else DeviceStatus.REVOKED


class Device(Table, table=True):
    """A row of `devices`. Never a request body (a client could set `approved`), never a reply: see the shapes."""

    __tablename__ = "devices"
    __table_args__ = (
        CheckConstraint("role IN ('client', 'node', 'admin')", name="role"),
        CheckConstraint("approved IN (0, 1)", name="approved"),
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
        return _status(self.approved, self.revoked_at)
