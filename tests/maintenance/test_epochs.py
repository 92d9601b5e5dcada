"""A new epoch after the store was set back by other means than a restore."""

from __future__ import annotations

import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import Database, Freshness, ReplayGuard, errors
from homeagent.maintenance import epochs
from tests.command_line import invoke
from tests.conftest import START, FakeClock, postgres_execute
from tests.postgresql.load import wait_for

guard = ReplayGuard(skew=timedelta(minutes=5))


def judge(database: Database, nonce: str) -> Freshness:
    """Judge a message that was signed at START."""
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START))


def test_begin_epoch(target: str, clock: FakeClock) -> None:
    """Each call increments the epoch, records its time, and makes the guard refuse earlier messages."""
    with Database.open(target, clock=clock) as database:
        assert judge(database, "one") is Freshness.FRESH
    for epoch in (2, 3):
        clock.advance(seconds=1)
        report = Database.begin_epoch(target, clock=clock)
        assert (report.epoch, report.restored_at) == (epoch, clock.now)
        assert "password" not in report.location
    with Database.open(target, clock=clock) as database:
        assert judge(database, "two") is Freshness.STALE
        status = database.status()
    assert (status.epoch, status.restored_at) == (3, clock.now)


def test_another_epoch_than_the_expected_epoch(target: str, clock: FakeClock) -> None:
    """If the database has another epoch than the caller expected, the call raises an error and changes no row."""
    Database.open(target, clock=clock).close()
    for expected in (0, 2):
        with pytest.raises(errors.ConflictError, match=f"has epoch 1, but epoch {expected} was expected"):
            Database.begin_epoch(target, clock=clock, expected_epoch=expected)
    wrong: list[Any] = [True, 1.0, "1", -1]
    for expected in wrong:
        with pytest.raises(errors.InvalidArgumentError, match="expected_epoch must be a whole number"):
            Database.begin_epoch(target, clock=clock, expected_epoch=expected)
    assert Database.begin_epoch(target, clock=clock, expected_epoch=1).epoch == 2


def test_open_database_is_refused(target: str, clock: FakeClock) -> None:
    """If the database is open, its process would use the old epoch: the call raises an error and changes no row."""
    with Database.open(target, clock=clock) as database:
        judge(database, "one")
        with pytest.raises(errors.DatabaseBusyError, match="open"):
            Database.begin_epoch(target, clock=clock, busy_timeout=timedelta(0))
        assert database.status().epoch == 1


def test_session_that_ends(empty_postgres_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL lists the session of a closed connection for a moment, so the call waits for the session's end."""
    database = Database.open(empty_postgres_url, clock=clock)
    judge(database, "one")
    monkeypatch.setattr(epochs, "sleep", lambda seconds: database.close())
    assert Database.begin_epoch(empty_postgres_url, clock=clock).epoch == 2


def test_a_refused_epoch_does_not_stop_the_gateway(
    empty_postgres_url: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the call waits for a session's end, a gateway still answers at once."""
    monkeypatch.setattr(epochs, "_ENDING", 0.05)
    with Database.open(empty_postgres_url, clock=clock, busy_timeout=timedelta(milliseconds=50)) as gateway:
        judge(gateway, "one")
        monkeypatch.setattr(epochs, "sleep", lambda seconds: gateway.ping())
        # The call does not wait for the locks of an open unit, because other units would wait too.
        with gateway.unit_of_work(read_only=True) as unit:
            assert unit.session.connection().execute(text("SELECT epoch FROM store")).scalar_one() == 1
            with pytest.raises(errors.DatabaseBusyError, match="stop the gateways first"):
                Database.begin_epoch(empty_postgres_url, clock=clock)


def test_status_shows_the_epoch(sqlite_path: Path, clock: FakeClock) -> None:
    """After a second epoch, `homeagent status` shows the epoch. SQLite only: the output is the same for PostgreSQL."""

    def shown() -> str:
        return invoke("status", "--database", sqlite_path).stdout

    assert "Epoch" not in shown()
    Database.begin_epoch(sqlite_path, clock=clock)
    assert "2, restored at 2026-01-02 03:04:05.678+00:00" in shown()


# On PostgreSQL a gateway can run while an epoch begins; SQLite refuses it for an open file.


def set_back(target: str) -> None:
    """End every session, as a restored server does, and delete the nonces."""
    postgres_execute(
        target,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    postgres_execute(target, "DELETE FROM nonces")


@pytest.mark.parametrize("engine_name", ["postgresql"])
def test_epoch_reaches_a_running_gateway(target: str, database: Database, clock: FakeClock) -> None:
    """If a gateway lost its connections before the new epoch, it refuses messages from before the epoch."""
    assert judge(database, "one") is Freshness.FRESH
    set_back(target)
    clock.advance(seconds=1)
    assert Database.begin_epoch(target, clock=clock).epoch == 2
    assert judge(database, "one") is Freshness.STALE


@pytest.mark.parametrize("engine_name", ["postgresql"])
def test_epoch_reaches_a_gateway_that_connects_meanwhile(
    target: str, database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a gateway connects while the epoch begins, it waits for the epoch and obeys it."""
    assert judge(database, "one") is Freshness.FRESH
    set_back(target)
    judged: list[Freshness] = []
    gateway = threading.Thread(target=lambda: judged.append(judge(database, "one")))
    advance: Any = epochs._advance

    def advance_late(connection: Any, *args: Any, **options: Any) -> int:
        gateway.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'store'::regclass"
        wait_for("the gateway at the lock", lambda: judged or connection.exec_driver_sql(waiting).scalar_one())
        return int(advance(connection, *args, **options))

    monkeypatch.setattr(epochs, "_advance", advance_late)
    clock.advance(seconds=1)
    Database.begin_epoch(target, clock=clock)
    gateway.join(60)
    assert judged == [Freshness.STALE]
