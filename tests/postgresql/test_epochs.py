"""A new epoch of a server's store under gateways that were not stopped. A SQLite file is refused while it is open."""

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


@pytest.fixture
def engine_name() -> str:
    """The engine that is set back by other means than ours."""
    return "postgresql"


def judge(database: Database, nonce: str) -> Freshness:
    """Judge a message that was signed at START."""
    return database.run(lambda unit: guard.check(unit.nonces, "lamp", nonce, signed_at=START))


def set_back(target: str) -> None:
    """End every session, as a server does that is set back, and forget what was consumed."""
    postgres_execute(
        target,
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    postgres_execute(target, "DELETE FROM nonces")


def test_a_gateway_that_was_not_stopped(target: str, database: Database, clock: FakeClock) -> None:
    """One that had lost its connections when the epoch began refuses what may have been consumed before it."""
    assert judge(database, "one") is Freshness.FRESH
    set_back(target)
    clock.advance(seconds=1)
    assert Database.begin_epoch(target, clock=clock).epoch == 2
    assert judge(database, "one") is Freshness.STALE


def test_a_gateway_that_connects_meanwhile(
    target: str, database: Database, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that connects after the sessions were counted waits for the epoch, and goes by it."""
    assert judge(database, "one") is Freshness.FRESH
    set_back(target)
    judged: list[Freshness] = []
    gateway = threading.Thread(target=lambda: judged.append(judge(database, "one")))
    advance: Any = epochs._advance

    def advance_late(connection: Any, *args: Any, **options: Any) -> int:
        gateway.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'store'::regclass"
        wait_for(
            "the gateway at the lock",
            lambda: judged or connection.exec_driver_sql(waiting).scalar_one(),
        )
        return int(advance(connection, *args, **options))

    monkeypatch.setattr(epochs, "_advance", advance_late)
    clock.advance(seconds=1)
    Database.begin_epoch(target, clock=clock)
    gateway.join(60)
    assert judged == [Freshness.STALE]
