"""A store has a key of its own, from which it derives proof parameters for ids that no device has.

The key is random and stays with the store: a backup, a restored store and a copy have the same key. An index holds the
devices that wait for their approval, which each pairing counts.

Revision ID: 0007
Revises: 0006
"""

import secrets

import sqlalchemy as sa

from alembic import op

revision: str = "0007"
down_revision: str | None = "0006"
branch_labels: str | None = None
depends_on: str | None = None

TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Bring the schema to this revision."""
    # Nullable, since SQLite adds no other column without a default value.
    op.add_column("store", sa.Column("proof_key", TEXT, nullable=True))
    store = sa.table("store", sa.column("proof_key"))
    # The CHECK allows 0 and 1 alone.
    pending = sa.text("approved = 0 AND approved_at IS NULL AND revoked_at IS NULL")
    # With the columns of its condition, or SQLite reads each row, metadata and all, to count it.
    columns = ["paired_at", "approved", "approved_at", "revoked_at"]
    op.create_index("idx_devices_pending", "devices", columns, sqlite_where=pending, postgresql_where=pending)
    op.execute(sa.update(store).values(proof_key=secrets.token_hex(32)))
