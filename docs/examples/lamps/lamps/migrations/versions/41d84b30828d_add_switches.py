"""Add switches."""

import sqlalchemy as sa

from alembic import op

revision: str = "41d84b30828d"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "switches",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("device_id", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("lamp", sa.Text().with_variant(sa.Text(collation="C"), "postgresql"), nullable=False),
        sa.Column("on", sa.Boolean(), nullable=False),
        sa.Column("switched_at", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.ForeignKeyConstraint(
            ["device_id"], ["devices.id"], name=op.f("fk_switches_device_id_devices"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_switches")),
    )
    with op.batch_alter_table("switches", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("idx_switches_device_id"), ["device_id"], unique=False)
        batch_op.create_index(batch_op.f("idx_switches_lamp"), ["lamp"], unique=False)


def downgrade() -> None:
    with op.batch_alter_table("switches", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("idx_switches_lamp"))
        batch_op.drop_index(batch_op.f("idx_switches_device_id"))

    op.drop_table("switches")
