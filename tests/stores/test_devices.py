"""The store of devices."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import text, update

from homeagent import (
    AgentUpdate,
    Database,
    Device,
    DeviceCreate,
    DevicePair,
    DeviceStatus,
    DeviceUpdate,
    IdempotencyScope,
    Role,
)
from homeagent.errors import (
    ApprovalChangedError,
    ConflictError,
    DeviceExistsError,
    DeviceNotApprovedError,
    DeviceNotFoundError,
    InvalidArgumentError,
    LastAdminError,
)
from homeagent.scram import make_proof, proof_message, verifier_parameters
from tests.conftest import START, FakeClock, add_device, dump, write_past_checks

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)


def test_create_is_always_unapproved(database: Database) -> None:
    """A created device has the given fields, is pending, and has the clock's time as its pairing time."""
    metadata = {"b": "é\0😀", "a": [1.5, None]}
    with database.unit_of_work() as unit:
        made = unit.devices.create(
            DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x", metadata=metadata)
        )
    with database.unit_of_work(read_only=True) as unit:
        found = unit.devices.get("lamp")
    expected = Device(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x", paired_at=START, metadata=metadata)
    assert made == found == expected
    assert (found.approved, found.status, found.last_seen_at) == (False, DeviceStatus.PENDING, None)


def test_create_has_no_approval_field() -> None:
    """The create model has no field for the approval, and a role other than the three raises an error."""
    with pytest.raises(ValidationError):
        DeviceCreate(id="lamp", role=Role.NODE, shared_secret_hash="sha256$x", approved=True)
    with pytest.raises(ValidationError):
        DeviceCreate(id="lamp", role="root", shared_secret_hash="sha256$x")


def test_duplicate_create_leaves_the_first(database: Database) -> None:
    """If the id is taken, `create` raises an error; the first device keeps its secret, role and approval."""
    add_device(database, approved=True)
    before = dump(database)
    with pytest.raises(DeviceExistsError) as caught:
        add_device(database, role=Role.ADMIN)
    assert caught.value.device_id == "lamp"
    assert dump(database) == before


def test_absent_device(database: Database) -> None:
    """If a device does not exist, a search returns None, and changes raise DeviceNotFoundError."""
    with database.unit_of_work() as unit:
        assert unit.devices.find_by_id("nobody") is None
        assert unit.devices.update_last_seen("nobody") is False
        assert unit.devices.delete("nobody") is False
        for call in (unit.devices.get, unit.devices.approve, unit.devices.revoke):
            with pytest.raises(DeviceNotFoundError):
                call("nobody")
        with pytest.raises(DeviceNotFoundError):
            unit.devices.update("nobody", DeviceUpdate(metadata=1))
    assert dump(database)["devices"] == []


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
    with pytest.raises(DeviceNotFoundError):
        database.devices.list(order="paired_at", after="d14")
    with pytest.raises(InvalidArgumentError):
        database.devices.list(order="last_seen_at")  # type: ignore[arg-type]


def test_devices_that_were_seen_before_a_time(database: Database) -> None:
    """The filter selects devices whose last activity is earlier, and leaves out devices that were not seen yet."""
    for device_id, minutes in (("early", 3), ("exact", 2), ("late", 1), ("unseen", None)):
        add_device(database, device_id)
        if minutes is not None:
            database.devices.update_last_seen(device_id, START - minutes * MINUTE)
    found = database.devices.list(seen_before=START - 2 * MINUTE)
    assert [device.id for device in found] == ["early"]
    with pytest.raises(InvalidArgumentError, match="seen_before"):
        database.devices.list(seen_before=START.replace(tzinfo=None))


def test_bad_arguments_write_nothing(database: Database) -> None:
    """If a role, status, limit, reason or timestamp is invalid, the method raises an error before it writes a row."""
    add_device(database)
    before = dump(database)
    with database.unit_of_work() as unit:
        devices = unit.devices
        for limit in (0, -1, True):
            with pytest.raises(InvalidArgumentError):
                devices.list(limit=limit)
        with pytest.raises(InvalidArgumentError, match=r"^role must be one of client, node, admin$"):
            devices.list(role="root")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=r"^status must be one of pending, approved, revoked$"):
            devices.list(status="root")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError):
            devices.list(approved=1)  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match=r"^expected_role must be one of"):
            devices.approve("lamp", expected_role="root")  # type: ignore[arg-type]
        for reason in ("", "x" * 513, "line\n"):
            with pytest.raises(InvalidArgumentError):
                devices.revoke("lamp", reason=reason)
        with pytest.raises(InvalidArgumentError, match="aware"):
            devices.update_last_seen("lamp", START.replace(tzinfo=None))
        for seen in ({"expected_paired_at": START.replace(tzinfo=None)}, {"expected_secret_hash": 5}):
            with pytest.raises(InvalidArgumentError, match="expected_"):
                devices.approve("lamp", expected_role=Role.ADMIN, **seen)  # type: ignore[arg-type]  # on purpose
        stored = devices.get("lamp").shared_secret_hash
        good: dict[str, Any] = {"expected_secret_hash": stored, "secret_hash": "new", "proof_verifier": None}
        bad: dict[str, Any] = {"previous_until": START.replace(tzinfo=None), "proof_verifier": 5, "secret_hash": ""}
        for name, value in bad.items():
            with pytest.raises(InvalidArgumentError, match=name):
                devices.set_secret("lamp", **{**good, name: value})
        with pytest.raises(InvalidArgumentError):
            devices.rehash_secret("lamp", expected_secret_hash=stored, secret_hash="")
    assert dump(database) == before


