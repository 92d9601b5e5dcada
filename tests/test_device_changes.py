"""The feed of device changes: kinds and order of the rows from every source, resets, and the deletion of old rows."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import text, update

from homeagent import Database, Device, DeviceChange, DeviceUpdate, Role, UnitOfWork
from homeagent.errors import InvalidArgumentError
from homeagent.migrations.revisions import loaded
from tests.conftest import ROOT, START, FakeClock, add_device


def listed(database: Database, after: int = 0) -> list[tuple[str | None, str]]:
    """Return the ids and kinds of the changes after a number."""
    return [(change.device_id, change.kind.value) for change in database.devices.changes(after=after)]


def test_the_time_of_a_change_is_the_time_of_the_method(database: Database, clock: FakeClock) -> None:
    """A change has the time at which the device was paired, approved or revoked, and `limit` ends a page of changes."""
    add_device(database, "lamp")
    for change in (database.devices.approve, database.devices.revoke):
        clock.advance(seconds=1)
        assert change("lamp")
    changes = database.devices.changes(after=0)
    assert [(each.kind.value, (each.at - START).total_seconds()) for each in changes] == [
        ("paired", 0),
        ("approved", 1),
        ("revoked", 2),
    ]
    assert database.devices.changes(after=1, limit=1) == changes[1:2]


TIMED: dict[str, Callable[[UnitOfWork], object]] = {
    "updated": lambda unit: unit.devices.update("lamp", DeviceUpdate(metadata=1)),
    "rotated": lambda unit: unit.devices.set_secret(
        "lamp", expected_secret_hash="sha256$of-lamp", secret_hash="sha256$new", proof_verifier=None
    ),
    "rotated by a new hash": lambda unit: unit.devices.rehash_secret(
        "lamp", expected_secret_hash="sha256$of-lamp", secret_hash="sha256$new"
    ),
    "deleted": lambda unit: unit.devices.delete("lamp"),
    "deleted as pending": lambda unit: unit.devices.delete_pending(paired_before=START),
}


@pytest.mark.parametrize("kind", TIMED)
def test_each_method_stores_the_time_of_the_unit(database: Database, clock: FakeClock, kind: str) -> None:
    """A change of a store's method has the clock's time. A change by SQL has the database's time, before and after."""
    add_device(database, "other", approved=True)
    add_device(database)
    change_other = text("UPDATE devices SET metadata = :value WHERE id = 'other'")
    with database.unit_of_work() as unit:
        unit.session.connection().execute(change_other, {"value": "1"})
    clock.advance(seconds=5)
    with database.unit_of_work() as unit:
        TIMED[kind](unit)
        with contextlib.suppress(LookupError), unit.savepoint():
            clock.advance(seconds=1)
            unit.devices.update("other", DeviceUpdate(metadata=2))
            raise LookupError
        assert unit.devices.update("other", DeviceUpdate()).metadata_ == 1
    with database.unit_of_work() as unit:
        unit.session.connection().execute(change_other, {"value": "3"})
    *_, before, change, after = database.devices.changes()
    assert (change.device_id, change.kind.value) == ("lamp", kind.split()[0])
    assert change.at == START + timedelta(seconds=5)
    assert [each.device_id for each in (before, after)] == ["other", "other"]
    # The real time is after the time of the test's clock.
    assert min(before.at, after.at) > START + timedelta(days=1)


def test_an_unchanged_row_keeps_the_time_of_its_last_change(database: Database, clock: FakeClock) -> None:
    """If a method changes no value, no earlier change gets the clock's time."""
    add_device(database)
    database.devices.update("lamp", DeviceUpdate(metadata=1))
    clock.advance(seconds=5)
    database.devices.update("lamp", DeviceUpdate(metadata=1))
    assert not database.devices.delete("absent")
    # PostgreSQL also records an UPDATE without a new value.
    times = [START, START, START + timedelta(seconds=5)]
    assert [change.at for change in database.devices.changes()] in (times, times[:2])


def test_changes_by_sql_and_by_the_orm_are_in_the_feed(database: Database) -> None:
    """The triggers record changes through `uow.session` and by SQL, also in one unit and after a savepoint."""
    add_device(database, "pending")
    with database.unit_of_work() as unit:
        unit.session.add(Device(id="orm", role=Role.NODE, shared_secret_hash="h", paired_at=START, approved=True))
        unit.session.flush()
        connection = unit.session.connection()
        connection.execute(text("UPDATE devices SET last_seen_at = 5, metadata = metadata"))
        connection.execute(text("UPDATE devices SET approved = 0 WHERE id = 'orm'"))
        connection.execute(text("UPDATE devices SET id = 'moved', approved = 1 WHERE id = 'orm'"))
        connection.execute(text("UPDATE devices SET approved = 0, shared_secret_hash = 'x' WHERE id = 'moved'"))
        try:
            with unit.savepoint():
                unit.devices.delete("moved")
                raise LookupError
        except LookupError:
            pass
        unit.devices.revoke("pending")
        unit.session.get_one(Device, "moved").role = Role.ADMIN
    assert listed(database, after=1) == [
        ("orm", "paired"),
        ("orm", "approved"),
        ("orm", "revoked"),
        ("orm", "deleted"),
        ("moved", "paired"),
        ("moved", "approved"),
        ("moved", "revoked"),
        ("moved", "rotated"),
        ("pending", "revoked"),
        ("moved", "updated"),
    ]


