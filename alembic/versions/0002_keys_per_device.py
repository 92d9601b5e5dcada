"""Make nonces unique per device, and results unique per device, method and key. Keep all rows.

Before this revision a device could consume another device's nonce, or receive another device's result.

Revision ID: 0002
Revises: 0001
"""

from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Bring the schema to this revision."""
    # SQLite rebuilds both tables. The table `nonces` has no rowid, because most of a row is its key.
    with op.batch_alter_table("nonces", recreate="auto", table_kwargs={"sqlite_with_rowid": False}) as batch:
        batch.drop_constraint(op.f("pk_nonces"), type_="primary")
        batch.create_primary_key(op.f("pk_nonces"), ["device_id", "nonce"])
    with op.batch_alter_table("idempotency_keys") as batch:
        batch.drop_constraint(op.f("pk_idempotency_keys"), type_="primary")
        batch.create_primary_key(op.f("pk_idempotency_keys"), ["device_id", "method", "key"])
