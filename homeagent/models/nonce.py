"""A nonce: a number used once. A signed message that carries a consumed one is a replay."""

from sqlalchemy import Column, Index, PrimaryKeyConstraint
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Identifier, Label, Timestamp, TimestampColumn, text_column

__all__ = ["Nonce"]


class Nonce(Table, table=True):
    """A row of `nonces`. It names its device without a foreign key: it outlives the device."""

    __tablename__ = "nonces"
    __table_args__ = (
        # Per device: were a nonce unique by itself, one device could burn another's.
        PrimaryKeyConstraint("device_id", "nonce", name="pk_nonces"),
        Index("idx_nonces_expires", "expires_at"),
        # The key is most of the row: https://sqlite.org/withoutrowid.html. Inserts cost 0.8 of those with a rowid.
        {"sqlite_with_rowid": False},
    )

    nonce: Label = Field(repr=False, sa_column=Column("nonce", text_column(), nullable=False))
    device_id: Identifier = Field(sa_column=Column("device_id", text_column(), nullable=False))
    created_at: Timestamp = Field(sa_column=Column("created_at", TimestampColumn, nullable=False))
    expires_at: Timestamp = Field(
        sa_column=Column("expires_at", TimestampColumn, nullable=False),
        description=(
            "From this very instant on the nonce is dead. Its row stays a while longer, in case the clock steps back."
        ),
    )