def test_wrong_argument_types_write_nothing(database: Database) -> None:
    """If the argument is a dict, a request or another table's patch, the method raises an error and writes no row."""
    add_device(database)
    before = dump(database)
    row = Device(id="row", role=Role.NODE, shared_secret_hash="h", paired_at=START, approved=True)
    for wrong in ({"id": "new"}, DevicePair(id="new", role=Role.NODE), row, None):
        with pytest.raises(InvalidArgumentError, match="DeviceCreate"), database.unit_of_work() as unit:
            unit.devices.create(wrong)  # type: ignore[arg-type]  # on purpose
    for changes in ({"metadata": 1}, AgentUpdate(name="Lamp"), None):
        with pytest.raises(InvalidArgumentError, match="DeviceUpdate"), database.unit_of_work() as unit:
            unit.devices.update("lamp", changes)  # type: ignore[arg-type]  # on purpose
    for request in ({"id": "new"}, DeviceCreate(id="new", role=Role.NODE, shared_secret_hash="h"), None):
        with pytest.raises(InvalidArgumentError, match="DevicePair"):
            database.pair(request)  # type: ignore[arg-type]  # on purpose
    assert dump(database) == before


def test_update_changes_metadata_alone(database: Database) -> None:
    """`update` replaces the given metadata, empties the metadata for None and keeps metadata that is not given."""
    add_device(database)
    with database.unit_of_work() as unit:
        assert unit.devices.update("lamp", DeviceUpdate(metadata={"a": 1})).metadata_ == {"a": 1}
        assert unit.devices.update("lamp", DeviceUpdate()).metadata_ == {"a": 1}
        assert unit.devices.update("lamp", DeviceUpdate(metadata=None)).metadata_ is None
        assert unit.devices.get("lamp").shared_secret_hash == "sha256$of-lamp"


def test_approve_and_revoke(database: Database, clock: FakeClock) -> None:
    """`approve` and `revoke` return whether the device changed, and record the time and the reason."""
    add_device(database)
    with database.unit_of_work() as unit:
        approved_at = clock.advance(SECOND)
        assert unit.devices.approve("lamp") is True
        assert unit.devices.approve("lamp") is False
        device = unit.devices.get("lamp")
        assert (device.status, device.approved_at, device.revoked_at) == (DeviceStatus.APPROVED, approved_at, None)
        revoked_at = clock.advance(SECOND)
        assert unit.devices.revoke("lamp", reason="lost") is True
        assert unit.devices.revoke("lamp", reason="again") is False
        device = unit.devices.get("lamp")
        assert (device.status, device.revoked_at, device.revoked_reason) == (DeviceStatus.REVOKED, revoked_at, "lost")
        assert unit.devices.approve("lamp", expected_status=DeviceStatus.REVOKED) is True
        device = unit.devices.get("lamp")
        assert (device.status, device.revoked_at, device.revoked_reason) == (DeviceStatus.APPROVED, None, None)


