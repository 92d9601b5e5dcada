"""The store as a whole: which epoch of its history this is, and how old the code may be that works with its schema."""

from sqlalchemy import CheckConstraint, Column, Integer, text
from sqlmodel import Field

from homeagent.models.base import Table
from homeagent.models.types import Instant, InstantColumn, Label, text_column

__all__ = ["StoreRecord"]


class StoreRecord(Table, table=True):
    """The one row of `store`, which the schema's revision inserts."""

    __tablename__ = "store"
    __table_args__ = (CheckConstraint("id = 1", name="single"), CheckConstraint("epoch >= 1", name="epoch"))

    id: int = Field(
        default=1, ge=1, le=1, sa_column=Column("id", Integer, primary_key=True, autoincrement=False, nullable=False)
    )
    epoch: int = Field(
        default=1,
        ge=1,
        sa_column=Column("epoch", Integer, server_default=text("1"), nullable=False),
        description=(
            "1 at first, and one more with every restore: what was learned in another epoch may not be so in this one."
        ),
    )
    restored_at: Instant | None = Field(
        default=None,
        sa_column=Column("restored_at", InstantColumn),
        description="When this epoch began; null in the first, which no restore began.",
    )
    oldest_revision: Label = Field(
        sa_column=Column("oldest_revision", text_column(), nullable=False),
        description=(
            "The oldest schema revision whose code may work with this schema. A revision that only expands leaves"
            " it alone."
        ),
    )
