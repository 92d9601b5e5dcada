"""Add columns for state, owner, lease and fingerprint to idempotency keys. Existing rows get the state completed.

Revision ID: 0004
Revises: 0003
"""

import sqlalchemy as sa

from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: str | None = None
depends_on: str | None = None

INSTANT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Bring the schema to this revision."""
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.add_column(sa.Column("state", sa.Text(), server_default=sa.text("'completed'"), nullable=False))
        batch.add_column(sa.Column("fingerprint", TEXT, nullable=True))
        batch.add_column(sa.Column("owner", TEXT, nullable=True))
        batch.add_column(sa.Column("attempt", sa.Integer(), server_default=sa.text("1"), nullable=False))
        batch.add_column(sa.Column("lease_expires_at", INSTANT, nullable=True))
        batch.add_column(sa.Column("downstream_key", TEXT, nullable=True))
        batch.add_column(sa.Column("omitted", sa.Integer(), server_default=sa.text("0"), nullable=False))
        batch.create_check_constraint(
            op.f("ck_idempotency_keys_state"), "state IN ('in_progress', 'completed', 'failed')"
        )
    op.create_index(
        "idx_idempotency_lease",
        "idempotency_keys",
        ["lease_expires_at"],
        sqlite_where=sa.text("state = 'in_progress'"),
        postgresql_where=sa.text("state = 'in_progress'"),
    )
