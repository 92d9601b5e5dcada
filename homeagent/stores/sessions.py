"""What can be done with sessions: create, resolve, list, touch, index, delete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from functools import cache
from itertools import islice
from typing import Any

from sqlalchemy import bindparam, case, delete, exists, null, select, tuple_, update

from homeagent import models
from homeagent.engine.statements import Parameters, Statement
from homeagent.errors import AgentNotFoundError, InvalidArgumentError, SessionExistsError, SessionNotFoundError
from homeagent.models.agent import Agent
from homeagent.models.session import AgentSession, new_session_id, route_key
from homeagent.models.types import check_identifier, check_limit, check_optional_label, not_after
from homeagent.stores.store import Store, check_kind, reading, writing

__all__ = ["SessionStore"]

_INDEX_BATCH = 1000

_table: Any = AgentSession.__table__
_columns: Any = _table.c
_agents: Any = Agent.__table__.c

_FIND = Statement[AgentSession](select(AgentSession).where(_columns.session_id == bindparam("id")), lock=True)
_BY_ROUTE = Statement[AgentSession](select(AgentSession).where(_columns.route_key == bindparam("route")), lock=True)
# The agent's row is shared until the end of the unit: it can't be deleted under a session that is being made.
_AGENT = Statement[str](
    select(_agents.id).where(_agents.id == bindparam("agent_id")).with_for_update(read=True, key_share=True)
)
_VALUES: dict[str, Any] = {
    "session_id": bindparam("session_id"),
    "agent_id": bindparam("agent_id"),
    "sender_id": bindparam("sender_id"),
    "channel_id": bindparam("channel_id"),
    "created_at": bindparam("created_at"),
    "last_active_at": bindparam("last_active_at"),
    "route_key": bindparam("route"),
}
# Without a target, the conflict may be on the id or on the route.
_CREATE = Statement[AgentSession](
    lambda insert: insert(_table).values(_VALUES).on_conflict_do_nothing(), returning=AgentSession
)
_RELEASE_ROUTE = Statement[AgentSession](
    update(AgentSession)
    .where(_columns.session_id == bindparam("id"), _columns.route_key == bindparam("route"))
    .values(route_key=None)
)
_TOUCH = Statement[AgentSession](
    update(AgentSession)
    .where(_columns.session_id == bindparam("id"), _columns.last_active_at < bindparam("at"))
    .values(last_active_at=bindparam("at"))
)
_DELETE = Statement[AgentSession](delete(AgentSession).where(_columns.session_id == bindparam("id")))
_INDEX = Statement[AgentSession](
    lambda insert: (
        statement := insert(_table).values(
            session_id=bindparam("session_id"),
            agent_id=bindparam("agent_id"),
            sender_id=bindparam("sender_id"),
            channel_id=bindparam("channel_id"),
            created_at=bindparam("created_at"),
            last_active_at=bindparam("last_active_at"),
            route_key=case(
                (exists().where(_columns.route_key == bindparam("route")), null()),
                else_=bindparam("route", type_=_columns.route_key.type),
            ),
        )
    ).on_conflict_do_update(
        index_elements=["session_id"],
        set_={
            "last_active_at": case(
                (statement.excluded.last_active_at > _columns.last_active_at, statement.excluded.last_active_at),
                else_=_columns.last_active_at,
            )
        },
    )
)


@cache
def _list(*, agent: bool, sender: bool, channel: bool, after: bool) -> Statement[AgentSession]:
    conditions: list[Any] = []
    if agent:
        conditions.append(_columns.agent_id == bindparam("agent_id"))
    if sender:
        conditions.append(_columns.sender_id == bindparam("sender_id"))
    if channel:
        conditions.append(_columns.channel_id == bindparam("channel_id"))
    if after:
        conditions.append(
            tuple_(_columns.last_active_at, _columns.session_id)
            < tuple_(
                bindparam("after_active", type_=_columns.last_active_at.type),
                bindparam("after_id", type_=_columns.session_id.type),
            )
        )
    return Statement(
        select(AgentSession)
        .where(*conditions)
        .order_by(_columns.last_active_at.desc(), _columns.session_id.desc())
        .limit(bindparam("limit"))
    )


def _is_on(session: AgentSession, agent_id: str, sender_id: str | None, channel_id: str | None) -> bool:
    return session.agent_id == agent_id and session.sender_id == sender_id and session.channel_id == channel_id


class SessionStore(Store):
    """The index of sessions. The transcripts are the truth; this can be rebuilt from them with `index`."""

    __slots__ = ()

    @writing()
    def create(self, session: models.AgentSessionCreate) -> AgentSession:
        """Add a session. It becomes the one of its agent, sender and channel where there is none yet.

        Raises:
            SessionExistsError: the id is taken; that session is left as it is.
            AgentNotFoundError: its agent is absent.
        """
        check_kind(session, models.AgentSessionCreate, "session")
        now = self._unit.now()
        self._require_agent(session.agent_id)
        asked = (session.agent_id, session.sender_id, session.channel_id)
        created = self._insert(session, now, route_key(*asked))
        if created is None and self._unit.one(_FIND, id=session.session_id) is None:
            if self._release_stale(*asked):
                created = self._insert(session, now, route_key(*asked))
            if created is None:
                created = self._insert(session, now, None)
        if created is None:
            raise SessionExistsError(session.session_id)
        return created

    def _insert(self, session: models.AgentSessionCreate, now: datetime, route: str | None) -> AgentSession | None:
        return self._unit.write_one(
            _CREATE,
            session_id=session.session_id,
            agent_id=session.agent_id,
            sender_id=session.sender_id,
            channel_id=session.channel_id,
            created_at=now,
            last_active_at=now,
            route=route,
        )

    def _require_agent(self, agent_id: str) -> None:
        if self._unit.one(_AGENT, agent_id=check_identifier(agent_id, "agent_id")) is None:
            raise AgentNotFoundError(agent_id)

    @reading
    def find_by_id(self, session_id: str) -> AgentSession | None:
        """Return the session, None where it is absent. In a write unit it may be decided on."""
        return self._unit.one(_FIND, id=check_identifier(session_id, "session_id"))

    @reading
    def get(self, session_id: str) -> AgentSession:
        """Return the session. In a write unit it may be decided on.

        Raises:
            SessionNotFoundError: it is absent.
        """
        session = self._unit.one(_FIND, id=check_identifier(session_id, "session_id"))
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def _route(self, agent_id: str, sender_id: str | None, channel_id: str | None) -> str:
        check_identifier(agent_id, "agent_id")
        check_optional_label(sender_id, "sender_id")
        check_optional_label(channel_id, "channel_id")
        return route_key(agent_id, sender_id, channel_id)

    def _resolved(
        self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None
    ) -> tuple[bool, AgentSession | None]:
        session = self._unit.one(_BY_ROUTE, route=self._route(agent_id, sender_id, channel_id))
        return session is not None and _is_on(session, agent_id, sender_id, channel_id), session

    def _release_stale(self, agent_id: str, sender_id: str | None, channel_id: str | None) -> bool:
        """Take a route from a session that is no longer on it, and return whether there was such a session.

        An UPDATE over many rows in `uow.session`, or another program, changes a session without its route key.
        """
        route = route_key(agent_id, sender_id, channel_id)
        holder = self._unit.one(_BY_ROUTE, route=route)
        if holder is None or _is_on(holder, agent_id, sender_id, channel_id):
            return False
        return self._unit.write(_RELEASE_ROUTE, id=holder.session_id, route=route) > 0

    @writing(unless=_resolved)
    def resolve(self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None) -> AgentSession:
        """Return the one session of an agent, a sender and a channel, and make it if there is none.

        No sender equals no sender, and no channel no channel. Whoever asks at once gets the same session. The session
        always has the agent, sender and channel asked for, also after `uow.session` changed rows.

        Raises:
            AgentNotFoundError: the agent is absent.
        """
        route = self._route(agent_id, sender_id, channel_id)
        while True:
            session = self._unit.one(_BY_ROUTE, route=route)
            if session is not None and _is_on(session, agent_id, sender_id, channel_id):
                return session
            self._require_agent(agent_id)
            if session is not None:
                self._release_stale(agent_id, sender_id, channel_id)
            now = self._unit.now()
            # One who was faster has it now; one who deletes it in between makes the loop go round.
            session = self._unit.write_one(
                _CREATE,
                session_id=new_session_id(),
                agent_id=agent_id,
                sender_id=sender_id,
                channel_id=channel_id,
                created_at=now,
                last_active_at=now,
                route=route,
            )
            if session is not None:
                return session

    @reading
    def list(
        self,
        *,
        agent_id: str | None = None,
        sender_id: str | None = None,
        channel_id: str | None = None,
        limit: int = 100,
        after: AgentSession | None = None,
    ) -> Sequence[AgentSession]:
        """Return a page of sessions, last active first, equal instants by id.

        Args:
            agent_id: only those of this agent; None for all.
            sender_id: only those of this sender; None for all.
            channel_id: only those on this channel; None for all.
            limit: how many at most, 1 or more.
            after: the last session of the page before; None for the first page. Rows that are added or touched in
                between neither repeat nor hide the others.
        """
        if after is not None and not isinstance(after, AgentSession):
            raise InvalidArgumentError("after must be the last session of the page before")
        statement = _list(
            agent=agent_id is not None,
            sender=sender_id is not None,
            channel=channel_id is not None,
            after=after is not None,
        )
        return self._unit.all(
            statement,
            agent_id=None if agent_id is None else check_identifier(agent_id, "agent_id"),
            sender_id=check_optional_label(sender_id, "sender_id"),
            channel_id=check_optional_label(channel_id, "channel_id"),
            limit=check_limit(limit),
            after_active=None if after is None else after.last_active_at,
            after_id=None if after is None else after.session_id,
        )

    @writing()
    def touch(self, session_id: str, at: datetime | None = None) -> bool:
        """Remember when a session was active. Never creates one, never moves back.

        Args:
            session_id: the session.
            at: when; None for now. A time later than now counts as now.

        Returns:
            False where nothing was written: the session is absent, or was active as late already.
        """
        check_identifier(session_id, "session_id")
        return self._unit.write(_TOUCH, id=session_id, at=not_after(self._unit.now(), at, "at")) > 0

    @writing()
    def delete(self, session_id: str) -> bool:
        """Remove a session from the index; False where it was absent. Its transcript is not touched."""
        return self._unit.write(_DELETE, id=check_identifier(session_id, "session_id")) > 0

    @writing(stream=True)
    def index(self, sessions: Iterable[AgentSession], *, progress: Callable[[int], object] | None = None) -> int:
        """Add many sessions at once, or move on those that exist, as when the index is rebuilt from transcripts.

        A session that exists keeps its agent, sender, channel and time of creation; its last activity moves forward
        only. In the order given, each takes the route of its agent, sender and channel where that is free.

        Args:
            sessions: transient instances; read one batch at a time, so that memory stays bounded. A `created_at` or
                `last_active_at` later than now counts as now.
            progress: called after each batch with the number of sessions so far.

        Returns:
            How many there were.

        Raises:
            InvalidArgumentError: one of them is no session; the message has its number, from 1. The whole unit
                should be given up then.
            AgentNotFoundError: one names an absent agent.
        """
        known: set[str] = set()
        now = self._unit.now()
        iterator = iter(sessions)
        total = 0
        while batch := list(islice(iterator, _INDEX_BATCH)):
            # Checked as a whole before it is written: a statement can't run in the middle of another one.
            self._unit.write_many(_INDEX, tuple(self._rows(batch, total, known, now)))
            total += len(batch)
            if progress is not None:
                progress(total)
        return total

    def _rows(self, batch: Sequence[AgentSession], before: int, known: set[str], now: datetime) -> Iterator[Parameters]:
        for number, session in enumerate(batch, before + 1):
            if not isinstance(session, AgentSession):
                raise InvalidArgumentError(f"number {number} is no AgentSession but {type(session).__name__}")
            if session.agent_id not in known:
                self._require_agent(session.agent_id)
                known.add(session.agent_id)
            route = route_key(session.agent_id, session.sender_id, session.channel_id)
            yield {
                **session.__dict__,
                "created_at": min(session.created_at, now),
                "last_active_at": min(session.last_active_at, now),
                "route": route,
            }