def test_a_swept_number_gives_a_reset(database: Database, clock: FakeClock) -> None:
    """A sweep deletes changes from the beginning of the feed; a reader whose number is gone gets a reset."""
    add_device(database, "old")
    add_device(database, "newer")
    clock.advance(days=6)
    add_device(database, "new")
    clock.advance(days=2)
    with database.unit_of_work() as unit:  # a late import with an old date must not leave a gap
        unit.session.add(Device(id="late", role=Role.NODE, shared_secret_hash="h", paired_at=START))
    report = database.sweep()
    assert (report.device_changes, report.more) == (3, False)
    assert listed(database, after=3) == [("late", "paired")]
    (reset,) = database.devices.changes(after=2)
    assert (reset.number, reset.device_id, reset.kind) == (4, None, "reset")
    assert database.devices.changes(after=reset.number) == []
    clock.advance(days=8)
    assert database.sweep(batch_size=1).device_changes == 1
    assert listed(database, after=4) == []  # the newest change stays
    assert [change.kind for change in database.devices.changes(after=99)] == ["reset"]


@pytest.mark.parametrize("at", [START, START + timedelta(days=365)])
def test_the_first_reset_stays_until_the_next_change_is_old(database: Database, clock: FakeClock, at: datetime) -> None:
    """The time of the first row does not matter to a sweep, because the database's clock can have written the time."""
    with database.unit_of_work() as unit:
        unit.session.connection().execute(update(DeviceChange).values(at=at))
    clock.advance(days=30)
    for device_id in ("lamp", "phone"):
        add_device(database, device_id)
    clock.advance(days=6)
    assert database.sweep(dry_run=True).device_changes == database.sweep().device_changes == 0
    assert listed(database) == [("lamp", "paired"), ("phone", "paired")]
    clock.advance(days=2)
    assert database.sweep(dry_run=True).device_changes == database.sweep(batch_size=1).device_changes == 2
    assert listed(database, after=2) == []


def test_a_new_epoch_restarts_the_feed(target: str, clock: FakeClock) -> None:
    """After `begin_epoch`, every earlier number gives a reset, and the numbers grow."""
    with Database.open(target, clock=clock) as database:
        add_device(database, "lamp")
        before = database.devices.changes(after=0)
    Database.begin_epoch(target)
    with Database.open(target, clock=clock) as database:
        for number in (0, before[-1].number, before[-1].number + 5):
            (reset,) = database.devices.changes(after=number)
            assert (reset.kind, reset.number > before[-1].number) == ("reset", True)
        add_device(database, "phone")
        assert listed(database, after=reset.number) == [("phone", "paired")]


def test_a_truncated_table_gives_a_reset(target: str) -> None:
    """TRUNCATE on PostgreSQL calls no trigger of a row, so the feed restarts. SQLite has no TRUNCATE."""
    if "://" not in target:
        return
    with Database.open(target) as database:
        add_device(database, "lamp")
        with database.unit_of_work() as unit:
            unit.session.connection().execute(text("TRUNCATE devices"))
        (change,) = database.devices.changes(after=1)
        assert change.kind == "reset"


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_arguments_are_checked(database: Database) -> None:
    """A number that no change can have raises InvalidArgumentError."""
    bad: Any
    for bad in (-1, True, "1", None, 2**63):
        with pytest.raises(InvalidArgumentError):
            database.devices.changes(after=bad)


def test_a_change_of_each_column_is_recorded(database: Database) -> None:
    """A change of each column of revision 0009 is in the feed, except of the time of the device's last contact."""
    add_device(database, "lamp")
    values = {"role": "'admin'", "approved": "1", "metadata": "'{}'"}
    (script,) = (ROOT / "alembic" / "versions").glob("0009_*.py")
    columns = vars(loaded(script))["COLUMNS"]
    for number, column in enumerate((*columns, "last_seen_at"), 1):
        value = values.get(column, str(number) if column.endswith("_at") else f"'{number}'")
        before = database.devices.newest_change()
        with database.unit_of_work() as unit:
            unit.session.connection().execute(text(f"UPDATE devices SET {column} = {value}"))
        assert (database.devices.newest_change() > before) is (column != "last_seen_at"), column


def test_the_doctor_knows_the_triggers(target: str, engine_name: str) -> None:
    """A sound schema has no finding. A missing, changed or disabled trigger of homeagent is critical."""
    changes = {
        "sqlite": ["DROP TRIGGER homeagent_device_updated", "DROP TRIGGER homeagent_store_updated"],
        "postgresql": [
            "ALTER TABLE devices DISABLE TRIGGER homeagent_device_changed",
            "DROP TRIGGER homeagent_epoch_begun ON store",
            "CREATE OR REPLACE FUNCTION homeagent_record_device_change() RETURNS trigger LANGUAGE plpgsql"
            " SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS 'BEGIN RETURN NULL; END'",
            "ALTER FUNCTION homeagent_record_device_change() SECURITY INVOKER",
        ],
    }[engine_name]
    with Database.open(target) as database:
        assert schema_finding(database) == "ok"
        for change in changes:
            with database.unit_of_work() as unit:
                unit.session.connection().execute(text(change))
            assert schema_finding(database) == "critical", change


def schema_finding(database: Database) -> str:
    """Return the severity of the doctor's finding about the schema."""
    return next(finding.severity.value for finding in database.doctor().findings if finding.check == "schema")
