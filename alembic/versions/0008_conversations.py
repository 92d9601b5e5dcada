"""Add metadata and an index to sessions, and compute the route keys again.

The index serves the search for the last active session of a route. Each route goes to one of its sessions: to the last
active session with a route key, or to the last active session if no session of the route has a key. The other sessions
of the route have no key and can still be found by id.

Revision ID: 0008
Revises: 0007
"""

import hashlib
import json
from typing import Any

import sqlalchemy as sa

from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"
branch_labels: str | None = None
depends_on: str | None = None

BATCH = 1000

PLACED = (
    "SELECT session_id, agent_id, sender_id, channel_id, route_key, row_number() OVER ("
    " PARTITION BY agent_id, sender_id, channel_id"
    " ORDER BY route_key IS NULL, last_active_at DESC, created_at DESC, session_id DESC) AS place"
    " FROM sessions"
)


def _route(*parts: Any) -> str | None:
    # This is a copy of homeagent.models.session.route_key at this revision. Do not change the copy.
    if not all(part is None or isinstance(part, str) for part in parts):
        return None  # SQLite can hold a value that is not text
    route = json.dumps(parts, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(route.encode()).hexdigest()


def _compute_routes_again() -> None:
    connection = op.get_bind()
    sessions = sa.table("sessions", sa.column("session_id"), sa.column("route_key"))
    update = sa.update(sessions).where(sessions.c.session_id == sa.bindparam("id"))
    changes: list[dict[str, str | None]] = []
    for session_id, *parts, key, place in connection.execute(sa.text(PLACED)):
        right = _route(*parts) if place == 1 else None
        if key != right:
            changes.append({"id": session_id, "key": right})
    # Release all wrong keys first, because the index of the keys is unique.
    for key in (sa.null(), sa.bindparam("key")):
        for start in range(0, len(changes), BATCH):
            connection.execute(update.values(route_key=key), changes[start : start + BATCH])


def upgrade() -> None:
    """Bring the schema to this revision."""
    op.add_column("sessions", sa.Column("metadata", sa.Text(), nullable=True))
    _compute_routes_again()
    op.create_index("idx_sessions_agent_sender_channel", "sessions", ["agent_id", "sender_id", "channel_id"])