def test_approve_refuses_a_newly_paired_device(database: Database, clock: FakeClock) -> None:
    """If a device paired again with another role or secret after it was shown, `approve` raises an error."""
    seen = add_device(database)
    with database.unit_of_work() as unit:
        unit.devices.delete("lamp")
    clock.advance(SECOND)
    add_device(database, role=Role.ADMIN)
    before = dump(database)
    with database.unit_of_work() as unit:
        for changed, expected in {
            "role": {"expected_role": seen.role},
            "secret": {"expected_secret_hash": "sha256$another"},
            "time of pairing": {"expected_paired_at": seen.paired_at},
        }.items():
            with pytest.raises(ApprovalChangedError) as caught:
                unit.devices.approve("lamp", **expected)  # type: ignore[arg-type]
            assert (caught.value.device_id, caught.value.changed) == ("lamp", changed)
    assert dump(database) == before
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp", expected_role=Role.ADMIN, expected_secret_hash="sha256$of-lamp")


@pytest.mark.parametrize("shown", [None, DeviceStatus.PENDING, DeviceStatus.APPROVED])
def test_approve_refuses_a_device_revoked_meanwhile(database: Database, shown: DeviceStatus | None) -> None:
    """If a device was revoked after it was shown, `approve` raises an error; `expected_status=REVOKED` approves."""
    add_device(database, approved=shown is DeviceStatus.APPROVED)
    with database.unit_of_work() as unit:
        unit.devices.revoke("lamp", reason="stolen")
    before = dump(database)
    with database.unit_of_work() as unit, pytest.raises(ApprovalChangedError) as caught:
        unit.devices.approve("lamp", expected_role=Role.CLIENT, expected_paired_at=START, expected_status=shown)
    assert caught.value.changed == "status"
    assert "expected_status=REVOKED" in str(caught.value)
    assert dump(database) == before
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp", expected_status=DeviceStatus.REVOKED) is True
        assert unit.devices.approve("lamp", expected_status=DeviceStatus.PENDING) is False
        with pytest.raises(InvalidArgumentError, match=r"^expected_status must be one of"):
            unit.devices.approve("lamp", expected_status="gone")  # type: ignore[arg-type]  # on purpose


@pytest.mark.parametrize("shown", [DeviceStatus.REVOKED, DeviceStatus.APPROVED])
def test_approve_refuses_a_pending_device_seen_in_another_status(database: Database, shown: DeviceStatus) -> None:
    """If only the status differs because the device paired again, `approve` raises an error."""
    add_device(database)
    before = dump(database)
    with database.unit_of_work() as unit, pytest.raises(ApprovalChangedError, match="another status"):
        unit.devices.approve("lamp", expected_status=shown)
    assert dump(database) == before


@pytest.mark.parametrize("revoked", [False, True], ids=["pending", "revoked"])
def test_overlap_needs_an_approved_device(database: Database, revoked: bool) -> None:
    """For a pending or revoked device, `set_secret` raises an error with an overlap, and works without one."""
    stored = add_device(database, approved=revoked).shared_secret_hash
    if revoked:
        database.run(lambda unit: unit.devices.revoke("lamp"))
    before = dump(database)
    new: dict[str, Any] = {"expected_secret_hash": stored, "secret_hash": "new", "proof_verifier": None}
    with database.unit_of_work() as unit, pytest.raises(DeviceNotApprovedError) as caught:
        unit.devices.set_secret("lamp", previous_until=START + MINUTE, **new)
    assert caught.value.device_id == "lamp"
    assert dump(database) == before
    assert database.run(lambda unit: unit.devices.set_secret("absent", previous_until=START + MINUTE, **new)) is False
    assert database.run(lambda unit: unit.devices.set_secret("lamp", **new)) is True


@pytest.mark.parametrize("status", [DeviceStatus.PENDING, DeviceStatus.REVOKED])
def test_approval_ends_an_earlier_overlap(database: Database, status: DeviceStatus) -> None:
    """If an earlier version stored a previous secret for an unapproved device, that secret is never accepted."""
    add_device(database)
    if status is DeviceStatus.REVOKED:
        database.run(lambda unit: unit.devices.revoke("lamp"))
    with database.unit_of_work() as unit:
        device = unit.session.get_one(Device, "lamp")
        device.previous_secret_hash, device.previous_secret_expires_at = "stolen", START + MINUTE
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp", expected_status=status) is True
        device = unit.devices.get("lamp")
        assert (device.previous_secret_hash, device.previous_secret_expires_at) == (None, None)


