"""Sweepers on several hosts. PostgreSQL only: SQLite has one writer at a time, so sweepers cannot share the work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from homeagent import Database, IdempotencyScope
from homeagent.maintenance import SweepReport
from tests.conftest import START, FakeClock, MakeDatabase, dump

pytestmark = pytest.mark.usefixtures("postgres_url")

MINUTE = timedelta(minutes=1)


@pytest.fixture
def full(database: Database, clock: FakeClock) -> Database:
    """A database with 300 expired nonces and 300 expired keys."""
    with database.unit_of_work() as unit:
        for number in range(300):
            unit.nonces.consume("lamp", f"n{number}", expires_at=START + MINUTE)
            unit.idempotency_keys.insert(IdempotencyScope("lamp", "on", f"k{number}"), 1, ttl=MINUTE)
    clock.advance(hours=2)
    return database


def test_sweeper_skips_locked_rows(full: Database, reopen: MakeDatabase) -> None:
    """If another host's batch is running, a sweeper removes all other rows without a wait."""
    other = reopen(busy_timeout=timedelta(milliseconds=1))
    with full.unit_of_work() as unit:
        assert unit.nonces.delete_expired(limit=100) == 100
        assert unit.idempotency_keys.delete_expired(limit=100) == 100
        report = other.sweep(batch_size=50)
        assert (report.nonces, report.idempotency_keys, report.more) == (200, 200, False)
    assert dump(full)["nonces"] == dump(full)["idempotency_keys"] == []


def test_sweepers_share_the_work(full: Database, reopen: MakeDatabase) -> None:
    """If four hosts sweep at the same time, each row is removed once, and no host gets an error."""
    start = threading.Barrier(4)

    def sweep(host: Database) -> SweepReport:
        start.wait(20)
        return host.sweep(batch_size=10)

    with ThreadPoolExecutor(4) as threads:
        reports = list(threads.map(sweep, [reopen(busy_timeout=timedelta(seconds=20)) for _ in range(4)]))
    assert sum(report.nonces for report in reports) == sum(report.idempotency_keys for report in reports) == 300
    assert dump(full)["nonces"] == dump(full)["idempotency_keys"] == []
