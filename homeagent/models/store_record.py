"""The table with the name `store` has one row with facts about the whole database, such as the epoch."""

from sqlalchemy import CheckConstraint, Column, Integer, Table, text

from homeagent.models.base import metadata
from homeagent.models.types import HashColumn, TimestampColumn, text_column

# The table has no model class, because creating a model class would take longer than all reads of the row.
store_table: Table = Table(
    "store",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False, info={"description": "Always 1."}),
    Column(
        "epoch",
        Integer,
        server_default=text("1"),
        nullable=False,
        info={"description": "Counter from 1 that a restore increments. A cache from an earlier epoch can be wrong."},
    ),
    Column(
        "restored_at", TimestampColumn, info={"description": "Time at which the epoch began. Null in the first epoch."}
    ),
    Column(
        "oldest_revision",
        text_column(),
        nullable=False,
        info={
            "description": "Oldest revision whose code can use the schema. A revision that only adds to"
            " the schema does not change `oldest_revision`."
        },
    ),
    Column(
        "proof_key",
        HashColumn(),
        info={
            "description": "Random key from which `Database.proof_parameters` derives the answers for absent devices."
        },
    ),
    CheckConstraint("id = 1", name="single"),
    CheckConstraint("epoch >= 1", name="epoch"),
)