@pytest.mark.parametrize("act", ["revoke", "delete"])
def test_last_admin_is_kept(database: Database, act: str) -> None:
    """The last approved admin can be neither revoked nor deleted, unless the caller forces the change."""
    add_device(database, "root", role=Role.ADMIN, approved=True)
    add_device(database, "pending", role=Role.ADMIN)
    add_device(database, "node", role=Role.NODE, approved=True)
    before = dump(database)
    with database.unit_of_work() as unit:
        with pytest.raises(LastAdminError) as caught:
            getattr(unit.devices, act)("root")
        assert caught.value.device_id == "root"
    assert dump(database) == before
    with database.unit_of_work() as unit:
        assert getattr(unit.devices, act)("pending") is True
        assert getattr(unit.devices, act)("node") is True
        unit.devices.create(DeviceCreate(id="heir", role=Role.ADMIN, shared_secret_hash="sha256$h"))
        unit.devices.approve("heir")
        assert getattr(unit.devices, act)("root") is True
        with pytest.raises(LastAdminError):
            getattr(unit.devices, act)("heir")
        assert getattr(unit.devices, act)("heir", force=True) is True


def test_last_seen_once_a_minute(database: Database, clock: FakeClock) -> None:
    """The last-seen time is written once a minute and never moves back; a time in the future counts as now."""
    add_device(database)

    def see(at: datetime | None = None) -> bool:
        with database.unit_of_work() as unit:
            return unit.devices.update_last_seen("lamp", at)

    assert see() is True
    first = clock.now
    clock.advance(MINUTE - timedelta(milliseconds=1))
    assert see() is False
    clock.advance(timedelta(milliseconds=1))
    assert see() is True
    assert see(first) is False
    ahead = clock.now + timedelta(days=18_000)
    assert see(ahead) is False
    clock.advance(MINUTE)
    assert see(ahead) is True
    with database.unit_of_work(read_only=True) as unit:
        assert unit.devices.get("lamp").last_seen_at == clock.now


def test_last_seen_at_the_ends_of_time(database: Database) -> None:
    """A timestamp in the year 1 and the longest granularity both work."""
    add_device(database)
    with database.unit_of_work() as unit:
        assert unit.devices.update_last_seen("lamp", granularity=timedelta.max)
        assert not unit.devices.update_last_seen("lamp", granularity=timedelta.max)
        assert not unit.devices.update_last_seen("lamp", datetime.min.replace(tzinfo=UTC))


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


def test_list_filters_and_pages(database: Database) -> None:
    """Filters by approval, role and status can be combined, and pages are sorted by id."""
    add_device(database, "a", role=Role.ADMIN, approved=True)
    add_device(database, "b", role=Role.NODE, approved=True)
    add_device(database, "c", role=Role.NODE)
    add_device(database, "d", role=Role.NODE, approved=True)
    with database.unit_of_work() as unit:
        unit.devices.revoke("d")

        def ids(**options: object) -> str:
            return "".join(device.id for device in unit.devices.list(**options))  # type: ignore[arg-type]

        assert ids() == "abcd"
        assert ids(approved=True) == "ab"
        assert ids(approved=False) == "cd"
        assert ids(role=Role.NODE) == "bcd"
        assert ids(role=Role.NODE, approved=True) == "b"
        assert [ids(status=status) for status in DeviceStatus] == ["c", "ab", "d"]
        assert ids(limit=2) == "ab"
        assert ids(limit=2, after="b") == "cd"
        assert ids(role=Role.NODE, approved=False, after="c") == "d"


# An approval that another program stored.


