"""The tables of version 1: devices, agents, sessions, nonces and idempotency keys.

Revision ID: 0001
Revises:
"""

import sqlalchemy as sa

from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None

INSTANT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.create_table(
        "agents",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("name", TEXT, nullable=False),
        sa.Column("workspace_path", TEXT, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("config", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_agents")),
    )
    op.create_table(
        "devices",
        sa.Column("id", TEXT, nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("shared_secret_hash", TEXT, nullable=False),
        sa.Column("approved", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("paired_at", INSTANT, nullable=False),
        sa.Column("last_seen_at", INSTANT, nullable=True),
        sa.Column("metadata", sa.Text(), nullable=True),
        sa.CheckConstraint("role IN ('client', 'node', 'admin')", name=op.f("ck_devices_role")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_devices")),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("key", TEXT, nullable=False),
        sa.Column("method", TEXT, nullable=False),
        sa.Column("device_id", TEXT, nullable=False),
        sa.Column("result", sa.Text(), nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index("idx_idempotency_expires", "idempotency_keys", ["expires_at"])
    op.create_table(
        "nonces",
        sa.Column("nonce", TEXT, nullable=False),
        sa.Column("device_id", TEXT, nullable=False),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("expires_at", INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("nonce", name=op.f("pk_nonces")),
    )
    op.create_index("idx_nonces_expires", "nonces", ["expires_at"])
    op.create_table(
        "sessions",
        sa.Column("session_id", TEXT, nullable=False),
        sa.Column("agent_id", TEXT, nullable=False),
        sa.Column("sender_id", TEXT, nullable=True),
        sa.Column("channel_id", TEXT, nullable=True),
        sa.Column("created_at", INSTANT, nullable=False),
        sa.Column("last_active_at", INSTANT, nullable=False),
        sa.ForeignKeyConstraint(["agent_id"], ["agents.id"], name=op.f("fk_sessions_agent_id_agents")),
        sa.PrimaryKeyConstraint("session_id", name=op.f("pk_sessions")),
    )
    op.create_index("idx_sessions_agent", "sessions", ["agent_id"])
    op.create_index("idx_sessions_sender", "sessions", ["sender_id"])
