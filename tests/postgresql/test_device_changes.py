"""Device changes while a server restarts, hangs, or gets commits in another order than its transactions."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import psutil
import pytest
from sqlalchemy import text

from homeagent import Database, DeviceUpdate, IdempotencyScope
from homeagent.device_changes import PATIENCE
from homeagent.errors import DatabaseError
from tests.conftest import Children, add_device, postgres_execute
from tests.feed_load import FeedLoad
from tests.postgresql.server import Server

pytestmark = pytest.mark.usefixtures("postgres_url")


def test_a_later_number_waits_for_the_earlier_commit(database: Database) -> None:
    """A number becomes visible only after all smaller numbers, whatever transaction changed its device first."""
    add_device(database, "lamp")
    with database.unit_of_work() as first, ThreadPoolExecutor(1) as pool:
        first.devices.update("lamp", DeviceUpdate(metadata=1))
        pool.submit(add_device, database, "phone").result()
        before = [(change.number, change.device_id) for change in database.devices.changes()]
    after = [(change.number, change.device_id) for change in database.devices.changes()]
    assert before == [(1, "lamp"), (2, "phone")]
    assert after == [*before, (3, "lamp")]


def test_stores_in_two_schemas_do_not_wait_for_each_other(database: Database, target: str) -> None:
    """A commit that holds the lock of one schema's feed delays no commit of another schema."""
    postgres_execute(target, "CREATE SCHEMA other")
    with Database.open(f"{target}&options=-csearch_path%3Dother") as other, database.unit_of_work() as unit:
        unit.session.connection().execute(text("SELECT pg_advisory_xact_lock(1751346785, hashtext('public'))"))
        add_device(other, "lamp")
        assert [change.device_id for change in other.devices.changes()] == ["lamp"]


def test_a_role_without_rights_on_the_feed_changes_devices(database: Database, target: str) -> None:
    """A role with rights on `devices` alone can change devices. The feed has the change, and results are deleted."""
    role = f"only_devices_{os.getpid()}"
    postgres_execute(target, f"CREATE ROLE {role}; GRANT SELECT, INSERT, UPDATE, DELETE ON devices TO {role}")
    try:
        insert = "INSERT INTO devices (id, role, shared_secret_hash, paired_at) VALUES ('lamp', 'node', 'h', 0)"
        postgres_execute(target, f"SET LOCAL ROLE {role}; {insert}")
        assert [change.device_id for change in database.devices.changes()] == ["lamp"]
        scope = IdempotencyScope("lamp", "on", "k")
        database.idempotency_keys.insert(scope, 1, ttl=timedelta(minutes=1))
        postgres_execute(target, f"SET LOCAL ROLE {role}; DELETE FROM devices")
        assert database.idempotency_keys.find(scope) is None
    finally:
        postgres_execute(target, f"DROP OWNED BY {role}; DROP ROLE {role}")


@pytest.mark.slow
def test_a_restarted_server_loses_no_change(own_server: Server, children: Children) -> None:
    """While the server restarts under four writers, each watcher gets each change, in order."""
    load = FeedLoad(children, own_server.url(), writers=4)
    load.run(10, changes=300, disturb=lambda number: own_server.restart("fast" if number % 2 else "immediate"))
    assert load.stop_and_check() < 0.3


@contextmanager
def stopped(server: Server) -> Iterator[None]:
    """Stop all processes of a server without an end of its connections, as a frozen machine does."""
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    for process in processes:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)


@pytest.mark.slow
def test_a_server_that_does_not_answer_ends_the_iterator(own_server: Server) -> None:
    """If the server does not answer, the iterator raises an error after `PATIENCE` seconds."""

    async def watch(database: Database) -> float:
        changes = database.watch_devices()
        add_device(database, "lamp")
        await anext(changes)
        began = time.monotonic()
        with stopped(own_server), pytest.raises(DatabaseError, match="does not answer"):
            await asyncio.wait_for(anext(changes), 30)
        return time.monotonic() - began

    with Database.open(own_server.url()) as database:
        assert PATIENCE - 1 < asyncio.run(watch(database)) < PATIENCE + 2
