"""Compare the stores with plain dictionaries, for random sequences of calls and movements of the clock."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import text

from homeagent import (
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    AgentSessionUpdate,
    Database,
    DeviceCreate,
    DevicePair,
    DeviceStatus,
    IdempotencyScope,
    Limits,
    Role,
)
from homeagent.errors import (
    AgentExistsError,
    AgentInUseError,
    AgentNotFoundError,
    ApprovalChangedError,
    DeviceExistsError,
    DeviceNotFoundError,
    HomeAgentError,
    IdempotencyKeyExistsError,
    KeyLimitError,
    LastAdminError,
    NonceLimitError,
    PendingLimitError,
    RouteTakenError,
)
from homeagent.models.session import route_key
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import FakeClock

MS = timedelta(milliseconds=1)
MINUTE = timedelta(minutes=1)

names = st.sampled_from(["a", "b/c", "c"])
durations = st.sampled_from([MS, MINUTE - MS, MINUTE, 2 * MINUTE])
moves = st.sampled_from([MS, MINUTE - MS, MINUTE, NONCE_GRACE, -MS, -MINUTE])
LIMITS = Limits(
    pending_devices=2, pending_ttl=2 * MINUTE, nonces_per_device=2, keys_per_device=2, longest_ttl=2 * MINUTE
)
Route = tuple[str, str | None]
routes: st.SearchStrategy[Route] = st.tuples(names, st.sampled_from([None, "x"]))


class Machine(RuleBasedStateMachine):
    """Run each step on a database and on a model, and compare the answers."""

    target: str
    database: Database

    def start_empty(self) -> None:
        """Open the database, and remove the rows of the sequence before."""
        self.clock = FakeClock()
        self.database = Database.open(self.target, clock=self.clock, durability="normal", limits=LIMITS)
        with self.database.unit_of_work() as unit:
            for table in ("idempotency_keys", "nonces", "sessions", "agents", "devices"):
                unit.session.connection().execute(text(f"DELETE FROM {table}"))

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()

    def attempt(self, store: str, method: str, *arguments: Any, **options: Any) -> Any:
        """Return the result of a method in a separate unit, or the class of the error that it raised."""
        try:
            with self.database.unit_of_work() as unit:
                return getattr(getattr(unit, store), method)(*arguments, **options)
        except HomeAgentError as error:
            return type(error)

    @rule(by=moves)
    def move_clock(self, by: timedelta) -> None:
        self.clock.advance(by)


class StoreMachine(Machine):
    """Nonces, idempotency keys and devices."""

    @initialize()
    def open(self) -> None:
        self.start_empty()
        self.nonces: dict[tuple[str, str], datetime] = {}
        self.keys: dict[tuple[str, str], tuple[datetime, Any]] = {}
        # Role, approved, revoked, last seen.
        self.devices: dict[str, list[Any]] = {}
        self.paired: dict[str, datetime] = {}
        self.released: set[tuple[str, str]] = set()
        self.changes: list[tuple[str, str]] = []
        self.first_change = self.database.devices.newest_change()

    # Nonces

    @rule(device=names, nonce=names, lives=durations)
    def consume(self, device: str, nonce: str, lives: timedelta) -> None:
        now = self.clock.now
        fresh = self.nonces.get((device, nonce), now) <= now
        got = self.attempt("nonces", "consume", device, nonce, expires_at=now + lives)
        if fresh and len(self.counted(device)) >= LIMITS.nonces_per_device:
            assert got is NonceLimitError
        else:
            assert got is fresh
        if got is True:
            self.nonces[device, nonce] = now + lives
            self.released.discard((device, nonce))

    def counted(self, device: str) -> set[tuple[str, str]]:
        """Return the nonces that count toward the limit of the device."""
        now = self.clock.now
        return {key for key, until in self.nonces.items() if key[0] == device and until > now} - self.released

    @rule(device=names)
    def forget_nonces(self, device: str) -> None:
        released = self.counted(device)
        assert self.attempt("nonces", "forget", device) == len(released)
        self.released |= released

    @rule(device=names, nonce=names)
    def find_nonce(self, device: str, nonce: str) -> None:
        live = self.nonces.get((device, nonce), self.clock.now) > self.clock.now
        assert (self.attempt("nonces", "find", device, nonce) is not None) is live

    @rule()
    def delete_nonces(self) -> None:
        dead = [key for key, until in self.nonces.items() if until <= self.clock.now - NONCE_GRACE]
        assert self.attempt("nonces", "delete_expired") == len(dead)
        for key in dead:
            del self.nonces[key]

    # Idempotency keys

    @rule(device=names, key=names, value=st.integers(), lives=durations)
    def insert_key(self, device: str, key: str, value: int, lives: timedelta) -> None:
        now = self.clock.now
        got = self.attempt("idempotency_keys", "insert", IdempotencyScope(device, "m", key), value, ttl=lives)
        if (device, key) in self.keys and self.keys[device, key][0] > now:
            assert got is IdempotencyKeyExistsError
        elif sum(each[0] == device and until > now for each, (until, _) in self.keys.items()) >= LIMITS.keys_per_device:
            assert got is KeyLimitError
        else:
            assert got.result == value
            self.keys[device, key] = (now + lives, value)

    @rule(device=names, key=names)
    def find_key(self, device: str, key: str) -> None:
        got = self.attempt("idempotency_keys", "find", IdempotencyScope(device, "m", key))
        until, value = self.keys.get((device, key), (self.clock.now, None))
        assert (None if got is None else got.result) == (value if until > self.clock.now else None)

    @rule()
    def delete_keys(self) -> None:
        dead = [key for key, (until, _) in self.keys.items() if until <= self.clock.now]
        assert self.attempt("idempotency_keys", "delete_expired") == len(dead)
        for key in dead:
            del self.keys[key]

    # Devices

    def is_last_admin(self, device: str) -> bool:
        admins = [name for name, (role, approved, _, _) in self.devices.items() if role is Role.ADMIN and approved]
        return admins == [device]

    @rule(device=names, role=st.sampled_from(Role))
    def create_device(self, device: str, role: Role) -> None:
        got = self.attempt("devices", "create", DeviceCreate(id=device, role=role, shared_secret_hash="sha256$x"))
        if device in self.devices:
            assert got is DeviceExistsError
        else:
            assert got.id == device
            self.changes.append((device, "paired"))
            self.devices[device] = [role, False, False, None]
            self.paired[device] = self.clock.now

    def pending(self) -> dict[str, datetime]:
        """Return the pending devices, with the times of pairing."""
        return {name: self.paired[name] for name, row in self.devices.items() if not row[1] and not row[2]}

    @rule(device=names, role=st.sampled_from(Role))
    def pair_device(self, device: str, role: Role) -> None:
        waiting = [at for at in self.pending().values() if at > self.clock.now - LIMITS.pending_ttl]
        refusal = DeviceExistsError if device in self.devices else PendingLimitError
        if device in self.devices or len(waiting) >= LIMITS.pending_devices:
            with pytest.raises(refusal):
                self.database.pair(DevicePair(id=device, role=role))
            return
        self.database.pair(DevicePair(id=device, role=role))
        self.changes.append((device, "paired"))
        self.devices[device] = [role, False, False, None]
        self.paired[device] = self.clock.now
        self.keys = {key: value for key, value in self.keys.items() if key[0] != device}

    @rule()
    def sweep_devices(self) -> None:
        overdue = [name for name, at in self.pending().items() if at <= self.clock.now - LIMITS.pending_ttl]
        deleted = self.attempt("devices", "delete_pending", paired_before=self.clock.now - LIMITS.pending_ttl)
        assert deleted == len(overdue)
        for name in overdue:
            del self.devices[name]
        # The order of the rows that one statement deletes is not defined.
        found = self.database.devices.changes(after=self.first_change)[len(self.changes) :]
        assert {(change.device_id, change.kind.value) for change in found} == {(name, "deleted") for name in overdue}
        self.changes += [(str(change.device_id), change.kind.value) for change in found]

    @rule(device=names, status=st.none() | st.sampled_from(DeviceStatus))
    def approve(self, device: str, status: DeviceStatus | None) -> None:
        got = self.attempt("devices", "approve", device, expected_status=status)
        row = self.devices.get(device)
        if row is None:
            assert got is DeviceNotFoundError
        elif row[1]:
            assert got is False
        elif (status or DeviceStatus.PENDING) is not (DeviceStatus.REVOKED if row[2] else DeviceStatus.PENDING):
            assert got is ApprovalChangedError
        else:
            assert got is True
            row[1:3] = True, False
            self.changes.append((device, "approved"))

    @rule(device=names, force=st.booleans())
    def revoke(self, device: str, force: bool) -> None:
        got = self.attempt("devices", "revoke", device, force=force)
        row = self.devices.get(device)
        if row is None:
            assert got is DeviceNotFoundError
        elif self.is_last_admin(device) and not force:
            assert got is LastAdminError
        else:
            assert got is not row[2]
            row[1:3] = False, True
            if got:
                self.changes.append((device, "revoked"))

    @rule(device=names, force=st.booleans())
    def delete_device(self, device: str, force: bool) -> None:
        got = self.attempt("devices", "delete", device, force=force)
        if device in self.devices and self.is_last_admin(device) and not force:
            assert got is LastAdminError
            return
        assert got is (device in self.devices)
        if self.devices.pop(device, None):
            self.changes.append((device, "deleted"))
            self.keys = {key: value for key, value in self.keys.items() if key[0] != device}

    @rule(device=names)
    def see(self, device: str) -> None:
        row = self.devices.get(device)
        writes = row is not None and (row[3] is None or row[3] <= self.clock.now - MINUTE)
        assert self.attempt("devices", "update_last_seen", device) is writes
        if row is not None and writes:
            row[3] = self.clock.now

    @invariant()
    def everything_is_as_modelled(self) -> None:
        if not hasattr(self, "database"):
            return
        with self.database.unit_of_work(read_only=True) as unit:
            devices = {
                row.id: [row.role, row.approved, row.revoked_at is not None, row.last_seen_at]
                for row in unit.devices.list()
            }
            assert devices == self.devices
            newest = [row.id for row in unit.devices.list(order="paired_at")]
            assert newest == sorted(self.devices, key=lambda name: (self.paired[name], name), reverse=True)
            changes = unit.devices.changes(after=self.first_change)
            assert [(change.device_id, change.kind.value) for change in changes] == self.changes


class SessionMachine(Machine):
    """Agents and sessions. The model has the values of each session, and the holder of each route."""

    @initialize()
    def open(self) -> None:
        self.start_empty()
        self.agents: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.holders: dict[Route, str] = {}
        self.names = iter(f"{letter}-{number}" for number in range(10_000) for letter in "zA")
        for agent in ("a", "b/c"):
            self.create_agent(agent)

    # The model

    def route_of(self, name: str) -> Route:
        return self.rows[name]["agent_id"], self.rows[name]["sender_id"]

    def add(self, name: str, route: Route, created: datetime, active: datetime, metadata: Any = None) -> None:
        self.rows[name] = {
            **dict(zip(("agent_id", "sender_id"), route, strict=True)),
            "created_at": created,
            "last_active_at": active,
            "metadata_": metadata,
        }

    def give_to_last_active(self, route: Route) -> None:
        """Give the route to its last active session, if there is one."""
        sessions = [name for name in self.rows if self.route_of(name) == route]
        self.holders.pop(route, None)
        if sessions:
            self.holders[route] = max(
                sessions, key=lambda name: (self.rows[name]["last_active_at"], self.rows[name]["created_at"], name)
            )

    def release(self, name: str) -> bool:
        """Free the route of a session, and return whether the session held its route."""
        held = self.holders.get(self.route_of(name)) == name
        if held:
            del self.holders[self.route_of(name)]
        return held

    def forget(self, name: str) -> None:
        self.release(name)
        del self.rows[name]

    def draw(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.rows)))

    # Agents

    @rule(agent=names)
    def create_agent(self, agent: str) -> None:
        got = self.attempt("agents", "create", AgentCreate(id=agent, name=agent, workspace_path="/srv"))
        assert (got is AgentExistsError) is (agent in self.agents)
        self.agents.add(agent)

    @rule(agent=names, whole=st.booleans())
    def delete_agent(self, agent: str, whole: bool) -> None:
        got = self.attempt("agents", "delete", agent, delete_sessions=whole)
        mine = [name for name, row in self.rows.items() if row["agent_id"] == agent]
        if agent in self.agents and mine and not whole:
            assert got is AgentInUseError
            return
        assert got is (agent in self.agents)
        self.agents.discard(agent)
        for name in mine:
            self.forget(name)

    # Sessions

    @precondition(lambda self: len(self.rows) < 12)
    @rule(route=routes, act=st.sampled_from(["create", "start", "ORM"]))
    def add_session(self, route: Route, act: str) -> None:
        agent, sender = route
        now = self.clock.now
        if act == "start":
            got = self.attempt("sessions", "start", agent_id=agent, sender_id=sender)
        elif act == "create":
            given = AgentSessionCreate(session_id=next(self.names), agent_id=agent, sender_id=sender, metadata=now.hour)
            got = self.attempt("sessions", "create", given)
        elif agent not in self.agents:
            return
        else:
            got = AgentSession(
                session_id=next(self.names), agent_id=agent, sender_id=sender, created_at=now, last_active_at=now
            )
            with self.database.unit_of_work() as unit:
                unit.session.add(got)
                unit.session.flush()
                unit.session.expunge(got)
        if agent not in self.agents:
            assert got is AgentNotFoundError
            return
        self.add(got.session_id, route, now, now, now.hour if act == "create" else None)
        if act == "start":
            self.holders[route] = got.session_id
        self.holders.setdefault(route, got.session_id)

    @rule(route=routes)
    def resolve(self, route: Route) -> None:
        got = self.attempt("sessions", "resolve", agent_id=route[0], sender_id=route[1])
        if route[0] not in self.agents:
            assert got is AgentNotFoundError
            return
        if route not in self.holders:
            self.give_to_last_active(route)
        if route in self.holders:
            assert got.session_id == self.holders[route]
        else:
            assert got.session_id not in self.rows
            self.add(got.session_id, route, self.clock.now, self.clock.now)
            self.holders[route] = got.session_id

    @precondition(lambda self: bool(self.rows))
    @rule(data=st.data(), route=routes, by_orm=st.booleans())
    def move(self, data: st.DataObject, route: Route, by_orm: bool) -> None:
        name, old = (name := self.draw(data)), self.route_of(name)
        if data.draw(st.booleans()):
            route = (old[0], route[1])
        if by_orm:
            if route[0] not in self.agents:
                return
            with self.database.unit_of_work() as unit:
                row = unit.session.get_one(AgentSession, name)
                row.agent_id, row.sender_id = route
            if route == old:
                return
        else:
            kept = {} if route[0] == old[0] else {"agent_id": route[0]}
            got = self.attempt("sessions", "move", name, sender_id=route[1], **kept)
            if route[0] not in self.agents:
                assert got is AgentNotFoundError
                return
            if self.holders.get(route, name) != name:
                assert got is RouteTakenError
                return
            assert (got.session_id, got.agent_id, got.sender_id) == (name, *route)
        held = self.release(name)
        self.rows[name].update(agent_id=route[0], sender_id=route[1])
        if held and not by_orm and route != old:
            self.give_to_last_active(old)
        self.holders.setdefault(route, name)

    @precondition(lambda self: bool(self.rows))
    @rule(data=st.data(), act=st.sampled_from(["touch", "update", "delete", "ORM"]))
    def change(self, data: st.DataObject, act: str) -> None:
        name = self.draw(data)
        row = self.rows[name]
        if act == "touch":
            assert self.attempt("sessions", "touch", name) is (self.clock.now > row["last_active_at"])
            row["last_active_at"] = max(row["last_active_at"], self.clock.now)
        elif act == "update":
            row["metadata_"] = {"title": [self.clock.now.isoformat()]}
            got = self.attempt("sessions", "update", name, AgentSessionUpdate(metadata=row["metadata_"]))
            assert got.metadata_ == row["metadata_"]
        else:
            if act == "delete":
                assert self.attempt("sessions", "delete", name) is True
            else:
                with self.database.unit_of_work() as unit:
                    unit.session.delete(unit.session.get_one(AgentSession, name))
            self.forget(name)

    @precondition(lambda self: len(self.rows) < 12)
    @rule(data=st.data(), given=st.lists(st.tuples(st.booleans(), routes, st.integers(-3, 1)), max_size=5))
    def index(self, data: st.DataObject, given: list[tuple[bool, Route, int]]) -> None:
        now = self.clock.now
        sessions = []
        for is_known, route, minutes in given:
            if not is_known or not self.rows:
                name = next(self.names)
            else:
                name = self.draw(data)
                route = self.route_of(name)
            if route[0] in self.agents:
                at = now + minutes * MINUTE
                sessions.append(
                    AgentSession(
                        session_id=name,
                        agent_id=route[0],
                        sender_id=route[1],
                        created_at=now - 4 * MINUTE,
                        last_active_at=at,
                        metadata=minutes,
                    )
                )
        assert self.attempt("sessions", "index", sessions) == len(sessions)
        fresh = set()
        for session in sessions:
            at, route = min(session.last_active_at, now), (session.agent_id, session.sender_id)
            if session.session_id in self.rows:
                row = self.rows[session.session_id]
                row["last_active_at"] = max(row["last_active_at"], at)
            else:
                self.add(session.session_id, route, session.created_at, at, session.metadata_)
                fresh.add(route)
        for route in {(session.agent_id, session.sender_id) for session in sessions}:
            # A free route of known sessions stays free until `resolve`, which gives it to the last active session.
            if route in fresh or route in self.holders:
                self.give_to_last_active(route)

    @invariant()
    def everything_is_as_modelled(self) -> None:
        if not hasattr(self, "database"):
            return
        with self.database.unit_of_work(read_only=True) as unit:
            assert {row.id for row in unit.agents.list()} == self.agents
            listed = unit.sessions.list()
        assert [row.session_id for row in listed] == sorted(
            self.rows, key=lambda name: (self.rows[name]["last_active_at"], name), reverse=True
        )
        for row in listed:
            model = self.rows[row.session_id]
            assert {name: getattr(row, name) for name in model} == model
        keys = {row.session_id: row.route_key for row in listed if row.route_key is not None}
        assert keys == {name: route_key(*route, None) for route, name in self.holders.items()}


def run_sequences(kind: type[Machine], target: str, sequences: int, steps: int) -> None:
    """Run at most this many sequences, with at most this many steps, on a database."""
    machine = type(kind.__name__, (kind,), {"target": target})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=sequences, stateful_step_count=steps, deadline=None)
    )


def test_stores(target: str) -> None:
    """After any sequence of steps, the stores and the model give the same answers."""
    run_sequences(StoreMachine, target, 30, 40)


def test_sessions(target: str, engine_name: str) -> None:
    """After 100 sequences on SQLite and 20 on PostgreSQL, the agents, sessions and routes are those of the model."""
    run_sequences(SessionMachine, target, 100 if engine_name == "sqlite" else 20, 30)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [StoreMachine, SessionMachine])
def test_many_sequences(target: str, engine_name: str, kind: type[Machine]) -> None:
    """After 2,000 sequences on SQLite and 500 on PostgreSQL (which is slower), the stores and the model agree."""
    run_sequences(kind, target, 2000 if engine_name == "sqlite" else 500, 20)
