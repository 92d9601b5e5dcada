"""A session is a conversation of an agent."""

import hashlib
import os
import time
import uuid
from json.encoder import encode_basestring
from typing import Any, ClassVar

from sqlalchemy import Column, Connection, Index, event, exists, inspect, update
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import set_committed_value
from sqlmodel import Field

from homeagent.errors import ConflictError
from homeagent.models.base import Table
from homeagent.models.types import Identifier, Json, JsonColumn, Label, Name, SessionId, Timestamp

ROUTE_INDEX = "idx_sessions_route"
"""Name of the unique index of the route keys. PostgreSQL names the index in an error."""


def new_session_id() -> str:
    """Return a new UUIDv7 (RFC 9562, section 5.7). SQLite adds each new id at the end of the index."""
    stamp = (time.time_ns() // 1_000_000) & ((1 << 48) - 1)
    noise = int.from_bytes(os.urandom(10), "big")
    value = stamp << 80 | 0x7 << 76 | (noise >> 68 & 0xFFF) << 64 | 0b10 << 62 | noise & ((1 << 62) - 1)
    return str(uuid.UUID(int=value))


def route_key(agent_id: str, sender_id: str | None, channel_id: str | None) -> str:
    """Return the hash of a route, for a unique index. A unique index of the three columns would treat two NULLs as
    different values.
    """
    sender = "null" if sender_id is None else encode_basestring(sender_id)
    channel = "null" if channel_id is None else encode_basestring(channel_id)
    return hashlib.sha256(
        f"[{encode_basestring(agent_id)},{sender},{channel}]".encode(errors="surrogatepass")
    ).hexdigest()


class AgentSession(Table, table=True):
    """A row of the table `sessions`."""

    __tablename__ = "sessions"
    __table_args__: ClassVar[Any] = (
        Index("idx_sessions_agent", "agent_id"),
        Index("idx_sessions_sender", "sender_id"),
        # The method `sessions.list()` uses the next four indexes.
        Index("idx_sessions_active", "last_active_at", "session_id"),
        Index("idx_sessions_agent_active", "agent_id", "last_active_at", "session_id"),
        Index("idx_sessions_sender_active", "sender_id", "last_active_at", "session_id"),
        Index("idx_sessions_channel_active", "channel_id", "last_active_at", "session_id"),
        # `resolve()` uses this index to find the last active session of a route.
        Index("idx_sessions_agent_sender_channel", "agent_id", "sender_id", "channel_id"),
        Index(ROUTE_INDEX, "route_key", unique=True),
    )

    session_id: SessionId = Field(primary_key=True, description="Id of the conversation, and of its transcript.")
    agent_id: Identifier = Field(foreign_key="agents.id", description="Agent that has the conversation.")
    sender_id: Label | None = Field(
        default=None, description="Null for a session without a sender, such as a scheduled session."
    )
    channel_id: Label | None = Field(default=None, description="Null for a session without a channel.")
    created_at: Timestamp = Field(description="Time at which the conversation began.")
    last_active_at: Timestamp = Field(description="Time of the last message.")
    route_key: Name | None = Field(
        default=None,
        repr=False,
        exclude=True,
        description=(
            "Key of the session's route. For a route, `sessions.resolve()` returns the session with the key. Null if"
            " the session does not hold its route."
        ),
    )
    metadata_: Json = Field(
        default=None,
        alias="metadata",
        sa_column=Column("metadata", JsonColumn),
        description="Data of the application, as JSON, such as a title or token counts.",
    )

    def __eq__(self, other: object) -> bool:
        """Compare the fields of two sessions, except `route_key`, which changes if another session takes the route."""
        if not isinstance(other, AgentSession):
            return NotImplemented
        names = type(self).model_fields.keys() - {"route_key"}
        mine, others = ({name: each.__dict__[name] for name in names & each.__dict__.keys()} for each in (self, other))
        return mine == others


# SQLAlchemy calls the following listeners only for `uow.session`. The sessions store sets `route_key` in its own
# statements.

_ROUTE = ("agent_id", "sender_id", "channel_id", "route_key")


def _changes_route(session: AgentSession) -> bool:
    """Return True if the flush changes a column of the session's route."""
    attributes = inspect(session).attrs
    return any(attributes[name].history.has_changes() for name in _ROUTE)


@event.listens_for(AgentSession, "before_insert")
@event.listens_for(AgentSession, "before_update")
def _clear_route(mapper: Mapper[Any], connection: Connection, session: AgentSession) -> None:
    """If the flush changes the session's route, set `route_key` to None. Another session can hold the new route."""
    if _changes_route(session):
        session.route_key = None


@event.listens_for(AgentSession, "after_insert")
@event.listens_for(AgentSession, "after_update")
def _take_route(mapper: Mapper[Any], connection: Connection, session: AgentSession) -> None:
    """Set the session's `route_key` if no other session holds the route."""
    if not _changes_route(session):
        return
    table: Any = mapper.local_table
    route = route_key(session.agent_id, session.sender_id, session.channel_id)
    is_taken = exists().where(table.c.route_key == route).correlate(None)
    take = update(table).where(table.c.session_id == session.session_id, ~is_taken)
    try:
        with connection.begin_nested():
            taken = connection.execute(take.values(route_key=route)).rowcount > 0
    except ConflictError:
        taken = False  # on PostgreSQL, another transaction inserted the same route while the statement waited
    if taken:
        set_committed_value(session, "route_key", route)
