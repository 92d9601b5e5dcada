"""A new epoch of a PostgreSQL store while gateways run. PostgreSQL only: SQLite refuses it for an open file."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest

from homeagent import Database, Freshness, ReplayGuard
from homeagent.maintenance import epochs
from tests.conftest import START, FakeClock, postgres_execute
from tests.postgresql.load import wait_for

SKEW = timedelta(minutes=5)

guard = ReplayGuard(skew=SKEW)


def judge(database: Database, nonce: str) -> Freshness:
    """Judge a message that was signed at START."""
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START))


def set_back(target: str) -> None:
    """End every session, as a restored server does, and delete the nonces."""
    postgres_execute(
        target,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    postgres_execute(target, "DELETE FROM nonces")


def test_epoch_reaches_a_running_gateway(target: str, database: Database, clock: FakeClock) -> None:
    """If a gateway lost its connections before the new epoch, it refuses messages from before the epoch."""
    assert judge(database, "one") is Freshness.FRESH
    set_back(target)
    clock.advance(seconds=1)
    assert Database.begin_epoch(target, clock=clock).epoch == 2
    assert judge(database, "one") is Freshness.STALE


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
