"""The feed of device changes. Triggers of the schema write the change feed in the order of the commits.

A reader keeps the number of the last change that the reader has seen, and later asks for the changes with greater
numbers. If the change feed no longer contains the number that a reader has kept, the reader must read all devices
again.
"""

from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import BigInteger, CheckConstraint, Column, Integer
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Identifier, Timestamp


class DeviceChangeKind(StrEnum):
    """Kind of a device change.

    One UPDATE of a device can cause several changes in the change feed. The change feed contains a change of the kind
    `updated` only if the UPDATE causes no change of a different kind.
    """

    PAIRED = "paired"
    APPROVED = "approved"
    REVOKED = "revoked"
    ROTATED = "rotated"
    """The stored hash or verifier of the secret has changed, even if the secret itself is still the same."""
    UPDATED = "updated"
    DELETED = "deleted"
    RESET = "reset"
    """The feed lacks changes. The reader must read all devices again."""


class DeviceChange(Table, table=True):
    """A row of the table `device_changes`. A later change has a greater number than an earlier change."""

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
    device_id: Identifier | None = Field(default=None, description="Null in a `reset` change.")
    kind: DeviceChangeKind = Field(description="Kind of the change.")
    at: Timestamp = Field(description="Time of the change, from the device's row or from the database's clock.")
