"""Counters of a database: units by outcome, bounded lists of waits and batches, and no stored values."""

from __future__ import annotations

import threading
from contextlib import suppress
from datetime import timedelta

import pytest

from homeagent import Database
from homeagent.engine.counters import Counters
from homeagent.errors import ConflictError, DatabaseBusyError, DiskFullError
from tests.batches import held
from tests.conftest import FakeClock, add_agent


def test_lock_wait_is_measured(sqlite_database: Database) -> None:
    """If a unit waits for the write lock, the counters record the wait and its duration."""
    lanes = sqlite_database._engine.writers
    before = sqlite_database._engine.counters.snapshot().pool_waits
    with sqlite_database.unit_of_work():
        waiter = threading.Thread(target=add_agent, args=(sqlite_database,))
        waiter.start()
        while not lanes._waiters:
            threading.Event().wait(0.001)
    waiter.join()
    snapshot = sqlite_database._engine.counters.snapshot()
    assert snapshot.pool_waits - before == 1
    assert snapshot.pool_wait_p99 is not None
    assert snapshot.pool_wait_p99 > 0


def test_last_error_is_an_engine_error(sqlite_database: Database) -> None:
    """An engine error is recorded with its time; a refusal for the application, such as a conflict, is not recorded."""
    counters = sqlite_database._engine.counters
    with suppress(ConflictError), sqlite_database.unit_of_work():
        raise ConflictError("a duplicate")
    assert counters.snapshot().last_error is None
    with pytest.raises(DiskFullError), sqlite_database.unit_of_work():
        raise DiskFullError("no room")
    last = counters.snapshot().last_error
    assert last is not None
    assert (last.kind, last.message) == ("DiskFullError", "no room")
    assert last.at.tzinfo is not None


def test_lock_timeout_is_recorded(sqlite_path: object, clock: FakeClock) -> None:
    """If a caller times out while it waits for the write lock, the counters record the error."""
    with Database.open(str(sqlite_path), clock=clock, busy_timeout=timedelta(milliseconds=20)) as database:
        with held(database), pytest.raises(DatabaseBusyError):
            add_agent(database)
        last = database._engine.counters.snapshot().last_error
        assert last is not None
        assert last.kind == "DatabaseBusyError"


def test_percentiles_use_recent_values() -> None:
    """Percentiles cover a bounded number of recent values; without a value a percentile is None."""
    counters = Counters()
    assert counters.snapshot().pool_wait_p50 is None
    for size in [1000] * 2000 + list(range(1, 1025)):
        counters.grouped(size)
        counters.waited(float(size))
    snapshot = counters.snapshot()
    assert (snapshot.groups, snapshot.pool_waits) == (3024, 3024)
    assert (snapshot.group_size_p50, snapshot.group_size_p99) == (512, 1014)
    assert (snapshot.pool_wait_p50, snapshot.pool_wait_p99) == (512.0, 1014.0)
