"""The table named `store` has one row with facts about the database."""

from typing import Any

from sqlalchemy import CheckConstraint, Column, Integer, Table, text

from homeagent.models.base import metadata
from homeagent.models.types import HashColumn, TimestampColumn, text_column


def _column(name: str, kind: Any, description: str, **options: Any) -> Column[Any]:
    return Column(name, kind, info={"description": description}, **options)


# The table has no model class, because creating a class is slow.
store_table: Table = Table(
    "store",
    metadata,
    _column("id", Integer, "Always 1.", primary_key=True, autoincrement=False),
    _column(
        "epoch",
        Integer,
        "Counter that begins with 1. A restore or the command `begin-epoch` increments the counter. A cache from an "
        "earlier epoch can be wrong.",
        server_default=text("1"),
        nullable=False,
    ),
    _column("restored_at", TimestampColumn, "Time at which the epoch began. Null in the first epoch."),
    _column(
        "oldest_revision",
        text_column(),
        "Oldest revision whose code can use the schema. A revision that only adds to the schema does not change "
        "`oldest_revision`.",
        nullable=False,
    ),
    _column(
        "proof_key",
        HashColumn(),
        "Random key. For an absent device, `Database.proof_parameters` computes the answer from the key.",
    ),
    CheckConstraint("id = 1", name="single"),
    CheckConstraint("epoch >= 1", name="epoch"),
)
