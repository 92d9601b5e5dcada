"""Random sequences of calls of the stores, with low limits, and the models of devices, nonces and idempotency keys."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count, product
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant
from sqlmodel import select

from homeagent import (
    Device,
    DeviceChange,
    DeviceCreate,
    DevicePair,
    DeviceStatus,
    DeviceUpdate,
    IdempotencyScope,
    Role,
    errors,
)
from homeagent.models.device_change import DeviceChangeKind
from homeagent.stores.nonces import NONCE_GRACE
from tests.conftest import START, RecordProperty
from tests.stores.session_machine import SessionMachine
from tests.stores.state_machine import (
    LIMITS,
    MINUTE,
    MS,
    NAMES,
    SHARES,
    Machine,
    action,
    names,
    run_sequences,
    run_share,
)


def some(machine: Any) -> bool:
    """Return whether there are devices."""
    return bool(machine.devices)


few_names = st.sampled_from(NAMES[:2])
durations = [MS, MINUTE - MS, MINUTE, 2 * MINUTE]


class GuardMachine(Machine):
    """Nonces and idempotency keys."""

    @initialize()
    def open(self) -> None:
        self.start_empty()
        self.nonces: dict[tuple[str, str], datetime] = {}
        self.keys: dict[tuple[str, str], tuple[datetime, Any]] = {}
        self.released: set[tuple[str, str]] = set()

    # Nonces

    @action(device=few_names, nonce=names, lives=st.sampled_from([*durations, timedelta(0)]))
    def consume(self, device: str, nonce: str, lives: timedelta) -> None:
        now = self.clock.now
        fresh = lives > timedelta(0) and self.nonces.get((device, nonce), now) <= now
        got = self.attempt("nonces", "consume", device, nonce, expires_at=now + lives)
        if fresh and len(self.counted(device)) >= LIMITS.nonces_per_device:
            assert got is errors.NonceLimitError
        else:
            assert got is fresh
        if got is True:
            self.nonces[device, nonce] = now + lives
            self.released.discard((device, nonce))

    def counted(self, device: str) -> set[tuple[str, str]]:
        """Return the nonces that count toward the limit of the device."""
        now = self.clock.now
        return {key for key, until in self.nonces.items() if key[0] == device and until > now} - self.released

    @action(device=few_names)
    def forget_nonces(self, device: str) -> None:
        released = self.counted(device)
        assert self.attempt("nonces", "forget", device) == len(released)
        self.released |= released

    # Idempotency keys

    @action(device=few_names, key=names, value=st.integers(), lives=st.sampled_from(durations))
    def insert_key(self, device: str, key: str, value: int, lives: timedelta) -> None:
        now = self.clock.now
        got = self.attempt("idempotency_keys", "insert", IdempotencyScope(device, "m", key), value, ttl=lives)
        if (device, key) in self.keys and self.keys[device, key][0] > now:
            assert got is errors.IdempotencyKeyExistsError
        elif sum(each[0] == device and until > now for each, (until, _) in self.keys.items()) >= LIMITS.keys_per_device:
            assert got is errors.KeyLimitError
        else:
            assert got.result == value
            self.keys[device, key] = (now + lives, value)

    # Both

    @action()
    def sweep(self) -> None:
        now = self.clock.now
        nonces = [key for key, until in self.nonces.items() if until <= now - NONCE_GRACE]
        keys = [key for key, (until, _) in self.keys.items() if until <= now]
        report = self.database.sweep()
        assert (report.nonces, report.idempotency_keys, report.more) == (len(nonces), len(keys), False)
        for nonce in nonces:
            del self.nonces[nonce]
        for key in keys:
            del self.keys[key]

    @invariant()
    def everything_is_as_modelled(self) -> None:
        now = self.clock.now
        with self.database.unit_of_work(read_only=True) as unit:
            for device, name in product(NAMES[:2], NAMES) if hasattr(self, "released") else ():
                nonce, key = (
                    unit.nonces.find(device, name),
                    unit.idempotency_keys.find(IdempotencyScope(device, "m", name)),
                )
                until, known = self.nonces.get((device, name), now), self.keys.get((device, name), (now, None))
                assert (None if nonce is None else nonce.expires_at) == (until if until > now else None)
                assert (None if key is None else (key.expires_at, key.result)) == (known if known[0] > now else None)


class DeviceMachine(Machine):
    """Devices, the limit of pending devices, secrets, and the feed of device changes."""

    @initialize()
    def open(self) -> None:
        self.start_empty()
        self.devices: dict[str, dict[str, Any]] = {}
        # Each device with the present secret, the previous secret, and the end of the overlap of both.
        self.secrets: dict[str, tuple[str | None, str | None, datetime | None]] = {}
        self.old_secrets: list[str] = []
        self.values = count()
        self.keys: dict[str, datetime] = {}
        # The rows of the feed, beginning with the newest row of the sequence before. The feed was not read since the
        # expected changes were made. The database's clock wrote the time of the first row, so no sweep would delete it.
        self.database.devices.delete_changes(before=datetime.max.replace(tzinfo=UTC), limit=100_000)
        with self.database.unit_of_work() as unit:
            (row,) = unit.session.exec(select(DeviceChange))
            row.at = START - timedelta(days=1)
            self.feed = [row]
        self.numbers = [row.number for row in self.feed]
        self.expected: list[tuple[str, str]] = []
        self.iterator: Any = self.database.watch_devices()
        self.unfollowed: list[tuple[str, str]] = []
        # A sequence of calls for absent devices would show little.
        for name, role in (("a", Role.ADMIN), ("b/c", Role.CLIENT)):
            self.pair(name, role)
            assert self.attempt("devices", "approve", name)
            self.set_approved(name, True)

    def teardown(self) -> None:
        if hasattr(self, "iterator"):
            self.loop.run_until_complete(self.iterator.aclose())

    # The model

    def draw(self, data: st.DataObject) -> str:
        """Choose a device, of which most exist."""
        return data.draw(st.sampled_from([*sorted(self.devices), *sorted(self.devices), *NAMES]))

    def add(self, device: str, role: Role, secret: str | None) -> None:
        empty = dict.fromkeys(("approved_at", "revoked_at", "revoked_reason", "last_seen_at", "metadata_"))
        self.devices[device] = {"role": role, "approved": False, "paired_at": self.clock.now, **empty}
        self.secrets[device] = (secret, None, None)
        self.expected.append((device, "paired"))

    def status(self, device: str) -> DeviceStatus:
        row = self.devices[device]
        if row["approved"]:
            return DeviceStatus.APPROVED
        return DeviceStatus.PENDING if row["approved_at"] is row["revoked_at"] is None else DeviceStatus.REVOKED

    def set_approved(self, device: str, approved: bool, reason: str | None = None) -> None:
        now = self.clock.now
        if approved:
            self.devices[device].update(approved=True, approved_at=now, revoked_at=None, revoked_reason=None)
        else:
            self.devices[device].update(approved=False, revoked_at=now, revoked_reason=reason)
        self.secrets[device] = (self.secrets[device][0], None, None)
        self.expected.append((device, "approved" if approved else "revoked"))

    def remove(self, device: str) -> None:
        del self.devices[device]
        self.keys.pop(device, None)
        self.expected.append((device, "deleted"))

    def pending(self, *, overdue: bool) -> list[str]:
        """Return the pending devices for which `Limits.pending_ttl` has ended, or the other pending devices."""
        before = self.clock.now - LIMITS.pending_ttl
        pending = [name for name in self.devices if self.status(name) is DeviceStatus.PENDING]
        return [name for name in pending if (self.devices[name]["paired_at"] <= before) is overdue]

    def is_last_admin(self, device: str) -> bool:
        return [name for name, row in self.devices.items() if row["role"] is Role.ADMIN and row["approved"]] == [device]

    # Devices

    @action(device=names, role=st.sampled_from(Role))
    def create(self, device: str, role: Role) -> None:
        got = self.attempt("devices", "create", DeviceCreate(id=device, role=role, shared_secret_hash="sha256$x"))
        if device in self.devices:
            assert got is errors.DeviceExistsError
        else:
            assert got.id == device
            self.add(device, role, None)

    @action(device=names, role=st.sampled_from(Role))
    def pair(self, device: str, role: Role) -> None:
        refusal = errors.DeviceExistsError if device in self.devices else errors.PendingLimitError
        if device in self.devices or len(self.pending(overdue=False)) >= LIMITS.pending_devices:
            with pytest.raises(refusal):
                self.database.pair(DevicePair(id=device, role=role))
            return
        paired = self.database.pair(DevicePair(id=device, role=role))
        self.add(device, role, paired.shared_secret.get_secret_value())
        self.keys.pop(device, None)

    @action(data=st.data(), status=st.none() | st.sampled_from(DeviceStatus), role=st.none() | st.sampled_from(Role))
    def approve(self, data: st.DataObject, status: DeviceStatus | None, role: Role | None) -> None:
        device = self.draw(data)
        got = self.attempt("devices", "approve", device, expected_status=status, expected_role=role)
        row = self.devices.get(device)
        if row is None:
            assert got is errors.DeviceNotFoundError
        elif role not in (None, row["role"]):
            assert got is errors.ApprovalChangedError
        elif row["approved"]:
            assert got is False
        elif (status or DeviceStatus.PENDING) is not self.status(device):
            assert got is errors.ApprovalChangedError
        else:
            assert got is True
            self.set_approved(device, True)

    @action(data=st.data(), force=st.booleans(), reason=st.none() | st.just("lost"))
    def revoke(self, data: st.DataObject, force: bool, reason: str | None) -> None:
        device = self.draw(data)
        got = self.attempt("devices", "revoke", device, force=force, reason=reason)
        if device not in self.devices:
            assert got is errors.DeviceNotFoundError
        elif self.is_last_admin(device) and not force:
            assert got is errors.LastAdminError
        else:
            assert got is (self.status(device) is not DeviceStatus.REVOKED)
            if got:
                self.set_approved(device, False, reason)

    @action(data=st.data(), force=st.booleans())
    def delete(self, data: st.DataObject, force: bool) -> None:
        device = self.draw(data)
        got = self.attempt("devices", "delete", device, force=force)
        if device in self.devices and self.is_last_admin(device) and not force:
            assert got is errors.LastAdminError
            return
        assert got is (device in self.devices)
        if got:
            self.remove(device)

    @action(data=st.data())
    def update(self, data: st.DataObject) -> None:
        device = self.draw(data)
        got = self.attempt("devices", "update", device, DeviceUpdate(metadata=next(self.values)))
        if device not in self.devices:
            assert got is errors.DeviceNotFoundError
            return
        self.devices[device]["metadata_"] = got.metadata_
        self.expected.append((device, "updated"))

    @action(data=st.data(), at=st.none() | st.sampled_from([-MINUTE, MS, timedelta(days=18_000)]))
    def see(self, data: st.DataObject, at: timedelta | None) -> None:
        """A time in the future counts as now."""
        device = self.draw(data)
        row = self.devices.get(device)
        given = None if at is None else self.clock.now + at
        seen = self.clock.now if given is None else min(self.clock.now, given)
        writes = row is not None and (row["last_seen_at"] is None or row["last_seen_at"] <= seen - MINUTE)
        assert self.attempt("devices", "update_last_seen", device, given) is writes
        if row is not None and writes:
            row["last_seen_at"] = seen

    @action(some, data=st.data(), role=st.sampled_from(Role), approved=st.booleans(), deletes=st.booleans())
    def edit_by_the_orm(self, data: st.DataObject, role: Role, approved: bool, deletes: bool) -> None:
        """One UPDATE has the kinds of all its changes. It is `updated` only if it has no other kind."""
        name = data.draw(st.sampled_from(sorted(self.devices)))
        with self.database.unit_of_work() as unit:
            row = unit.session.get_one(Device, name)
            if deletes:
                unit.session.delete(row)
            else:
                row.role, row.approved = role, approved
        model = self.devices[name]
        if deletes:
            self.remove(name)
            return
        if approved is not model["approved"]:
            self.set_approved(name, approved)
        elif role is not model["role"]:
            self.expected.append((name, "updated"))
        model["role"] = role

    @action(some, data=st.data(), kept=st.booleans())
    def change_in_one_unit(self, data: st.DataObject, kept: bool) -> None:
        """Of a savepoint or a unit that was rolled back, no change remains."""
        name = data.draw(st.sampled_from(sorted(self.devices)))
        value = next(self.values)
        with self.database.unit_of_work() as unit:
            with suppress(LookupError), unit.savepoint():
                unit.devices.delete(name, force=True)
                raise LookupError
            unit.devices.update(name, DeviceUpdate(metadata=value))
            if not kept:
                unit.devices.revoke(name, force=True)
                unit.rollback()
        if kept:
            self.devices[name]["metadata_"] = value
            self.expected.append((name, "updated"))

    # Secrets and keys

    @action(data=st.data(), overlap=st.sampled_from([MINUTE, MINUTE, timedelta(0)]))
    def rotate(self, data: st.DataObject, overlap: timedelta) -> None:
        device = self.draw(data)
        row = self.devices.get(device)
        if row is None or (overlap and not row["approved"]):
            with pytest.raises(errors.DeviceNotFoundError if row is None else errors.DeviceNotApprovedError):
                self.database.rotate_secret(device, overlap=overlap)
            return
        secret = self.database.rotate_secret(device, overlap=overlap).get_secret_value()
        before, _, _ = self.secrets[device]
        self.secrets[device] = (secret, before, self.clock.now + overlap) if overlap else (secret, None, None)
        self.expected.append((device, "rotated"))
        if before is not None:
            self.old_secrets.append(before)

    @action(data=st.data())
    def check_secret(self, data: st.DataObject) -> None:
        device = self.draw(data)
        present, previous, until = self.secrets.get(device, (None, None, None))
        known = [secret for secret in (present, previous, previous, *self.old_secrets) if secret is not None]
        if not known:
            return
        secret = data.draw(st.sampled_from(known))
        right = [present] + ([previous] if until is not None and until > self.clock.now else [])
        status = self.status(device) if device in self.devices and secret in right else "denied"
        check = self.database.check_secret(device, secret)
        assert (check.status, bool(check)) == (status, status == "approved")

    @action(data=st.data())
    def insert_key(self, data: st.DataObject) -> None:
        device = self.draw(data)
        if self.keys.get(device, self.clock.now) <= self.clock.now:
            scope = IdempotencyScope(device, "m", "k")
            assert self.attempt("idempotency_keys", "insert", scope, 1, ttl=LIMITS.longest_ttl).result == 1
            self.keys[device] = self.clock.now + LIMITS.longest_ttl

    # The feed

    def read_feed(self) -> None:
        """Compare the rows that were added to the feed with the expected changes."""
        rows = self.database.devices.changes(after=self.numbers[-1], limit=1000)
        assert [(row.device_id, row.kind) for row in rows] == self.expected
        numbers = [self.numbers[-1], *(row.number for row in rows)]
        assert numbers == sorted(set(numbers))
        self.numbers += numbers[1:]
        self.feed += rows
        self.unfollowed += self.expected
        self.expected = []

    @action()
    def follow(self) -> None:
        """The iterator gets each change, in the order of the feed."""
        if self.expected:
            self.read_feed()
        for change in self.unfollowed:
            row = self.loop.run_until_complete(asyncio.wait_for(anext(self.iterator), 20))
            assert (row.device_id, row.kind) == change
        self.unfollowed = []

    @action()
    def sweep(self) -> None:
        """A sweep deletes pending devices, and then changes. An iterator with all changes gets no reset."""
        overdue = self.pending(overdue=True)
        deleted = self.attempt("devices", "delete_pending", paired_before=self.clock.now - LIMITS.pending_ttl)
        assert deleted == len(overdue)
        # The order of the rows that one statement deletes is not defined.
        rows = self.database.devices.changes(after=self.numbers[-1], limit=1000)
        assert sorted(str(row.device_id) for row in rows) == sorted(overdue)
        for row in rows:
            self.remove(str(row.device_id))
        self.follow()
        before = self.clock.now - LIMITS.changes_kept
        resets = [row for row in self.feed if row.kind is DeviceChangeKind.RESET]
        recent = [row for row in self.feed if row.at > before and row not in resets]
        gone = self.feed.index([*recent, self.feed[-1]][0])
        gone = 0 if self.feed[:gone] == resets else gone
        report = self.database.sweep()
        assert (report.pending_devices, report.device_changes, report.more) == (0, gone, False)
        del self.feed[:gone]
        self.keys = {device: until for device, until in self.keys.items() if until > self.clock.now}

    @action(data=st.data(), limit=st.integers(1, 3), by_iterator=st.booleans())
    def read_from_a_number(self, data: st.DataObject, limit: int, by_iterator: bool) -> None:
        """A reader continues from each number that the feed still contains, and gets a reset for the others."""
        after = data.draw(st.sampled_from(self.numbers))
        kept = [row.number for row in self.feed]
        if after in kept:
            wanted = [(row.number, row.kind) for row in self.feed if row.number > after][:limit]
        else:
            wanted = [(kept[-1], DeviceChangeKind.RESET)]
        if by_iterator:
            rows = self.loop.run_until_complete(self.read_by_an_iterator(after, len(wanted)))
        else:
            rows = list(self.database.devices.changes(after=after, limit=limit))
        assert [(row.number, row.kind) for row in rows] == wanted

    async def read_by_an_iterator(self, after: int, count: int) -> list[DeviceChange]:
        changes: Any = self.database.watch_devices(after=after)
        async with asyncio.timeout(20):
            rows = [await anext(changes) for _ in range(count)]
        await changes.aclose()
        return rows

    @invariant()
    def everything_is_as_modelled(self) -> None:
        if not hasattr(self, "iterator"):
            return
        self.read_feed()
        with self.database.unit_of_work(read_only=True) as unit:
            found = {row.id: row for row in unit.devices.list()}
            newest = [row.id for row in unit.devices.list(order="paired_at")]
            admins = [row.id for row in unit.devices.list(role=Role.ADMIN, status=DeviceStatus.APPROVED)]
            pending = unit.devices.count_pending(limit=100)
            keys = {name for name in NAMES if unit.idempotency_keys.find(IdempotencyScope(name, "m", "k"))}
        stored = {name: {key: getattr(row, key) for key in self.devices.get(name, ())} for name, row in found.items()}
        assert stored == self.devices
        assert all(row.status is self.status(name) for name, row in found.items())
        assert all((row.previous_secret_hash is None) is (self.secrets[name][2] is None) for name, row in found.items())
        assert newest == sorted(self.devices, key=lambda name: (self.devices[name]["paired_at"], name), reverse=True)
        assert admins == [
            name for name, row in sorted(self.devices.items()) if row["role"] is Role.ADMIN and row["approved"]
        ]
        assert pending == len(self.pending(overdue=False))
        assert keys == {name for name, until in self.keys.items() if until > self.clock.now}


KINDS = pytest.mark.parametrize("kind", [GuardMachine, DeviceMachine, SessionMachine])


@KINDS
def test_stores_follow_their_models(target: str, engine_name: str, kind: type[Machine]) -> None:
    """After 25 sequences on SQLite and 5 on PostgreSQL, each store and its model have given the same answers."""
    run_sequences(kind, target, 25 if engine_name == "sqlite" else 5, 25)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("share", SHARES)
def test_many_sequences(target: str, kind: type[Machine], share: int, record_property: RecordProperty) -> None:
    """After 2,000 sequences on SQLite and 320 on PostgreSQL, each store and its model have given the same answers."""
    run_share(kind, target, record_property)
