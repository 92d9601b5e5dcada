"""The store of sessions. A route is the combination of agent, sender and channel. At most one session holds a route.

| event | holder of the route afterwards |
|---|---|
| `start()` | the new session |
| `create()`, or a flush of `uow.session` that adds a session or moves a session to a free route | that session |
| `resolve()` on a free route | the last active session, or a new session if the route has none |
| `move()` to a free route | the moved session; its old route goes to the last active session that remains |
| `index()` | the last active session |
| `delete()`, or a flush of `uow.session` deletes or moves the holder | none: the route is free |

The last active session has the latest `last_active_at`. For equal activity, the later `created_at` decides. For equal
times of creation, the greater id decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from itertools import cycle, islice
from operator import itemgetter
from types import EllipsisType
from typing import Any

from pydantic import JsonValue

from homeagent import errors, models
from homeagent.engine.statements import Parameters
from homeagent.frame_locals import clears_locals
from homeagent.models.session import ROUTE_INDEX, AgentSession, new_session_id, route_key
from homeagent.models.types import check_limit, check_optional_label, check_searched, not_after
from homeagent.stores import session_statements as statements
from homeagent.stores.store import Store, check_kind, reading, writing

_INDEX_BATCH = 1000


def _route_of(agent_id: str, sender_id: str | None, channel_id: str | None) -> Parameters:
    """Return a route as parameters for the statements. An old session can contain texts that are no longer valid."""
    route: Parameters = {"agent_id": agent_id, "sender_id": sender_id, "channel_id": channel_id}
    for name, value in route.items():
        if value is not None or name == "agent_id":
            check_searched(value, name)
    return {**route, "route": route_key(agent_id, sender_id, channel_id)}


def _is_on(session: AgentSession, route: Parameters) -> bool:
    """Return True if the session is on the route. Do not compare the route keys, because a stored key can be stale."""
    # A look-up in the instance's dictionary is faster than an access to an attribute.
    values = session.__dict__
    return bool(
        values["agent_id"] == route["agent_id"]
        and values["sender_id"] == route["sender_id"]
        and values["channel_id"] == route["channel_id"]
    )


def _given(route: Parameters) -> frozenset[str]:
    """Return the names of the route's values that are not None."""
    return frozenset(name for name in statements.ROUTE if route[name] is not None)


