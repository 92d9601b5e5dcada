"""A model of the stores of agents and sessions, with changes by the stores and by the ORM."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from sqlalchemy import update

from homeagent import AgentCreate, AgentSession, AgentSessionCreate, AgentSessionUpdate, errors
from homeagent.models.session import route_key
from tests.stores.state_machine import MINUTE, MS, Machine, action, names

Route = tuple[str, str | None, str | None]
ROUTE = ("agent_id", "sender_id", "channel_id")
_column: Any = AgentSession.__table__.c

routes: st.SearchStrategy[Route] = st.tuples(
    st.sampled_from(["a", "a", "b/c", "c"]), st.sampled_from([None, "x"]), st.sampled_from([None, None, "y"])
)


def few(machine: Any) -> bool:
    """Return whether there are so few sessions that another can be added."""
    return len(machine.rows) < 12


def some(machine: Any) -> bool:
    """Return whether there are sessions."""
    return bool(machine.rows)


def arguments(route: Route) -> dict[str, Any]:
    """Return the route as arguments of a method."""
    return dict(zip(ROUTE, route, strict=True))


class SessionMachine(Machine):
    """Agents and sessions. The model has the values of each session, and the session that has the key of each route.

    An UPDATE statement can move a session that has a key. The key is then stale until another call needs the route.
    """

    @initialize()
    def open(self) -> None:
        self.start_empty()
        self.agents: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.keys: dict[Route, str] = {}
        self.names = iter(f"{letter}-{number}" for number in range(10_000) for letter in "zA")
        for agent in ("a", "b/c"):
            self.create_agent(agent)

    # The model

    def route_of(self, name: str) -> Route:
        row = self.rows[name]
        return row["agent_id"], row["sender_id"], row["channel_id"]

    def activity(self, name: str) -> tuple[datetime, datetime, str]:
        """Return the values by which the last active of several sessions is chosen."""
        return self.rows[name]["last_active_at"], self.rows[name]["created_at"], name

    def last_active(self, route: Route) -> str | None:
        return max((name for name in self.rows if self.route_of(name) == route), key=self.activity, default=None)

    def holder(self, route: Route) -> str | None:
        """Return the session that holds the route. A session with a stale key does not hold the route."""
        name = self.keys.get(route)
        return name if name is not None and self.route_of(name) == route else None

    def release(self, name: str) -> Route | None:
        """Take the key from a session, and return the route of the key."""
        found = [route for route, holder in self.keys.items() if holder == name]
        for route in found:
            del self.keys[route]
        return found[0] if found else None

    def give(self, route: Route) -> None:
        """Give the route to its last active session, if there is one."""
        self.keys.pop(route, None)
        name = self.last_active(route)
        if name is not None:
            self.release(name)
            self.keys[route] = name

    def add(self, name: str, route: Route, created: datetime, active: datetime, metadata: Any = None) -> None:
        times = {"created_at": created, "last_active_at": active}
        self.rows[name] = {**arguments(route), **times, "metadata_": metadata}

    def forget(self, name: str) -> None:
        self.release(name)
        del self.rows[name]

    def draw(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(list(self.rows)))

    def draw_route(self, data: st.DataObject) -> Route:
        """Choose a route, which in half of the cases is the route of a key or of a session."""
        known = [*self.keys, *self.keys, *map(self.route_of, self.rows)]
        return data.draw(st.sampled_from(known) | routes if known else routes)

    # Agents

    @action(agent=names)
    def create_agent(self, agent: str) -> None:
        got = self.attempt("agents", "create", AgentCreate(id=agent, name=agent, workspace_path="/srv"))
        assert (got is errors.AgentExistsError) is (agent in self.agents)
        self.agents.add(agent)

    @action(agent=names, whole=st.booleans())
    def delete_agent(self, agent: str, whole: bool) -> None:
        got = self.attempt("agents", "delete", agent, delete_sessions=whole)
        mine = [name for name, row in self.rows.items() if row["agent_id"] == agent]
        if agent in self.agents and mine and not whole:
            assert got is errors.AgentInUseError
            return
        assert got is (agent in self.agents)
        self.agents.discard(agent)
        for name in mine:
            self.forget(name)

    # Sessions

    @action(few, data=st.data())
    def create(self, data: st.DataObject) -> None:
        route = self.draw_route(data)
        now = self.clock.now
        given = AgentSessionCreate(session_id=next(self.names), metadata=now.hour, **arguments(route))
        got = self.attempt("sessions", "create", given)
        if route[0] not in self.agents:
            assert got is errors.AgentNotFoundError
            return
        self.add(got.session_id, route, now, now, now.hour)
        if self.holder(route) is None:
            self.keys[route] = got.session_id

    @action(few, data=st.data())
    def start(self, data: st.DataObject) -> None:
        route = self.draw_route(data)
        got = self.attempt("sessions", "start", **arguments(route))
        if route[0] not in self.agents:
            assert got is errors.AgentNotFoundError
            return
        assert got.session_id not in self.rows
        self.add(got.session_id, route, self.clock.now, self.clock.now)
        self.keys[route] = got.session_id

    @action(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        route = self.draw_route(data)
        got = self.attempt("sessions", "resolve", **arguments(route))
        if route[0] not in self.agents:
            assert got is errors.AgentNotFoundError
            return
        if self.holder(route) is None:
            self.give(route)
        if self.holder(route) is None:
            assert got.session_id not in self.rows
            self.add(got.session_id, route, self.clock.now, self.clock.now)
            self.keys[route] = got.session_id
        assert got.session_id == self.holder(route)

    @action(some, data=st.data(), left_out=st.sets(st.sampled_from(ROUTE)))
    def move(self, data: st.DataObject, left_out: set[str]) -> None:
        route = self.draw_route(data)
        name, old = (name := self.draw(data)), self.route_of(name)
        given = {part: value for part, value in arguments(route).items() if part not in left_out}
        kept = {**arguments(old), **given}
        new: Route = (kept["agent_id"], kept["sender_id"], kept["channel_id"])
        got = self.attempt("sessions", "move", name, **given)
        if new[0] not in self.agents:
            assert got is errors.AgentNotFoundError
            return
        if self.holder(new) not in (None, name):
            assert got is errors.RouteTakenError
            return
        assert (got.session_id, got.agent_id, got.sender_id, got.channel_id) == (name, *new)
        left = self.release(name)
        self.rows[name].update(arguments(new))
        self.keys[new] = name
        if left == old != new:
            self.give(old)

    @action(some, data=st.data(), at=st.none() | st.sampled_from([-2 * MINUTE, -MS, MINUTE]))
    def touch(self, data: st.DataObject, at: timedelta | None) -> None:
        name, now = self.draw(data), self.clock.now
        active = now if at is None else min(now, now + at)
        got = self.attempt("sessions", "touch", name, None if at is None else now + at)
        assert got is (active > self.rows[name]["last_active_at"])
        self.rows[name]["last_active_at"] = max(self.rows[name]["last_active_at"], active)

    @action(some, data=st.data())
    def update(self, data: st.DataObject) -> None:
        name = self.draw(data)
        self.rows[name]["metadata_"] = {"title": [self.clock.now.isoformat()]}
        got = self.attempt("sessions", "update", name, AgentSessionUpdate(metadata=self.rows[name]["metadata_"]))
        assert got.metadata_ == self.rows[name]["metadata_"]

    @action(some, data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = self.draw(data)
        assert self.attempt("sessions", "delete", name) is True
        self.forget(name)
        assert self.attempt("sessions", "delete", name) is self.attempt("sessions", "touch", name) is False
        assert self.attempt("sessions", "move", name) is errors.SessionNotFoundError

    @action(few, data=st.data(), given=st.lists(st.tuples(st.booleans(), st.integers(-3, 1)), max_size=5))
    def index(self, data: st.DataObject, given: list[tuple[bool, int]]) -> None:
        now = self.clock.now
        sessions = []
        for is_known, minutes in given:
            name = self.draw(data) if is_known and self.rows else next(self.names)
            # The transcript of a known session can name another route.
            route = self.route_of(name) if name in self.rows and minutes % 2 else self.draw_route(data)
            if route[0] in self.agents:
                times = {"created_at": now - 4 * MINUTE, "last_active_at": now + minutes * MINUTE}
                sessions.append(AgentSession(session_id=name, metadata=minutes, **arguments(route), **times))
        assert self.attempt("sessions", "index", sessions) == len(sessions)
        for session in sorted(sessions, key=lambda session: min(session.last_active_at, now), reverse=True):
            at, route = min(session.last_active_at, now), (session.agent_id, session.sender_id, session.channel_id)
            if session.session_id in self.rows:
                row = self.rows[session.session_id]
                row["last_active_at"] = max(row["last_active_at"], at)
            else:
                self.add(session.session_id, route, session.created_at, at, session.metadata_)
        for session in sessions:
            self.give(self.route_of(session.session_id))

    # Changes without the methods of the store

    @action(few, data=st.data())
    def add_by_the_orm(self, data: st.DataObject) -> None:
        route = self.draw_route(data)
        name, now = next(self.names), self.clock.now
        if route[0] not in self.agents:
            return
        with self.database.unit_of_work() as unit:
            unit.session.add(AgentSession(session_id=name, created_at=now, last_active_at=now, **arguments(route)))
        self.add(name, route, now, now)
        self.keys.setdefault(route, name)

    @action(some, data=st.data(), act=st.sampled_from(["move", "statement", "statement", "touch", "delete"]))
    def change_by_the_orm(self, data: st.DataObject, act: str) -> None:
        route = self.draw_route(data)
        name = self.draw(data)
        if route[0] not in self.agents and act in ("move", "statement"):
            return
        with self.database.unit_of_work() as unit:
            if act == "statement":
                unit.session.execute(
                    update(AgentSession).where(_column.session_id == name).values(**arguments(route)),
                    execution_options={"synchronize_session": False},
                )
            else:
                row = unit.session.get_one(AgentSession, name)
                if act == "move":
                    row.agent_id, row.sender_id, row.channel_id = route
                elif act == "touch":
                    row.last_active_at = self.clock.now
                else:
                    unit.session.delete(row)
        if act == "delete":
            self.forget(name)
        elif act == "touch":
            self.rows[name]["last_active_at"] = self.clock.now
        elif act == "statement":
            self.rows[name].update(arguments(route))
        elif route != self.route_of(name):
            self.release(name)
            self.rows[name].update(arguments(route))
            self.keys.setdefault(route, name)

    @action(some, data=st.data(), route=routes, whole=st.booleans())
    def roll_back(self, data: st.DataObject, route: Route, whole: bool) -> None:
        """Of a savepoint or a unit that was rolled back, no change remains."""
        name = self.draw(data)
        with self.database.unit_of_work() as unit:
            with suppress(LookupError), unit.savepoint():
                if route[0] in self.agents:
                    unit.sessions.start(**arguments(route))
                    unit.sessions.resolve(**arguments(route))
                unit.sessions.delete(name)
                raise LookupError
            if whole:
                unit.sessions.start(**arguments(self.route_of(name)))
                unit.session.get_one(AgentSession, name).sender_id = "z"
                unit.session.flush()
                unit.rollback()

    # Comparison

    @action(route=routes, by=st.sets(st.sampled_from(ROUTE)), limit=st.integers(1, 4))
    def read_pages(self, route: Route, by: set[str], limit: int) -> None:
        filters = {part: value for part, value in arguments(route).items() if part in by and value is not None}
        found: list[str] = []
        after = None
        while True:
            page = self.attempt("sessions", "list", **filters, limit=limit, after=after)
            found += [row.session_id for row in page]
            if len(page) < limit:
                break
            after = page[-1]
        rows = [name for name, row in self.rows.items() if all(row[part] == value for part, value in filters.items())]
        assert found == sorted(rows, key=lambda name: (self.rows[name]["last_active_at"], name), reverse=True)

    @invariant()
    def everything_is_as_modelled(self) -> None:
        if not hasattr(self, "rows"):
            return
        with self.database.unit_of_work(read_only=True) as unit:
            assert {row.id for row in unit.agents.list()} == self.agents
            listed = unit.sessions.list()
        assert {row.session_id for row in listed} == self.rows.keys()
        for row in listed:
            model = self.rows[row.session_id]
            assert {name: getattr(row, name) for name in model} == model
        keys = {row.session_id: row.route_key for row in listed if row.route_key is not None}
        assert keys == {name: route_key(*route) for route, name in self.keys.items()}
        for route in self.keys:
            holder = self.holder(route)
            if holder is not None:
                with self.database.unit_of_work(read_only=True) as unit:
                    assert unit.sessions.resolve(**arguments(route)).session_id == holder
            else:  # the answer needs a write, and the agent of a stale key can be absent
                with (
                    pytest.raises((errors.ReadOnlyError, errors.AgentNotFoundError)),
                    self.database.unit_of_work(read_only=True) as unit,
                ):
                    unit.sessions.resolve(**arguments(route))
