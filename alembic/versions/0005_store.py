"""Add the table `store` with one row: the epoch, and the oldest revision whose code can work with the schema.

Existing stores are in epoch 1.

Revision ID: 0005
Revises: 0004
"""

import sqlalchemy as sa

from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"
branch_labels: str | None = None
depends_on: str | None = None

INSTANT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "store",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Integer(), server_default=sa.text("1"), nullable=False),
        sa.Column("restored_at", INSTANT, nullable=True),
        sa.Column("oldest_revision", TEXT, nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_store_single")),
        sa.CheckConstraint("epoch >= 1", name=op.f("ck_store_epoch")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_store")),
    )
    # Code for revision 0004 does not use this table, so the code also works with this schema.
    op.execute("INSERT INTO store (id, oldest_revision) VALUES (1, '0004')")
