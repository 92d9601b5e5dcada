"""Pending devices are bounded in number and in time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest

from homeagent import Database, DevicePair, DeviceStatus, Limits, Role
from homeagent.errors import InvalidArgumentError, PendingLimitError
from homeagent.stores import device_statements as statements
from tests.conftest import FakeClock, MakeDatabase, add_device, plan_of


def pair(database: Database, device_id: str) -> bool:
    try:
        database.pair(DevicePair(id=device_id, role=Role.NODE))
    except PendingLimitError as error:
        return error.limit != 3
    return True


def test_the_bound_is_exact_for_callers_at_the_same_time(reopen: MakeDatabase) -> None:
    """If callers pair at the same time in several databases on the same store, the number is exactly the limit."""
    databases = [reopen(limits=Limits(pending_devices=3)) for _ in range(3)]
    with ThreadPoolExecutor(9) as threads:
        calls = [threads.submit(pair, databases[number % 3], f"d{number}") for number in range(9)]
        assert sum(call.result() for call in calls) == 3
    assert len(databases[0].devices.list()) == 3


def test_pairing_is_closed(reopen: MakeDatabase) -> None:
    """With a limit of 0 no device pairs, but code that holds a hash still adds a device."""
    database = reopen(limits=Limits(pending_devices=0))
    with pytest.raises(PendingLimitError, match="pairing is closed"):
        database.pair(DevicePair(id="lamp", role=Role.NODE))
    assert add_device(database, "lamp").status is DeviceStatus.PENDING


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
        {"pending_ttl": timedelta(0)},
        {"waiting_hashes": 0},
        {"nonces_per_device": 0},
        {"keys_per_device": True},
        {"longest_ttl": timedelta(0)},
        {"changes_kept": timedelta(days=-1)},
        {"failed_checks_per_minute": 0},
    ],
    ids=str,
)
def test_bad_limits_are_refused(bad: dict[str, Any]) -> None:
    """If a limit is invalid, creating the limits raises."""
    with pytest.raises(InvalidArgumentError):
        Limits(**bad)
    with pytest.raises(InvalidArgumentError, match="Limits"):
        Database.open(":memory:", limits=bad)
