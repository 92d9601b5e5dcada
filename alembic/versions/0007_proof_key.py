"""A store has a key of its own, from which it derives proof parameters for ids that no device has.

The key is random and stays with the store: a backup, a restored store and a copy have the same key.

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
    op.execute(sa.update(store).values(proof_key=secrets.token_hex(32)))
