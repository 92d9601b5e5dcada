"""`Database.watch_devices`: changes of every process arrive in order, and a feed that can't be read raises an error."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import anyio.to_thread
import pytest
from sqlalchemy import make_url

from homeagent import Database, DeviceChange, device_changes
from homeagent.device_changes import PATIENCE
from homeagent.errors import DatabaseClosedError, DatabaseError
from tests.conftest import Children, MakeDatabase, RecordProperty, add_device, postgres_execute
from tests.feed_load import FeedLoad

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    """The event loop of the asynchronous tests."""
    return "asyncio"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the feed every 20 ms, so that the tests wait less. Child processes have the interval of the package."""
    monkeypatch.setattr(device_changes, "_INTERVAL", 0.02)


WRITE = """
import sys
from homeagent import Database, DevicePair, Role
with Database.open(sys.argv[1]) as database:
    for name in sys.argv[2:]:
        database.pair(DevicePair(id=name, role=Role.NODE))
"""


async def following(changes: AsyncIterator[DeviceChange], count: int = 1) -> list[tuple[str | None, str]]:
    with anyio.fail_after(20):
        found = [await anext(changes) for _ in range(count)]
    return [(change.device_id, change.kind.value) for change in found]


async def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition is true, while the event loop continues."""

    def wait() -> None:
        while not condition():
            time.sleep(0.01)

    await asyncio.to_thread(wait)


def watcher_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "homeagent-device-changes"]


async def test_iterators_get_the_changes_of_all_processes(database: Database, target: str, children: Children) -> None:
    """Several iterators share a thread, and get the changes of this process and of another process in order."""
    add_device(database, "before")
    first = database.watch_devices()
    add_device(database, "lamp", approved=True)
    second = database.watch_devices(after=0)
    assert await following(first, 2) == [("lamp", "paired"), ("lamp", "approved")]
    waiting = asyncio.create_task(following(first, 2))
    assert await following(second) == [("before", "paired")]
    assert len(watcher_threads()) == 1
    await asyncio.to_thread(children.run, WRITE, target, "phone", "clock")
    assert await waiting == [("phone", "paired"), ("clock", "paired")]
    assert await following(second, 4) == [
        ("lamp", "paired"),
        ("lamp", "approved"),
        ("phone", "paired"),
        ("clock", "paired"),
    ]


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_cancelled_wait_loses_no_change(database: Database) -> None:
    """After a cancelled wait, under asyncio or trio, the iterator gets the next change, also from another thread."""
    changes = database.watch_devices()
    with anyio.move_on_after(0.01) as scope:
        await anext(changes)
    assert scope.cancelled_caught
    add_device(database, "lamp")
    assert await following(changes) == [("lamp", "paired")]
    async with anyio.create_task_group() as group:
        group.start_soon(anyio.to_thread.run_sync, add_device, database, "phone")
        assert await following(changes) == [("phone", "paired")]


@pytest.mark.parametrize("engine_name", ["sqlite"])
async def test_no_thread_to_read_with(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system can't start the thread, the iterator raises DatabaseError, and the next call tries again."""
    changes = database.watch_devices(after=0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(DatabaseError, match=r"can't start new thread.*raise the system's limit"):
            await anext(changes)
    add_device(database, "lamp")
    assert await following(changes) == [("lamp", "paired")]


def test_a_long_backlog_arrives_complete(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """More changes than an iterator holds arrive in order, because the thread continues when the iterator has room."""
    monkeypatch.setattr(device_changes, "_WAITING", 200)
    with database.unit_of_work() as unit:
        add = "INSERT INTO devices (id, role, shared_secret_hash, paired_at) VALUES ('{0:04}', 'node', 'h', {0})"
        for number in range(500):
            unit.session.connection().exec_driver_sql(add.format(number))

    async def watch() -> list[tuple[str | None, str]]:
        changes: Any = database.watch_devices(after=0)
        first = await following(changes)
        await until(lambda: not changes.has_room)
        return first + await following(changes, 499)

    assert asyncio.run(watch()) == [(f"{number:04}", "paired") for number in range(500)]


def test_the_thread_ends_with_the_last_iterator(database: Database) -> None:
    """The thread ends after `aclose`, after the loss of the last reference, and after the end of the event loop."""

    async def leave(by: str) -> Any:
        changes: Any = database.watch_devices(after=0)
        add_device(database, by)
        await following(changes)
        if by == "aclose":
            await changes.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(changes)
        elif by == "cancel":
            task = asyncio.create_task(following(changes, 99))
            await asyncio.sleep(0)
            task.cancel()
        return changes if by == "loop" else None

    for by in ("aclose", "cancel", "loop"):
        kept = asyncio.run(leave(by))
        if by == "loop":
            assert len(watcher_threads()) == 1
            del kept
        for thread in watcher_threads():
            thread.join(10)
        assert watcher_threads() == []


async def test_a_closed_database_ends_the_iterator(database: Database) -> None:
    """If the database is closed, waiting and later calls raise DatabaseClosedError: no loop ends without an error."""
    changes = database.watch_devices()
    waiting = asyncio.create_task(following(changes))
    await until(lambda: bool(watcher_threads()))
    await asyncio.to_thread(database.close)
    with pytest.raises(DatabaseClosedError):
        await waiting
    with pytest.raises(DatabaseClosedError):
        await anext(changes)
    assert watcher_threads() == []


def make_unreadable(target: str, url: str | None) -> Callable[[], None]:
    """Make a database unreadable, and return the function that undoes the change."""
    if url is None:
        path, away = Path(target), Path(target + ".away")
        path.rename(away)
        return lambda: path.touch() if not away.rename(path) else None
    name = make_url(target).database
    postgres_execute(url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres_execute(url, f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    return lambda: postgres_execute(url, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")


async def test_an_unreadable_feed_raises_an_error(
    database: Database, target: str, engine_name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An iterator waits for the end of a short interruption, and raises an error after `PATIENCE` seconds."""
    url = request.getfixturevalue("postgres_url") if engine_name == "postgresql" else None
    now = [0.0]
    monkeypatch.setattr(device_changes, "monotonic", lambda: now[0])
    changes = database.watch_devices()
    waiting = asyncio.create_task(following(changes))
    await asyncio.sleep(0)
    undo = make_unreadable(target, url)
    await until(lambda: database._device_watcher._error is not None)
    now[0] += PATIENCE - 0.1
    undo()
    add_device(database, "lamp")
    assert await waiting == [("lamp", "paired")]
    # The thread delivers the change before it clears the error of the first interruption.
    await until(lambda: database._device_watcher._error is None)
    waiting = asyncio.create_task(following(changes))
    undo = make_unreadable(target, url)
    await until(lambda: database._device_watcher._error is not None)
    now[0] += PATIENCE
    with pytest.raises(DatabaseError, match="could not be read for") as caught:
        await waiting
    assert isinstance(caught.value.__cause__, DatabaseError)
    undo()
    with pytest.raises(StopAsyncIteration):
        await anext(changes)


async def test_a_restored_file_gives_a_reset(sqlite_path: Path, tmp_path: Path) -> None:
    """After a restore, an iterator that continues from an earlier number first gets a reset."""
    with Database.open(sqlite_path) as database:
        add_device(database, "lamp")
        backup = database.backup(tmp_path / "backup.db")
        add_device(database, "stolen")
        newest = database.devices.changes(after=0)[-1].number
    Database.restore(backup, sqlite_path)
    with Database.open(sqlite_path) as database:
        changes = database.watch_devices(after=newest)
        assert await following(changes) == [(None, "reset")]
        add_device(database, "phone")
        assert await following(changes) == [("phone", "paired")]


def test_a_copied_store_gives_a_reset(database: Database, tmp_path: Path) -> None:
    """In a copy of a store, every number of the original gives a reset."""
    add_device(database, "lamp")
    with Database.open(tmp_path / "copy.db") as copy:
        database.copy_to(copy)
        assert [change.kind for change in copy.devices.changes(after=1)] == ["reset"]
        assert len(copy.devices.list()) == 1


FORK = """
import asyncio, os, sys
from homeagent import Database, DevicePair, Role, device_changes
from homeagent.errors import DatabaseClosedError
device_changes._INTERVAL = 0.01  # the thread is busier at the forks

async def main():
    database = Database.open(sys.argv[1])
    changes = database.watch_devices()
    database.pair(DevicePair(id="a", role=Role.NODE))
    print((await anext(changes)).device_id)
    for number in range(10):
        child = os.fork()
        if not child:
            try:
                changes.__anext__().send(None)
            except DatabaseClosedError:
                pass
            with Database.open(sys.argv[1]) as own:
                own.pair(DevicePair(id=f"child-{number}", role=Role.NODE))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (await asyncio.wait_for(anext(changes), 20)).device_id == f"child-{number}"
    database.close()
asyncio.run(main())
"""


def test_a_fork_leaves_the_iterator_to_the_parent(target: str, children: Children) -> None:
    """In a forked child the iterator raises DatabaseClosedError, and the child can open the database again."""
    assert children.run(FORK, target) == "a"


async def test_another_open_database_has_its_own_thread(database: Database, reopen: MakeDatabase) -> None:
    """Two open databases have separate threads, and closing one does not end the iterators of the other."""
    other = reopen()
    mine, theirs = database.watch_devices(), other.watch_devices()
    add_device(database, "lamp")
    assert await following(mine) == await following(theirs) == [("lamp", "paired")]
    assert len(watcher_threads()) == 2
    await asyncio.to_thread(other.close)
    add_device(database, "phone")
    assert await following(mine) == [("phone", "paired")]


@pytest.mark.parametrize(
    ("writers", "rounds", "changes"), [(2, 2, 10), pytest.param(4, 30, 100, marks=pytest.mark.slow)]
)
def test_killed_writers_and_watchers(
    target: str, children: Children, writers: int, rounds: int, changes: int, record_property: RecordProperty
) -> None:
    """While writers and watchers are killed, each watcher gets each change, in order; p99 of the delay is < 0.3 s."""
    load = FeedLoad(children, target, writers=writers)
    load.run(rounds, changes=changes)
    p99 = load.stop_and_check()
    if writers == 4:
        assert p99 < 0.3
    record_property("processes killed while they write or watch device changes", sum(load.counts.values()))
    record_property("99th percentile of the delay of a device change", p99)


IDLE = """
import asyncio, sys, time
from homeagent import Database

async def main():
    with Database.open(sys.argv[1]) as database:
        asyncio.ensure_future(anext(database.watch_devices()))
        await asyncio.sleep(1)
        began, used = time.monotonic(), time.process_time()
        await asyncio.sleep(30)
        print((time.process_time() - used) / (time.monotonic() - began))
        sys.stdout.flush()
asyncio.run(main())
"""


@pytest.mark.slow
def test_an_idle_watcher_costs_little(target: str, children: Children) -> None:
    """A watcher without changes uses less than 0.3% of a processor."""
    used = float(children.run(IDLE, target))
    print(f"an idle watcher uses {used:.3%} of a processor")  # noqa: T201  the result
    assert used < 0.003
