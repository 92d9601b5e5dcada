"""The store of devices."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import text, update

from homeagent import (
    Database,
    Device,
    DeviceCreate,
    DevicePair,
    DeviceStatus,
    DeviceUpdate,
    IdempotencyKey,
    IdempotencyScope,
    Limits,
    Role,
    errors,
)
from homeagent.models.types import MAX_LIMIT
from homeagent.scram import make_proof, proof_message, verifier_parameters
from homeagent.stores import device_statements as statements
from tests.conftest import START, FakeClock, MakeDatabase, add_device, dump, plan_of, write_past_checks

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)


def test_create_is_always_unapproved(database: Database) -> None:
    """A created device is pending, has the given fields and the clock's time; no field gives an approval."""
    for wrong in ({"role": Role.NODE, "approved": True}, {"role": "root"}):
        with pytest.raises(ValidationError):
            DeviceCreate(id="lamp", shared_secret_hash="sha256$x", **wrong)  # type: ignore[arg-type]  # on purpose
    metadata = {"b": "é\0😀", "a": [1.5, None]}
    made = database.devices.create(
        DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x", metadata=metadata)
    )
    found = database.devices.get("lamp")
    expected = Device(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x", paired_at=START, metadata=metadata)
    assert made == found == expected
    assert (found.approved, found.status, found.last_seen_at) == (False, DeviceStatus.PENDING, None)


def test_pages_in_the_order_of_pairing(database: Database, clock: FakeClock) -> None:
    """The newest device comes first, and pages neither repeat nor skip a device, also if devices have the same time."""
    for number in range(6):
        add_device(database, f"d{number % 3}{number}")
        clock.advance(minutes=number % 2)
    everything = [device.id for device in database.devices.list(order="paired_at")]
    assert everything == ["d25", "d14", "d22", "d03", "d11", "d00"]
    for by_id in (True, False):
        page = database.devices.list(order="paired_at", limit=2)
        found = list(page)
        while page:
            page = database.devices.list(order="paired_at", limit=2, after=page[-1].id if by_id else page[-1])
            found += page
        assert [device.id for device in found] == everything
    last = database.devices.get("d14")
    database.devices.delete("d14")
    assert [device.id for device in database.devices.list(order="paired_at", after=last, limit=1)] == ["d22"]
    with pytest.raises(errors.DeviceNotFoundError):
        database.devices.list(order="paired_at", after="d14")


def test_update_changes_metadata_alone(database: Database) -> None:
    """`update` replaces the given metadata, empties the metadata for None and keeps metadata that is not given."""
    add_device(database)
    for changes, kept in (({"metadata": {"a": 1}}, {"a": 1}), ({}, {"a": 1}), ({"metadata": None}, None)):
        assert database.devices.update("lamp", DeviceUpdate(**changes)).metadata_ == kept
    assert database.devices.get("lamp").shared_secret_hash == "sha256$of-lamp"


def test_approve_refuses_a_newly_paired_device(database: Database, clock: FakeClock) -> None:
    """If a device paired again or was revoked after it was shown, `approve` raises an error with the difference."""
    seen = add_device(database)
    database.devices.delete("lamp")
    clock.advance(SECOND)
    add_device(database, role=Role.ADMIN)
    before = dump(database)
    with database.unit_of_work() as unit:
        for changed, expected in {
            "role": {"expected_role": seen.role},
            "secret": {"expected_secret_hash": "sha256$another"},
            "time of pairing": {"expected_paired_at": seen.paired_at},
        }.items():
            with pytest.raises(errors.ApprovalChangedError) as caught:
                unit.devices.approve("lamp", **expected)  # type: ignore[arg-type]
            assert (caught.value.device_id, caught.value.changed) == ("lamp", changed)
        # No database can store this text, so the hash differs too.
        with pytest.raises(errors.ApprovalChangedError):
            unit.devices.approve("lamp", expected_secret_hash="\ud800")
    assert dump(database) == before
    assert database.devices.approve("lamp", expected_role=Role.ADMIN, expected_secret_hash="sha256$of-lamp")


@pytest.mark.parametrize("revoked", [False, True], ids=["pending", "revoked"])
def test_overlap_needs_an_approved_device(database: Database, revoked: bool) -> None:
    """For a pending or revoked device, `set_secret` raises an error with an overlap, and works without one."""
    stored = add_device(database, approved=revoked).shared_secret_hash
    if revoked:
        database.run(lambda unit: unit.devices.revoke("lamp"))
    before = dump(database)
    new: dict[str, Any] = {"expected_secret_hash": stored, "secret_hash": "new", "proof_verifier": None}
    with database.unit_of_work() as unit, pytest.raises(errors.DeviceNotApprovedError) as caught:
        unit.devices.set_secret("lamp", previous_until=START + MINUTE, **new)
    assert caught.value.device_id == "lamp"
    assert dump(database) == before
    assert database.run(lambda unit: unit.devices.set_secret("absent", previous_until=START + MINUTE, **new)) is False
    with database.unit_of_work() as unit:
        for unstorable in ("\ud800", "a\0b"):
            changed = {**new, "expected_secret_hash": unstorable, "previous_until": START + MINUTE}
            assert unit.devices.set_secret("absent", **changed) is False
    assert database.run(lambda unit: unit.devices.set_secret("lamp", **new)) is True


def test_the_hash_can_be_an_enum(database: Database) -> None:
    """For a hash that is a str and an enum, `set_secret` stores the text of the hash."""
    hashes = Enum("hashes", {"NEW": "sha256$new"}, type=str)
    stored = add_device(database).shared_secret_hash
    new: dict[str, Any] = {"expected_secret_hash": stored, "secret_hash": hashes["NEW"], "proof_verifier": None}
    assert database.devices.set_secret("lamp", **new)
    assert database.devices.get("lamp").shared_secret_hash == "sha256$new"


def test_approve_and_revoke(database: Database, clock: FakeClock) -> None:
    """An approval and a revocation record the time and the reason. An approval also clears the revocation, and the
    previous secret that an earlier version stored for the device.
    """
    add_device(database)
    for status in (DeviceStatus.PENDING, DeviceStatus.REVOKED):
        with database.unit_of_work() as unit:
            device = unit.session.get_one(Device, "lamp")
            device.previous_secret_hash, device.previous_secret_expires_at = "stolen", START + MINUTE
        clock.advance(SECOND)
        assert database.devices.approve("lamp", expected_status=status) is True
        device = database.devices.get("lamp")
        assert (device.previous_secret_hash, device.previous_secret_expires_at) == (None, None)
        assert (device.approved_at, device.revoked_at, device.revoked_reason) == (clock.now, None, None)
        assert database.devices.revoke("lamp", reason="lost") is True
        assert database.devices.revoke("lamp", reason="again") is False
        device = database.devices.get("lamp")
        assert (device.status, device.revoked_at, device.revoked_reason) == (DeviceStatus.REVOKED, clock.now, "lost")


def test_last_seen_once_a_minute(database: Database, clock: FakeClock) -> None:
    """The last-seen time is written exactly once a minute; a granularity of any length and any year are accepted."""
    add_device(database)
    assert database.devices.update_last_seen("lamp", granularity=timedelta.max)
    clock.advance(MINUTE - timedelta(milliseconds=1))
    assert not database.devices.update_last_seen("lamp")
    clock.advance(milliseconds=1)
    assert database.devices.update_last_seen("lamp")
    assert database.devices.get("lamp").last_seen_at == clock.now
    assert not database.devices.update_last_seen("lamp", granularity=timedelta.max)
    for earlier in (clock.now - MINUTE, datetime.min.replace(tzinfo=UTC)):
        assert not database.devices.update_last_seen("lamp", earlier)
    assert database.devices.get("lamp").last_seen_at == clock.now


def test_delete_removes_results_and_keeps_nonces(database: Database) -> None:
    """`delete` removes a device's results, so that a new device with the id never gets them, and keeps its nonces."""
    for device_id in ("lamp", "other"):
        add_device(database, device_id)
    scopes = [IdempotencyScope(device_id, "on", "k") for device_id in ("lamp", "other")]
    with database.unit_of_work() as unit:
        for scope in scopes:
            unit.idempotency_keys.insert(scope, 1, ttl=MINUTE)
            assert unit.nonces.consume(scope.device_id, "n", expires_at=START + MINUTE)
        assert unit.devices.delete("lamp") is True
    with database.unit_of_work() as unit:
        assert [unit.idempotency_keys.find(scope) is None for scope in scopes] == [True, False]
        assert unit.nonces.consume("lamp", "n", expires_at=START + MINUTE) is False


_SQL = {
    "SQL": "DELETE FROM devices WHERE id = 'lamp'",
    "another id": "UPDATE devices SET id = 'moved' WHERE id = 'lamp'",
}


@pytest.mark.parametrize("way", ["ORM", "sweep", *_SQL])
def test_each_deletion_removes_results(database: Database, clock: FakeClock, way: str) -> None:
    """A deletion by SQL, the ORM or a sweep removes a device's results and keeps its nonces. So does another id."""
    scopes = [IdempotencyScope(device_id, "on", "k") for device_id in ("lamp", "other")]
    for scope in scopes:
        add_device(database, scope.device_id, approved=scope.device_id == "other")
        database.idempotency_keys.insert(scope, 1, ttl=60 * DAY)
        assert database.nonces.consume(scope.device_id, "n", expires_at=START + 60 * DAY)
    if way == "sweep":
        clock.advance(days=31)
        assert database.sweep().pending_devices == 1
    new = IdempotencyScope("lamp", "on", "new")
    with database.unit_of_work() as unit:
        if way == "ORM":
            unit.session.delete(unit.session.get_one(Device, "lamp"))
        elif way in _SQL:
            unit.session.connection().execute(text(_SQL[way]))
        unit.devices.create(DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x"))
        unit.idempotency_keys.insert(new, 2, ttl=MINUTE)
    # The new device's key was stored in the unit of the deletion, and stays.
    assert [database.idempotency_keys.find(scope) is None for scope in (*scopes, new)] == [True, False, False]
    assert database.nonces.consume("lamp", "n", expires_at=START + 60 * DAY) is False


def test_the_session_notices_removed_results(database: Database) -> None:
    """After `delete`, `uow.session` does not find a result that it had loaded, because a trigger removed the result."""
    add_device(database)
    scope = IdempotencyScope("lamp", "on", "k")
    database.idempotency_keys.insert(scope, 1, ttl=MINUTE)
    with database.unit_of_work() as unit:
        key = {"device_id": "lamp", "method": "on", "key": "k"}
        loaded = unit.session.get_one(IdempotencyKey, key)
        assert unit.devices.delete("lamp")
        assert unit.session.get(IdempotencyKey, key) is None
        assert loaded not in unit.session


def test_list_filters_and_pages(database: Database) -> None:
    """Filters by approval, role and status can be combined, and pages are sorted by id."""
    add_device(database, "a", role=Role.ADMIN, approved=True)
    for name in "bcd":
        add_device(database, name, role=Role.NODE, approved=name != "c")
    database.devices.revoke("d")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("abcd", {}),
        ("ab", {"approved": True}),
        ("cd", {"approved": False}),
        ("bcd", {"role": Role.NODE}),
        ("b", {"role": Role.NODE, "approved": True}),
        *(zip(["c", "ab", "d"], [{"status": status} for status in DeviceStatus], strict=True)),
        ("ab", {"limit": 2}),
        ("cd", {"limit": 2, "after": "b"}),
        ("d", {"role": Role.NODE, "approved": False, "after": "c"}),
    ]
    # Devices whose last activity is earlier, without the devices that were not seen yet
    for device_id, minutes in (("a", 3), ("b", 2), ("c", 1)):
        database.devices.update_last_seen(device_id, START - minutes * MINUTE)
    cases.append(("a", {"seen_before": START - 2 * MINUTE}))
    for ids, options in cases:
        assert "".join(device.id for device in database.devices.list(**options)) == ids


# An approval that another program stored.


@pytest.mark.parametrize(
    ("engine_name", "value", "revoked"),
    [
        *(("sqlite", value, False) for value in ("'false'", "''", "x'01'", "-1", "1.5")),
        *(("sqlite", value, True) for value in ("'true'", "2")),
        ("postgresql", "2", False),
        ("postgresql", "-1", True),  # PostgreSQL stores nothing but integers in this column
    ],
)
def test_only_1_is_an_approval(database: Database, target: str, value: str, revoked: bool) -> None:
    """If the stored approval is neither 0 nor 1, the device is not approved, and lists show it as unapproved."""
    secret = database.pair(DevicePair(id="lamp", role=Role.ADMIN)).shared_secret
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp")
        if revoked:
            assert unit.devices.revoke("lamp", force=True)
    write_past_checks(target, f"UPDATE devices SET approved = {value}")
    verifier = database.devices.get("lamp").proof_verifier
    assert verifier is not None
    message = proof_message(device_id="lamp", nonce="n", timestamp=START)
    proof = make_proof(secret, verifier_parameters(verifier), message)
    assert database.verify_secret("lamp", secret) is None
    assert database.verify_proof("lamp", nonce="n", timestamp=START, proof=proof) is None
    status = DeviceStatus.REVOKED  # it was approved before
    with database.unit_of_work(read_only=True) as unit:
        for device in (unit.devices.get("lamp"), *unit.devices.list(), unit.session.get_one(Device, "lamp")):
            assert (device.approved, device.status) == (False, status)
        assert [len(unit.devices.list(approved=approved)) for approved in (True, False)] == [0, 1]
        assert [wanted for wanted in DeviceStatus if unit.devices.list(status=wanted)] == [status]
    assert database.doctor().finding("admins").facts == {"admins": 0, "devices": 1}  # type: ignore[union-attr]  # the finding exists
    add_device(database, "desk", role=Role.ADMIN, approved=True)
    with pytest.raises(errors.LastAdminError):
        database.devices.revoke("desk")
    assert database.devices.approve("lamp", expected_status=status)
    assert database.verify_secret("lamp", secret) is not None


def test_null_is_not_an_approval(database: Database, target: str, engine_name: str) -> None:
    """A CHECK refuses any approval other than 0 and 1; if another program made the column nullable, NULL is none."""
    add_device(database, approved=True)
    before = dump(database)
    for value in (2, -1):
        with pytest.raises(errors.ConflictError), database.unit_of_work() as unit:
            unit.session.connection().execute(text(f"UPDATE devices SET approved = {value}"))
    assert dump(database) == before
    nullable = {
        "postgresql": ["ALTER TABLE devices ALTER COLUMN approved DROP NOT NULL"],
        "sqlite": [
            "PRAGMA writable_schema=ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'approved INTEGER DEFAULT 0 NOT NULL', 'approved INTEGER')"
            " WHERE name = 'devices'",
            "PRAGMA schema_version=1000",
        ],
    }
    write_past_checks(target, *nullable[engine_name], "UPDATE devices SET approved = NULL")
    with database.unit_of_work(read_only=True) as unit:
        (device,) = unit.devices.list(status=DeviceStatus.REVOKED)
        assert device.approved is False
        assert unit.devices.list(approved=True) == []


def test_approval_through_the_orm(database: Database, clock: FakeClock) -> None:
    """If the ORM has not loaded the old approval, a revocation through the ORM sets the time, as the store does."""
    add_device(database, "lamp", approved=True)
    later = clock.advance(seconds=1)
    with database.unit_of_work() as unit:
        device = unit.session.get_one(Device, "lamp")
        device.previous_secret_hash = "sha256$old"
        unit.devices.update_last_seen("lamp")  # afterwards the old value of the attribute is not loaded
        device.approved = False
    revoked = database.devices.get("lamp")
    assert (revoked.status, revoked.revoked_at, revoked.previous_secret_hash) == (DeviceStatus.REVOKED, later, None)


def test_update_statement_withdraws_an_approval(database: Database) -> None:
    """If an UPDATE statement sets `approved` to 0, the row and the lists show the device as revoked, not as pending."""
    add_device(database, "lamp", approved=True)
    add_device(database, "new")
    with database.unit_of_work() as unit:
        unit.session.execute(update(Device).values(approved=False))
    assert database.devices.get("lamp").status is DeviceStatus.REVOKED
    found = {status: [device.id for device in database.devices.list(status=status)] for status in DeviceStatus}
    assert found == {DeviceStatus.PENDING: ["new"], DeviceStatus.APPROVED: [], DeviceStatus.REVOKED: ["lamp"]}
    with pytest.raises(errors.ApprovalChangedError):
        database.devices.approve("lamp")
    assert database.devices.revoke("lamp") is True
    assert database.devices.revoke("lamp") is False


# Limits of pending devices


def can_pair(database: Database, device_id: str) -> bool:
    """Pair a device, and return whether the number of pending devices was below its limit of 3."""
    try:
        database.pair(DevicePair(id=device_id, role=Role.NODE))
    except errors.PendingLimitError as error:
        return error.limit != 3
    return True


def test_the_bound_is_exact_for_callers_at_the_same_time(reopen: MakeDatabase) -> None:
    """If callers pair at the same time in several databases on the same store, the number is exactly the limit."""
    databases = [reopen(limits=Limits(pending_devices=3)) for _ in range(3)]
    with ThreadPoolExecutor(9) as threads:
        calls = [threads.submit(can_pair, databases[number % 3], f"d{number}") for number in range(9)]
        assert sum(call.result() for call in calls) == 3
    assert len(databases[0].devices.list()) == 3


def test_pairing_is_closed(reopen: MakeDatabase) -> None:
    """With a limit of 0 no device pairs, but code that holds a hash adds a device. With the largest, devices pair."""
    database = reopen(limits=Limits(pending_devices=0))
    with pytest.raises(errors.PendingLimitError, match="pairing is closed"):
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    assert add_device(database, "lamp").status is DeviceStatus.PENDING
    database = reopen(limits=Limits(pending_devices=MAX_LIMIT - 1))
    assert database.pair(DevicePair(id="door", role=Role.NODE)).device.status is DeviceStatus.PENDING


def test_a_sweep_removes_old_pending_devices(reopen: MakeDatabase, clock: FakeClock) -> None:
    """If a device is pending for too long, a sweep removes the device; approved and revoked devices stay."""
    database = reopen(limits=Limits(pending_ttl=timedelta(days=2)))
    for device_id in ("waiting", "approved", "revoked"):
        add_device(database, device_id, approved=device_id == "approved")
    database.devices.revoke("revoked")
    clock.advance(days=1)
    add_device(database, "later")
    clock.advance(timedelta(days=1) - timedelta(milliseconds=1))
    assert database.sweep().pending_devices == 0
    clock.advance(milliseconds=1)
    assert database.sweep(batch_size=1).pending_devices == 1
    assert [device.id for device in database.devices.list()] == ["approved", "later", "revoked"]


def test_the_index_counts(sqlite_database: Database) -> None:
    """SQLite counts and removes pending devices by the partial index, without reading rows for the count."""
    for statement, index in ((statements.COUNT_PENDING, "COVERING INDEX"), (statements.DELETE_PENDING, "INDEX")):
        plan = plan_of(sqlite_database, statement, limit=5, before=sqlite_database._clock())
        assert f"{index} idx_devices_pending" in "\n".join(plan)


@pytest.mark.parametrize(
    "bad",
    [
        {"pending_devices": -1},
        {"pending_devices": True},
        {"pending_devices": MAX_LIMIT},
        *({name: timedelta(0)} for name in ("pending_ttl", "longest_ttl", "changes_kept")),
        *({name: 0} for name in ("waiting_hashes", "nonces_per_device", "failed_checks_per_minute")),
        {"keys_per_device": True},
    ],
    ids=str,
)
def test_bad_limits_are_refused(bad: dict[str, Any]) -> None:
    """If a limit is invalid, creating the limits raises."""
    with pytest.raises(errors.InvalidArgumentError):
        Limits(**bad)
    with pytest.raises(errors.InvalidArgumentError, match="Limits"):
        Database.open(":memory:", limits=bad)


def test_limits_by_default() -> None:
    """Without an argument, each limit has the value that the documentation names."""
    days = [timedelta(days=days) for days in (30, 400, 7)]
    limits = Limits()
    assert (limits.pending_devices, limits.nonces_per_device, limits.keys_per_device) == (1_000, 10_000, 10_000)
    assert (limits.waiting_hashes, limits.failed_checks_per_minute) == (16, 30)
    assert [limits.pending_ttl, limits.longest_ttl, limits.changes_kept] == days


@pytest.mark.parametrize("revoked", [False, True], ids=["pending", "revoked"])
def test_approve_refuses_another_status(database: Database, revoked: bool) -> None:
    """If a device has another status than was shown, `approve` raises an error; the right status approves."""
    add_device(database, approved=revoked)
    if revoked:
        database.devices.revoke("lamp", reason="stolen")
    status = DeviceStatus.REVOKED if revoked else DeviceStatus.PENDING
    before = dump(database)
    with database.unit_of_work() as unit:
        # An approval without a status expects a pending device.
        for shown in {*DeviceStatus, *([None] if revoked else [])} - {status}:
            with pytest.raises(errors.ApprovalChangedError, match=r"another status.*expected_status=REVOKED") as caught:
                unit.devices.approve("lamp", expected_role=Role.CLIENT, expected_paired_at=START, expected_status=shown)
            assert caught.value.changed == "status"
    assert dump(database) == before
    assert database.devices.approve("lamp", expected_status=status) is True
    assert database.devices.approve("lamp", expected_status=DeviceStatus.PENDING) is False


@pytest.mark.parametrize("act", ["revoke", "delete"])
def test_last_admin_is_kept(database: Database, act: str) -> None:
    """The last approved admin can be neither revoked nor deleted, unless the caller forces the change."""
    add_device(database, "root", role=Role.ADMIN, approved=True)
    add_device(database, "pending", role=Role.ADMIN)
    add_device(database, "node", role=Role.NODE, approved=True)
    before = dump(database)
    with database.unit_of_work() as unit:
        with pytest.raises(errors.LastAdminError) as caught:
            getattr(unit.devices, act)("root")
        assert caught.value.device_id == "root"
    assert dump(database) == before
    with database.unit_of_work() as unit:
        assert getattr(unit.devices, act)("pending") is True
        assert getattr(unit.devices, act)("node") is True
        unit.devices.create(DeviceCreate(id="heir", role=Role.ADMIN, shared_secret_hash="sha256$h"))
        unit.devices.approve("heir")
        assert getattr(unit.devices, act)("root") is True
        with pytest.raises(errors.LastAdminError):
            getattr(unit.devices, act)("heir")
        assert getattr(unit.devices, act)("heir", force=True) is True


def test_the_number_of_pending_devices_is_limited(reopen: MakeDatabase) -> None:
    """At the limit no device pairs, and approving, revoking or deleting a pending device allows another pairing."""
    database = reopen(limits=Limits(pending_devices=3))
    add_device(database, "approved", approved=True)
    assert [can_pair(database, f"d{number}") for number in range(4)] == [True, True, True, False]
    assert database.devices.find_by_id("d3") is None
    with pytest.raises(errors.DeviceExistsError):
        can_pair(database, "d0")
    for settle in (database.devices.approve, database.devices.revoke, database.devices.delete):
        settle(f"d{['approve', 'revoke', 'delete'].index(settle.__name__)}")
        assert [can_pair(database, f"{settle.__name__}-{number}") for number in range(2)] == [True, False]
    assert len(database.devices.list(status=DeviceStatus.PENDING)) == 3
