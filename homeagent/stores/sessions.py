"""The store of sessions."""

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
from homeagent.models.types import check_limit, check_optional_label, check_searched, not_after
from homeagent.stores.store import Store, check_kind, reading, writing

__all__ = ["SessionStore"]

_INDEX_BATCH = 1000

_table: Any = AgentSession.__table__
_columns: Any = _table.c
_agents: Any = Agent.__table__.c

_FIND = Statement[AgentSession](select(AgentSession).where(_columns.session_id == bindparam("id")), lock=True)
_BY_ROUTE = Statement[AgentSession](select(AgentSession).where(_columns.route_key == bindparam("route")), lock=True)
# This statement locks the agent's row until the end of the unit, so that no other unit can delete the agent before the
# session is added.
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
# The clause has no `index_elements`, so it applies to a conflict of the id and to a conflict of the route.
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
    """Return whether the session has this route. Do not compare the route key, which can be stale."""
    return session.agent_id == agent_id and session.sender_id == sender_id and session.channel_id == channel_id


class SessionStore(Store):
    """Store of sessions. The table is an index of the transcripts, and `index` rebuilds it from the transcripts."""

    __slots__ = ()

    @writing()
    def create(self, session: models.AgentSessionCreate) -> AgentSession:
        """Add a session. The session takes the route of its agent, sender and channel if the route is free.

        Raises:
            SessionExistsError: if a session with this id already exists. The existing session is not changed.
            AgentNotFoundError: if the agent does not exist.
        """
        check_kind(session, models.AgentSessionCreate, "session")
        now = self._unit.now()
        self._require_agent(session.agent_id)
        route = (session.agent_id, session.sender_id, session.channel_id)
        created = self._insert(session, now, route_key(*route))
        if created is None and self._unit.one(_FIND, id=session.session_id) is None:
            if self._release_stale(*route):
                created = self._insert(session, now, route_key(*route))
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
        if self._unit.one(_AGENT, agent_id=self._searched(agent_id, "agent_id")) is None:
            raise AgentNotFoundError(agent_id)

    @reading
    def find_by_id(self, session_id: str) -> AgentSession | None:
        """Return the session, or None if the session does not exist.

        In a write unit, no other writer can change the row until the unit ends.
        """
        return self._unit.one(_FIND, id=self._searched(session_id, "session_id"))

    @reading
    def get(self, session_id: str) -> AgentSession:
        """Return the session as `find_by_id` does, or raise SessionNotFoundError if the session does not exist."""
        session = self._unit.one(_FIND, id=self._searched(session_id, "session_id"))
        if session is None:
            raise SessionNotFoundError(session_id)
        return session

    def _route(self, agent_id: str, sender_id: str | None, channel_id: str | None) -> str:
        check_searched(agent_id, "agent_id")
        for value, what in ((sender_id, "sender_id"), (channel_id, "channel_id")):
            if value is not None:
                check_searched(value, what)
        return route_key(agent_id, sender_id, channel_id)

    def _find_resolved(
        self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None
    ) -> tuple[bool, AgentSession | None]:
        """Return two values: whether `resolve` has no row to write, and the result of `resolve` in that case."""
        session = self._unit.one(_BY_ROUTE, route=self._route(agent_id, sender_id, channel_id))
        return session is not None and _is_on(session, agent_id, sender_id, channel_id), session

    def _release_stale(self, agent_id: str, sender_id: str | None, channel_id: str | None) -> bool:
        """Clear the route key of a session that has another route now, and return whether there was such a session.

        An UPDATE of many rows in `uow.session`, or another program, can change a session without changing the route
        key.
        """
        route = route_key(agent_id, sender_id, channel_id)
        holder = self._unit.one(_BY_ROUTE, route=route)
        if holder is None or _is_on(holder, agent_id, sender_id, channel_id):
            return False
        return self._unit.write(_RELEASE_ROUTE, id=holder.session_id, route=route) > 0

    @writing(unless=_find_resolved)
    def resolve(self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None) -> AgentSession:
        """Return the session of a route. If the route has no session, create one session.

        Callers that run at the same time get the same session. A route can lack a sender or a channel. The returned
        session has the given agent, sender and channel, even if `uow.session` has changed rows.

        Raises:
            AgentNotFoundError: if the agent does not exist.
        """
        route = self._route(agent_id, sender_id, channel_id)
        while True:
            session = self._unit.one(_BY_ROUTE, route=route)
            if session is not None and _is_on(session, agent_id, sender_id, channel_id):
                return session
            check_optional_label(sender_id, "sender_id")
            check_optional_label(channel_id, "channel_id")
            self._require_agent(agent_id)
            if session is not None:
                self._release_stale(agent_id, sender_id, channel_id)
            now = self._unit.now()
            # If no row was inserted, another caller has taken the route. The next round of the loop reads that caller's
            # session. If that session was deleted in between, the round inserts again.
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
        """Return a page of sessions.

        The session with the latest activity comes first. Sessions with equal times are ordered by id, descending.

        Args:
            agent_id: agent of the selected sessions. Default: all agents.
            sender_id: sender of the selected sessions. Default: all senders.
            channel_id: channel of the selected sessions. Default: all channels.
            limit: maximum number of sessions, 1 or more.
            after: last session of the previous page. Default: the first page. If a session is added or touched between
                two calls, the next page still neither repeats nor skips other sessions.
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
            agent_id=None if agent_id is None else self._searched(agent_id, "agent_id"),
            sender_id=None if sender_id is None else self._searched(sender_id, "sender_id"),
            channel_id=None if channel_id is None else self._searched(channel_id, "channel_id"),
            limit=check_limit(limit),
            after_active=None if after is None else after.last_active_at,
            after_id=None if after is None else after.session_id,
        )

    @writing()
    def touch(self, session_id: str, at: datetime | None = None) -> bool:
        """Store the time of a session's last activity.

        The argument `at` is that time. If `at` is None (the default) or later than now, the current time is stored.
        Return False if the stored time is not earlier, or if the session does not exist.
        """
        session = self._searched(session_id, "session_id")
        return self._unit.write(_TOUCH, id=session, at=not_after(self._unit.now(), at, "at")) > 0

    @writing()
    def delete(self, session_id: str) -> bool:
        """Delete a session but not its transcript. Return False if the session did not exist."""
        return self._unit.write(_DELETE, id=self._searched(session_id, "session_id")) > 0

    @writing(stream=True)
    def index(self, sessions: Iterable[AgentSession], *, progress: Callable[[int], object] | None = None) -> int:
        """Add many sessions, or move the last activity of existing sessions forward.

        Use this method to rebuild the index of transcripts.

        An existing session keeps the agent, sender, channel and time of creation. In the given order, each new session
        takes the route of its agent, sender and channel if the route is free.

        Args:
            sessions: transient instances. The method reads the instances in batches to limit the memory. If
                `created_at` or `last_active_at` is later than now, the current time is stored instead.
            progress: function that is called after each batch with the number of sessions so far.

        Returns:
            The number of sessions.

        Raises:
            InvalidArgumentError: if an item is not a session. Roll the unit back, because earlier batches are already
                written.
            AgentNotFoundError: if a session's agent does not exist.
        """
        known: set[str] = set()
        now = self._unit.now()
        iterator = iter(sessions)
        total = 0
        while batch := list(islice(iterator, _INDEX_BATCH)):
            # Do not pass the generator itself. The generator reads agents, and no other statement can run during
            # `write_many`.
            self._unit.write_many(_INDEX, tuple(self._rows(batch, total, known, now)))
            total += len(batch)
            if progress is not None:
                progress(total)
        return total

    def _rows(self, batch: Sequence[AgentSession], before: int, known: set[str], now: datetime) -> Iterator[Parameters]:
        """Check the sessions of a batch and yield the parameters of each session.

        Add the id of each existing agent to `known`.
        """
        for number, session in enumerate(batch, before + 1):
            if not isinstance(session, AgentSession):
                raise InvalidArgumentError(f"number {number} is not an AgentSession but {type(session).__name__}")
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
