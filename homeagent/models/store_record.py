"""The store as a whole: which epoch of its history this is, and how old the code may be that works with its schema."""

from sqlalchemy import CheckConstraint, Column, Integer, Table, text

from homeagent.models.base import metadata
from homeagent.models.types import TimestampColumn, text_column

__all__ = ["store_table"]

# No model: nobody outside is given one, and to make a model takes longer than all that is done with this one row.
store_table = Table(
    "store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # 1 at first, and one more with every restore: what was learned in another epoch may not be so in this one.
    Column("epoch", Integer, server_default=text("1"), nullable=False),
    # When this epoch began; null in the first, which no restore began.
    Column("restored_at", TimestampColumn),
    # The oldest schema revision whose code may work with this schema. A revision that only expands leaves it alone.
    Column("oldest_revision", text_column(), nullable=False),
    # A random key of this store: `Database.proof_parameters` derives its answers for absent devices from it.
    Column("proof_key", text_column()),
    CheckConstraint("id = 1", name="single"),
    CheckConstraint("epoch >= 1", name="epoch"),
)
"""The one row of `store`, which the schema's revision inserts."""