@pytest.mark.parametrize("value", ["'false'", "'true'", "''", "x'01'", "2", "-1", "1.5"])
@pytest.mark.parametrize("revoked", [False, True])
def test_only_1_is_an_approval(database: Database, target: str, engine_name: str, value: str, revoked: bool) -> None:
    """If the stored approval is neither 0 nor 1, the device is not approved, and lists show it as unapproved."""
    if engine_name == "postgresql" and value not in {"2", "-1"}:
        pytest.skip("PostgreSQL stores nothing but integers in this column")
    secret = database.pair(DevicePair(id="lamp", role=Role.ADMIN)).shared_secret
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp")
        if revoked:
            assert unit.devices.revoke("lamp", force=True)
    write_past_checks(target, f"UPDATE devices SET approved = {value}")
    now = START
    with database.unit_of_work(read_only=True) as unit:
        verifier = unit.devices.get("lamp").proof_verifier
    assert verifier is not None
    message = proof_message(device_id="lamp", nonce="n", timestamp=now)
    proof = make_proof(secret, verifier_parameters(verifier), message)
    assert database.verify_secret("lamp", secret) is None
    assert database.verify_proof("lamp", nonce="n", timestamp=now, proof=proof) is None
    status = DeviceStatus.REVOKED  # it was approved before
    with database.unit_of_work(read_only=True) as unit:
        stored = unit.session.get(Device, "lamp")
        for device in (unit.devices.get("lamp"), *unit.devices.list(), stored):
            assert device is not None
            assert (device.approved, device.status) == (False, status)
        for listed in (
            *({"approved": approved} for approved in (True, False)),
            *({"status": wanted} for wanted in DeviceStatus),
        ):
            is_there = listed in ({"approved": False}, {"status": status})
            assert len(unit.devices.list(**listed)) == is_there, listed  # type: ignore[arg-type]  # each is one of the two
    assert database.doctor().finding("admins").facts == {"admins": 0, "devices": 1}  # type: ignore[union-attr]  # the finding exists
    assert database.doctor().finding("pending_devices").facts["pending"] == 0  # type: ignore[union-attr]
    add_device(database, "desk", role=Role.ADMIN, approved=True)
    with pytest.raises(LastAdminError), database.unit_of_work() as unit:
        unit.devices.revoke("desk")
    with database.unit_of_work() as unit:
        assert unit.devices.approve("lamp", expected_status=status)
    assert database.verify_secret("lamp", secret) is not None


def test_null_is_not_an_approval(database: Database, target: str, engine_name: str) -> None:
    """If another program made the column nullable, a null is not an approval, and the device is listed as revoked."""
    add_device(database, approved=True)
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


@pytest.mark.parametrize("value", ["2", "-1"])
def test_database_refuses_another_approval(database: Database, value: str) -> None:
    """The CHECK constraint refuses any approval other than 0 and 1 on both engines, and no row is written."""
    add_device(database, approved=True)
    before = dump(database)
    with pytest.raises(ConflictError), database.unit_of_work() as unit:
        unit.session.connection().execute(text(f"UPDATE devices SET approved = {value}"))
    assert dump(database) == before


def test_approval_through_the_orm(database: Database, clock: FakeClock) -> None:
    """An approval or revocation through the ORM sets the time and removes the old secret, as the store does."""
    add_device(database, "lamp")
    with database.unit_of_work() as unit:
        unit.session.get_one(Device, "lamp").metadata_ = {"room": 1}
    assert database.devices.get("lamp").status is DeviceStatus.PENDING
    with database.unit_of_work() as unit:
        device = unit.session.get_one(Device, "lamp")
        device.previous_secret_hash = "sha256$old"
        device.approved = True
    approved = database.devices.get("lamp")
    assert (approved.approved_at, approved.previous_secret_hash) == (START, None)
    later = clock.advance(seconds=1)
    with database.unit_of_work() as unit:
        device = unit.session.get_one(Device, "lamp")
        unit.devices.update_last_seen("lamp")  # afterwards the old value of the attribute is not loaded
        device.approved = False
    revoked = database.devices.get("lamp")
    assert (revoked.status, revoked.revoked_at) == (DeviceStatus.REVOKED, later)
    with database.unit_of_work() as unit:
        unit.session.get_one(Device, "lamp").approved = True
    assert database.devices.get("lamp").revoked_at is None


def test_update_statement_withdraws_an_approval(database: Database) -> None:
    """If an UPDATE statement sets `approved` to 0, the row and the lists show the device as revoked, not as pending."""
    add_device(database, "lamp", approved=True)
    add_device(database, "new")
    with database.unit_of_work() as unit:
        unit.session.execute(update(Device).values(approved=False))
    assert database.devices.get("lamp").status is DeviceStatus.REVOKED
    found = {status: [device.id for device in database.devices.list(status=status)] for status in DeviceStatus}
    assert found == {DeviceStatus.PENDING: ["new"], DeviceStatus.APPROVED: [], DeviceStatus.REVOKED: ["lamp"]}
    with pytest.raises(ApprovalChangedError):
        database.devices.approve("lamp")
    assert database.devices.revoke("lamp") is True
    assert database.devices.revoke("lamp") is False
