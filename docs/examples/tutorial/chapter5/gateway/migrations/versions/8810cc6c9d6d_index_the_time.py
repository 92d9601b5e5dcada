"""index the time."""

from alembic import op

revision: str = "8810cc6c9d6d"
down_revision: str | None = "1b653bf1fca2"


def upgrade() -> None:
    with op.batch_alter_table("readings", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("idx_readings_measured_at"), ["measured_at"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("readings", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("idx_readings_measured_at"))
