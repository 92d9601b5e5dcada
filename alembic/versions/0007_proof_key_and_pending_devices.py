"""Add a key to the store. From this key homeagent derives proof parameters for ids that no device has.

The key is random. A backup, a restored store and a copy of a store have the same key as the original. The revision also
adds an index of the devices that wait for approval, because each pairing counts these devices.

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
    # The column is nullable, because SQLite can't add a NOT NULL column without a default value.
    op.add_column("store", sa.Column("proof_key", TEXT, nullable=True))
    store = sa.table("store", sa.column("proof_key"))
    # `approved = 0` is enough, because the CHECK allows only 0 and 1.
    pending = sa.text("approved = 0 AND approved_at IS NULL AND revoked_at IS NULL")
    # The index contains the columns of its condition. Otherwise SQLite reads each whole row to count it.
    columns = ["paired_at", "approved", "approved_at", "revoked_at"]
    op.create_index("idx_devices_pending", "devices", columns, sqlite_where=pending, postgresql_where=pending)
    op.execute(sa.update(store).values(proof_key=secrets.token_hex(32)))