class SessionStore(Store):
    """Store of sessions. The table is an index of the application's transcripts."""

    __slots__ = ()

    @writing()
    def create(self, session: models.AgentSessionCreate) -> AgentSession:
        """Add a session. If the route is free, the new session takes the route.

        Raises:
            SessionExistsError: if a session with this id already exists.
            AgentNotFoundError: if the agent does not exist.
        """
        check_kind(session, models.AgentSessionCreate, "session")
        self._require_agent(session.agent_id)
        now = self._unit.now()
        route = _route_of(session.agent_id, session.sender_id, session.channel_id)
        created = self._insert(route, session.session_id, now, session.metadata_)
        if created is None and self._unit.one(statements.FIND, id=session.session_id) is None:
            if self._unit.write(statements.RELEASE_STALE, **route):
                created = self._insert(route, session.session_id, now, session.metadata_)
            if created is None:
                created = self._insert({**route, "route": None}, session.session_id, now, session.metadata_)
        if created is None:
            raise errors.SessionExistsError(session.session_id)
        return created

    def _insert(
        self, route: Parameters, session_id: str, now: datetime, metadata: JsonValue = None
    ) -> AgentSession | None:
        """Add a session that holds the route. If the id exists or another session holds the route, return None."""
        return self._unit.write_one(
            statements.CREATE, session_id=session_id, metadata_=metadata, created_at=now, last_active_at=now, **route
        )

    def _require_agent(self, agent_id: str) -> None:
        """Raise AgentNotFoundError if the agent does not exist. On PostgreSQL, lock the agent against deletion."""
        if self._unit.one(statements.AGENT, agent_id=self._searched(agent_id, "agent_id")) is None:
            raise errors.AgentNotFoundError(agent_id)

    @reading
    def find_by_id(self, session_id: str) -> AgentSession | None:
        """Return the session, or None if the session does not exist."""
        return self._unit.one(statements.FIND, id=self._searched(session_id, "session_id"))

    @reading
    def get(self, session_id: str) -> AgentSession:
        """Call `find_by_id()`, and raise `SessionNotFoundError` if the session does not exist."""
        session = self._unit.one(statements.FIND, id=self._searched(session_id, "session_id"))
        if session is None:
            raise errors.SessionNotFoundError(session_id)
        return session

    def _find_resolved(
        self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None
    ) -> tuple[bool, AgentSession | None]:
        """If a session holds the route, return `(True, session)`. Otherwise return `(False, None)`, so that `resolve()`
        begins a write.
        """
        route = _route_of(agent_id, sender_id, channel_id)
        session = self._unit.one(statements.BY_ROUTE, route=route["route"])
        return (True, session) if session is not None and _is_on(session, route) else (False, None)

    @writing(unless=_find_resolved)
    def resolve(self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None) -> AgentSession:
        """Return the session that holds a route.

        If the route has sessions but no holder, the last active session becomes the holder. If the route has no
        session, the method adds a session. Simultaneous calls for a route get the same session.

        Raises:
            AgentNotFoundError: if the agent does not exist.
        """
        route = _route_of(agent_id, sender_id, channel_id)
        # Repeat, because another caller can change the sessions between two statements.
        while True:
            session = self._unit.one(statements.BY_ROUTE, route=route["route"])
            if session is not None and _is_on(session, route):
                return session
            self._require_agent(agent_id)
            if session is not None:
                self._unit.write(statements.RELEASE_STALE, **route)
            # If the database can't store a text, no session can match.
            is_text = None not in (
                self._searched(sender_id or "", "sender_id"),
                self._searched(channel_id or "", "channel_id"),
            )
            if is_text and self._unit.one(statements.last_active(_given(route)), **route) is not None:
                self._unless_taken(self._unit.write, statements.give(_given(route)), **route)
                continue
            # Only a new session needs valid texts, so check the texts after the search.
            check_optional_label(sender_id, "sender_id")
            check_optional_label(channel_id, "channel_id")
            created = self._insert(route, new_session_id(), self._unit.now())
            if created is not None:
                return created

    def _unless_taken(self, write: Callable[..., object], *arguments: Any, **parameters: Any) -> bool:
        """Call a function that sets route keys. If another transaction has taken a route, undo the changes and return
        False.
        """
        try:
            with self._unit.savepoint():
                write(*arguments, **parameters)
        except errors.ConflictError as error:
            if error.constraint != ROUTE_INDEX:
                raise
            return False
        return True

    @writing()
    def start(self, *, agent_id: str, sender_id: str | None = None, channel_id: str | None = None) -> AgentSession:
        """Begin a new conversation. Add a session that takes the route. The method does not delete the previous holder
        of the route. If the agent does not exist, raise `AgentNotFoundError`.
        """
        check_optional_label(sender_id, "sender_id")
        check_optional_label(channel_id, "channel_id")
        route = _route_of(agent_id, sender_id, channel_id)
        self._require_agent(agent_id)
        now = self._unit.now()
        started = None
        # A trigger of the application can refuse the new session. Then the holder must keep the route.
        with self._unit.savepoint():
            # Repeat if another caller takes the route before the insert.
            while started is None:
                self._unit.write(statements.RELEASE, route=route["route"])
                started = self._insert(route, new_session_id(), now)
        return started

    @writing()
    def move(
        self,
        session_id: str,
        *,
        agent_id: str | EllipsisType = ...,
        sender_id: str | EllipsisType | None = ...,
        channel_id: str | EllipsisType | None = ...,
    ) -> AgentSession:
        """Change the agent, sender or channel of a session. Return the session, which holds the new route.

        If the old route loses its holder, the last active session on the old route becomes the holder. With only
        `session_id=`, the session keeps its route, and becomes the route's holder.

        Args:
            session_id: id of the session.
            agent_id: the new agent. Default: the session keeps the agent.
            sender_id: the new sender, or None for no sender. Default: the session keeps the sender.
            channel_id: the new channel, or None for no channel. Default: the session keeps the channel.

        Raises:
            SessionNotFoundError: if the session does not exist.
            AgentNotFoundError: if the new agent does not exist.
            RouteTakenError: if another session holds the new route. The error has the id of the other session in
                `error.session_id`.
        """
        # Lock the agent before the session, like `agents.delete()`, to prevent a deadlock.
        agent = (
            None if agent_id is ... else self._unit.one(statements.AGENT, agent_id=self._searched(agent_id, "agent_id"))
        )
        session = self.get(session_id)
        if agent is None and agent_id is not ...:
            raise errors.AgentNotFoundError(agent_id)
        old = _route_of(session.agent_id, session.sender_id, session.channel_id)
        route = _route_of(
            session.agent_id if agent_id is ... else agent_id,
            session.sender_id if sender_id is ... else check_optional_label(sender_id, "sender_id"),
            session.channel_id if channel_id is ... else check_optional_label(channel_id, "channel_id"),
        )
        moved = False
        # A trigger of the application can refuse the last change. Then the session must stay on the old route.
        with self._unit.savepoint():
            while not moved:
                holder = self._unit.one(statements.BY_ROUTE_UNLOCKED, route=route["route"])
                if holder is not None and holder.session_id != session_id:
                    if _is_on(holder, route):
                        raise errors.RouteTakenError(holder.session_id)
                    self._unit.write(statements.RELEASE_STALE, **route)
                moved = self._unless_taken(self._unit.write, statements.MOVE, id=session_id, **route)
            if session.route_key == old["route"] != route["route"]:
                self._unless_taken(self._unit.write, statements.give(_given(old)), **old)
        return self.get(session_id)

    @reading
    @clears_locals
    def list(
        self,
        *,
        agent_id: str | None = None,
        sender_id: str | None = None,
        channel_id: str | None = None,
        limit: int = 100,
        after: AgentSession | None = None,
    ) -> Sequence[AgentSession]:
        """Return a page of sessions. The session with the latest activity comes first.

        Args:
            agent_id: agent of the selected sessions. Default: all agents.
            sender_id: sender of the selected sessions. Default: all senders.
            channel_id: channel of the selected sessions. Default: all channels.
            limit: maximum number of sessions, 1 or more.
            after: last session of the previous page. Default: the first page. Each unchanged session appears on exactly
                one page.
        """
        given = {"agent_id": agent_id, "sender_id": sender_id, "channel_id": channel_id}
        filters: Parameters = {name: self._searched(each, name) for name, each in given.items() if each is not None}
        if after is not None:
            check_kind(after, AgentSession, "after")
            filters |= {"after_active": after.last_active_at, "after_id": after.session_id}
        return self._unit.all(statements.page_of(frozenset(filters)), limit=check_limit(limit), **filters)

    @writing()
    def touch(self, session_id: str, at: datetime | None = None) -> bool:
        """Store the time of a session's last activity. Without `at=…`, or for a future time, store the current time.
        Return True if the method changed the stored time.
        """
        session = self._searched(session_id, "session_id")
        return self._unit.write(statements.TOUCH, id=session, at=not_after(self._unit.now(), at, "at")) > 0

    @writing()
    def update(self, session_id: str, changes: models.AgentSessionUpdate) -> AgentSession:
        """Set the given fields, and return the session. If the session is absent, raise `SessionNotFoundError`."""
        check_kind(changes, models.AgentSessionUpdate, "changes")
        if "metadata_" not in changes.model_fields_set:
            return self.get(session_id)
        session = self._unit.write_one(
            statements.UPDATE_METADATA, id=self._searched(session_id, "session_id"), value=changes.metadata_
        )
        if session is None:
            raise errors.SessionNotFoundError(session_id)
        return session

    @writing()
    def delete(self, session_id: str) -> bool:
        """Delete a session, and free its route. The transcript stays. If the session is absent, return False.

        After the deletion of a holder, `create()` and `move()` can take the free route. The method `resolve()` gives
        the free route to the last active session that remains.
        """
        return self._unit.write(statements.DELETE, id=self._searched(session_id, "session_id")) > 0

    @writing()
    def index(self, sessions: Iterable[AgentSession], *, progress: Callable[[int], object] | None = None) -> int:
        """Rebuild the index of transcripts. Return the number of sessions that the method has read.

        Add each new session. For an existing session, only replace `last_active_at` by a later time. The last active
        session on each affected route becomes the holder.

        Args:
            sessions: transient `AgentSession` objects, which the method reads in batches. Times in the future count as
                the current time.
            progress: function that gets the number of written sessions after each batch. If a call of
                `database.sessions.index` is repeated after a conflict, the number begins again.

        Raises:
            InvalidArgumentError: if the argument `sessions=` is not an iterable, or an item is not a session. After the
                error, roll back the unit, which contains earlier batches.
            AgentNotFoundError: if a session's agent does not exist. The message begins with the session's number.
        """
        if not isinstance(sessions, Iterable):
            raise errors.InvalidArgumentError(
                f"sessions must be an iterable of AgentSession, not {type(sessions).__name__}"
            )
        known: set[str] = set()
        now = self._unit.now()
        iterator = iter(sessions)
        total = 0
        while batch := list(islice(iterator, _INDEX_BATCH)):
            # Finish the generator before the write, because the generator reads the database.
            rows = sorted(self._rows(batch, total, known, now), key=itemgetter("last_active_at"), reverse=True)
            while not self._unless_taken(self._index_rows, rows):
                pass  # try again, because another transaction has taken a route (only on PostgreSQL)
            total += len(batch)
            if progress is not None:
                progress(total)
        return total

    def _index_rows(self, rows: Sequence[Parameters]) -> None:
        """Write rows that are in descending order of `last_active_at`. The first new session of a free route takes the
        route. Then give the route of each written session to the last active session.
        """
        self._unit.write_many(statements.INDEX, rows)
        routes: dict[frozenset[str], dict[str, Parameters]] = {}
        held: set[str] = set()
        by_id = {row["session_id"]: row for row in rows}
        # Each count of ids needs its own statement, and the compilation is slow. Use only powers of two as counts.
        count = 1 << (len(by_id) - 1).bit_length()
        ids = {f"id{number}": session_id for number, session_id in zip(range(count), cycle(by_id), strict=False)}
        # Read the stored routes, because a row can name an earlier route of a moved session.
        for session_id, key, *names in self._unit.all(statements.routes_of(count), **ids):
            route = by_id[session_id]
            if names != [route[name] for name in statements.ROUTE]:
                route = _route_of(*names)
            routes.setdefault(_given(route), {})[route["route"]] = route
            if key == route["route"]:
                held.add(key)
        for given, by_key in routes.items():
            released = self._unit.write_many(statements.release_earlier(given), by_key.values())
            if released or not held.issuperset(by_key):
                self._unit.write_many(statements.give(given), by_key.values())

    def _rows(self, batch: Sequence[AgentSession], before: int, known: set[str], now: datetime) -> Iterator[Parameters]:
        """Check each session of a batch, and yield its parameters. Add ids of existing agents to `known=`."""
        for number, session in enumerate(batch, before + 1):
            check_kind(session, AgentSession, f"number {number}")
            if session.agent_id not in known:
                try:
                    self._require_agent(session.agent_id)
                except errors.AgentNotFoundError as error:
                    error.args = (f"number {number}: {error}",)
                    raise
                known.add(session.agent_id)
            yield {
                **session.__dict__,
                "created_at": min(session.created_at, now),
                "last_active_at": min(session.last_active_at, now),
                "route": route_key(session.agent_id, session.sender_id, session.channel_id),
            }
