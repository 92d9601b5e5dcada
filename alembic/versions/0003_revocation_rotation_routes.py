"""Add columns for approval, revocation and secret rotation to devices, and the route and indexes to sessions.

If several sessions have the same agent, sender and channel, the most recent session gets the route. The other sessions
can then be found only by id.

Revision ID: 0003
Revises: 0002
"""

import hashlib
import json

import sqlalchemy as sa

from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: str | None = None
depends_on: str | None = None

INSTANT = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")

BATCH = 1000


def _route(agent_id: str, sender_id: str | None, channel_id: str | None) -> str:
    # This is a copy of homeagent.models.session.route_key at this revision. Do not change the copy.
    route = json.dumps([agent_id, sender_id, channel_id], ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(route.encode()).hexdigest()


def _fill_routes() -> None:
    connection = op.get_bind()
    # The first row of each route is the most recent session. Equal timestamps are ordered by id, as in the lists.
    rows = connection.execute(
        sa.text(
            "SELECT agent_id, sender_id, channel_id, session_id FROM ("
            " SELECT agent_id, sender_id, channel_id, session_id, row_number() OVER ("
            "  PARTITION BY agent_id, sender_id, channel_id ORDER BY last_active_at DESC, session_id DESC) AS place"
            " FROM sessions) AS placed WHERE place = 1"
        )
    ).fetchall()
    statement = sa.text("UPDATE sessions SET route_key = :route WHERE session_id = :session_id")
    for start in range(0, len(rows), BATCH):
        connection.execute(
            statement,
            [
                {"route": _route(agent_id, sender_id, channel_id), "session_id": session_id}
                for agent_id, sender_id, channel_id, session_id in rows[start : start + BATCH]
            ],
        )


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("devices", sa.Column("approved_at", INSTANT, nullable=True))
    op.add_column("devices", sa.Column("revoked_at", INSTANT, nullable=True))
    op.add_column("devices", sa.Column("revoked_reason", TEXT, nullable=True))
    op.add_column("devices", sa.Column("previous_secret_hash", TEXT, nullable=True))
    op.add_column("devices", sa.Column("previous_secret_expires_at", INSTANT, nullable=True))
    op.add_column("devices", sa.Column("proof_verifier", TEXT, nullable=True))
    op.add_column("sessions", sa.Column("route_key", TEXT, nullable=True))
    _fill_routes()
    op.create_index("idx_sessions_route", "sessions", ["route_key"], unique=True)
    op.create_index("idx_sessions_active", "sessions", ["last_active_at", "session_id"])
    op.create_index("idx_sessions_agent_active", "sessions", ["agent_id", "last_active_at", "session_id"])
    op.create_index("idx_sessions_sender_active", "sessions", ["sender_id", "last_active_at", "session_id"])
    op.create_index("idx_sessions_channel_active", "sessions", ["channel_id", "last_active_at", "session_id"])
