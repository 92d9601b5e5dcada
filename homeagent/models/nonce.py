"""A nonce is a value that a device signs and uses once. A message with a consumed nonce is a replay."""

from typing import Any, ClassVar

from sqlalchemy import Index, PrimaryKeyConstraint
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Identifier, Label, Timestamp


class Nonce(Table, table=True):
    """A row of the table `nonces`. The row stays when the device is deleted."""

    __tablename__ = "nonces"
    __table_args__: ClassVar[Any] = (
        # A device must not consume the nonces of another device.
        PrimaryKeyConstraint("device_id", "nonce", name="pk_nonces"),
        Index("idx_nonces_expires", "expires_at"),
        # With a rowid, an insert would be slower by a quarter (https://sqlite.org/withoutrowid.html).
        {"sqlite_with_rowid": False},
    )

    nonce: Label = Field(repr=False, description="Value that the device signed.")
    device_id: Identifier = Field(description="Device that signed the value.")
    created_at: Timestamp = Field(
        description=(
            "Time at which the nonce was consumed. A call of `nonces.forget()` changes the time to 1970-01-01. Then the"
            " nonce does not count towards the limit."
        )
    )
    expires_at: Timestamp = Field(
        description=(
            "Time at which the nonce expires. The row of an expired nonce stays for one hour, in case the"
            " clock is set back."
        )
    )
