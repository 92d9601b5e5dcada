"""The table `store`, which has one row with facts about the whole database, such as the epoch."""

from sqlalchemy import CheckConstraint, Column, Integer, Table, text

from homeagent.models.base import metadata
from homeagent.models.types import TimestampColumn, text_column

__all__ = ["store_table"]

# The table has no model, because only homeagent reads the row. Creating a model class takes longer than all uses of the
# row.
store_table = Table(
    "store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    # The epoch is a counter from 1, which a restore increments. A value that was read in an earlier epoch can be wrong.
    Column("epoch", Integer, server_default=text("1"), nullable=False),
    # The time at which the epoch began. In the first epoch the time is null.
    Column("restored_at", TimestampColumn),
    # Oldest revision whose code can use the schema. A revision that only adds to the schema does not change the value.
    Column("oldest_revision", text_column(), nullable=False),
    # Random key, from which `Database.proof_parameters` derives the answers for absent devices.
    Column("proof_key", text_column()),
    CheckConstraint("id = 1", name="single"),
    CheckConstraint("epoch >= 1", name="epoch"),
)
"""The table `store`. A revision of the schema inserts the single row."""
