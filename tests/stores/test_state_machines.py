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
    AgentSessionCreate,
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
)
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import FakeClock

pytestmark = pytest.mark.in_memory

MS = timedelta(milliseconds=1)
MINUTE = timedelta(minutes=1)

names = st.sampled_from(["a", "b/c", "c"])
durations = st.sampled_from([MS, MINUTE - MS, MINUTE, 2 * MINUTE])
moves = st.sampled_from([MS, MINUTE - MS, MINUTE, NONCE_GRACE, -MS, -MINUTE])
LIMITS = Limits(
    pending_devices=2, pending_ttl=2 * MINUTE, nonces_per_device=2, keys_per_device=2, longest_ttl=2 * MINUTE
)
optional = st.sampled_from([None, "x", "y"])


class StoreMachine(RuleBasedStateMachine):
    """Run each step on a database and on a model, and compare the answers."""

    target: str
    database: Database

    @initialize()
    def open(self) -> None:
        self.clock = FakeClock()
        self.database = Database.open(self.target, clock=self.clock, durability="normal", limits=LIMITS)
        with self.database.unit_of_work() as unit:
            # Remove the rows of the sequence before.
            for table in ("idempotency_keys", "nonces", "sessions", "agents", "devices"):
                unit.session.connection().execute(text(f"DELETE FROM {table}"))
        self.nonces: dict[tuple[str, str], datetime] = {}
        self.released: set[tuple[str, str]] = set()
        self.keys: dict[tuple[str, str], tuple[datetime, Any]] = {}
        # Role, approved, revoked, last seen.
        self.devices: dict[str, list[Any]] = {}
        self.paired: dict[str, datetime] = {}
        self.agents: set[str] = set()
        self.sessions: dict[str, tuple[str, datetime]] = {}
        self.routes: dict[tuple[str, str | None], str] = {}

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

    @rule(device=names, force=st.booleans())
    def delete_device(self, device: str, force: bool) -> None:
        got = self.attempt("devices", "delete", device, force=force)
        if device in self.devices and self.is_last_admin(device) and not force:
            assert got is LastAdminError
            return
        assert got is (device in self.devices)
        if self.devices.pop(device, None):
            self.keys = {key: value for key, value in self.keys.items() if key[0] != device}

    @rule(device=names)
    def see(self, device: str) -> None:
        row = self.devices.get(device)
        writes = row is not None and (row[3] is None or row[3] <= self.clock.now - MINUTE)
        assert self.attempt("devices", "update_last_seen", device) is writes
        if row is not None and writes:
            row[3] = self.clock.now

    # Agents and sessions

    @rule(agent=names)
    def create_agent(self, agent: str) -> None:
        got = self.attempt("agents", "create", AgentCreate(id=agent, name=agent, workspace_path="/srv"))
        assert (got is AgentExistsError) is (agent in self.agents)
        self.agents.add(agent)

    @rule(agent=names, whole=st.booleans())
    def delete_agent(self, agent: str, whole: bool) -> None:
        got = self.attempt("agents", "delete", agent, delete_sessions=whole)
        mine = [name for name, (owner, _) in self.sessions.items() if owner == agent]
        if agent in self.agents and mine and not whole:
            assert got is AgentInUseError
            return
        assert got is (agent in self.agents)
        self.agents.discard(agent)
        for name in mine:
            self.forget(name)

    def forget(self, name: str) -> None:
        del self.sessions[name]
        self.routes = {route: session for route, session in self.routes.items() if session != name}

    @precondition(lambda self: len(self.sessions) < 12)
    @rule(agent=names, sender=optional)
    def create_session(self, agent: str, sender: str | None) -> None:
        got = self.attempt("sessions", "create", AgentSessionCreate(agent_id=agent, sender_id=sender))
        if agent not in self.agents:
            assert got is AgentNotFoundError
            return
        self.sessions[got.session_id] = (agent, self.clock.now)
        self.routes.setdefault((agent, sender), got.session_id)

    @rule(agent=names, sender=optional)
    def resolve(self, agent: str, sender: str | None) -> None:
        got = self.attempt("sessions", "resolve", agent_id=agent, sender_id=sender)
        if agent not in self.agents:
            assert got is AgentNotFoundError
        elif (agent, sender) in self.routes:
            assert got.session_id == self.routes[agent, sender]
        else:
            assert got.session_id not in self.sessions
            self.sessions[got.session_id] = (agent, self.clock.now)
            self.routes[agent, sender] = got.session_id

    @precondition(lambda self: bool(self.sessions))
    @rule(data=st.data())
    def touch_or_delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sessions)))
        agent, active = self.sessions[name]
        if data.draw(st.booleans()):
            assert self.attempt("sessions", "touch", name) is (self.clock.now > active)
            self.sessions[name] = (agent, max(active, self.clock.now))
        else:
            assert self.attempt("sessions", "delete", name) is True
            self.forget(name)

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
            assert {row.id for row in unit.agents.list()} == self.agents
            listed = [(row.last_active_at, row.session_id, row.agent_id) for row in unit.sessions.list()]
        assert listed == sorted(((at, name, agent) for name, (agent, at) in self.sessions.items()), reverse=True)


def run_sequences(target: str, sequences: int, steps: int) -> None:
    """Run at most this many sequences, with at most this many steps, on a database."""
    machine = type("StoreMachine", (StoreMachine,), {"target": target})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=sequences, stateful_step_count=steps, deadline=None)
    )


def test_stores(target: str) -> None:
    """After any sequence of steps, the stores and the model give the same answers."""
    run_sequences(target, 30, 40)


@pytest.mark.slow
def test_many_sequences(target: str, engine_name: str) -> None:
    """After 2,000 sequences on SQLite and 500 on PostgreSQL (which is slower), the stores and the model agree."""
    run_sequences(target, 2000 if engine_name == "sqlite" else 500, 20)
