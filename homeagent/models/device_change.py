"""Database triggers write the feed of device changes in commit order."""

from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, Column, Integer
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Identifier, Timestamp


class DeviceChangeKind(StrEnum):
    """Kind of a device change. One UPDATE can cause several changes. A trigger uses the kind UPDATED only if no other
    kind fits.
    """

    PAIRED = "paired"
    APPROVED = "approved"
    REVOKED = "revoked"
    ROTATED = "rotated"
    """The stored hash or verifier has changed. The secret can still be the same."""
    UPDATED = "updated"
    DELETED = "deleted"
    RESET = "reset"
    """The feed lacks changes. The reader must read all devices again."""


class DeviceChange(Table, table=True):
    """A row of the table `device_changes`. A later change has a greater number."""

    __tablename__ = "device_changes"
    __table_args__: ClassVar[Any] = (
        CheckConstraint(f"kind IN ({', '.join(repr(kind.value) for kind in DeviceChangeKind)})", name="kind"),
        {"sqlite_autoincrement": True},
    )

    number: int = Field(
        sa_column=Column(
            "number",
            BigInteger().with_variant(Integer(), "sqlite"),
            primary_key=True,
            autoincrement=False,
            nullable=False,
        ),
        description="Number of the change. A change that was committed later has a greater number.",
    )
    device_id: Identifier | None = Field(default=None, description="Id of the device. Null if the kind is `reset`.")
    kind: DeviceChangeKind = Field(description="Kind of the change.")
    at: Timestamp = Field(description="Time of the unit. After other SQL, the time in the row or of the database.")
