"""Group commit: cancelled or interrupted callers leave the queue, or wait until their unit ends.

SQLite only: PostgreSQL groups commits without homeagent.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
from collections.abc import Awaitable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from homeagent import Database, UnitOfWork, group_commit
from tests import fork_server
from tests.batches import agents_of, create, creating, group_commit_of, held
from tests.conftest import Children
from tests.interrupts import interrupt_at


@pytest.mark.parametrize("scoped", [False, True], ids=["Task.cancel", "scope"])
@pytest.mark.parametrize("position", [0, 2], ids=["first", "last"])
def test_a_caller_that_is_cancelled_in_the_queue_leaves_the_others_alone(
    sqlite_database: Database, scoped: bool, position: int
) -> None:
    """If a caller is cancelled in the queue, its unit does not run, and the other callers' units do."""
    ran: list[str] = []

    def work(unit: UnitOfWork, agent_id: str) -> str:
        ran.append(agent_id)
        return create(unit, agent_id)

    async def cancelled() -> None:
        call = sqlite_database.arun(functools.partial(work, agent_id="cancelled"))
        if scoped:
            with anyio.move_on_after(0.02) as scope:
                await call
            assert scope.cancelled_caught
            return
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call, 0.02)

    async def main() -> list[Any]:
        calls: list[Awaitable[Any]] = [sqlite_database.arun(functools.partial(work, agent_id=name)) for name in "ab"]
        calls.insert(position, cancelled())
        with held(sqlite_database):
            tasks = list(map(asyncio.ensure_future, calls))
            await tasks.pop(position)
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == ["a", "b"]
    assert ran == ["a", "b"]


def test_a_closed_loop_delays_no_other_caller(sqlite_database: Database) -> None:
    """If a caller's event loop was closed while the caller waited, the other callers still get their results."""
    began, go_on = threading.Event(), threading.Event()

    def work(unit: UnitOfWork) -> None:
        began.set()
        assert go_on.wait(10)
        create(unit, "left behind")

    loop = asyncio.new_event_loop()
    task = loop.create_task(sqlite_database.arun(work))
    while not began.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    # The test abandons the coroutine on purpose, and asyncio would complain.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's switch for that
    loop.close()
    go_on.set()
    assert sqlite_database.run(creating("ada")) == "ada"
    assert agents_of(sqlite_database) == ["ada", "left behind"]
    with suppress(RuntimeError):
        task.get_coro().close()  # type: ignore[union-attr]  # the attribute exists


def test_an_interrupted_caller_leaves_the_queue(sqlite_path: Path) -> None:
    """If a caller is interrupted while waiting, its thread continues at once, and its unit does not run."""
    code = """
import os, signal, sys, threading, time
from homeagent import Database
signal.signal(signal.SIGINT, signal.default_int_handler)
database = Database.open(sys.argv[1])
entered, done = threading.Event(), threading.Event()

def hold():
    with database.unit_of_work():
        entered.set()
        done.wait(60)

holder = threading.Thread(target=hold)
holder.start()
entered.wait()
ran = []
threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    database.run(lambda unit: ran.append(1))
except KeyboardInterrupt:
    print("interrupted")
done.set()
holder.join()
print(database.run(lambda unit: len(unit.agents.list())), ran)
database.close()
"""
    result = fork_server.run(code, sqlite_path, timeout=60)
    assert (result.stdout, result.stderr) == ("interrupted\n0 []\n", "")


def test_a_handler_that_writes_during_a_call(sqlite_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a signal handler writes at any point of a call that waits for the writer thread, both units are committed."""
    monkeypatch.setattr(group_commit, "_IDLE", 0.0)  # each call starts the writer thread
    names = map(str, itertools.count())

    def write() -> None:
        group_commit_of(database)._is_contended = True
        database.run(lambda unit: create(unit, next(names)))

    turn = 0
    with Database.open(sqlite_path, busy_timeout=timedelta(seconds=2), durability="normal") as database:
        while interrupt_at(turn, {"homeagent.group_commit"}, write, write):
            turn += 1
        assert len(database.agents.list(limit=1000)) == 2 * turn + 1
    assert turn > 5


@pytest.mark.parametrize("crowded", [False, True], ids=["in its own thread", "in the writer's"])
def test_an_interrupt_anywhere_in_a_call_holds_nobody_up(sqlite_path: Path, crowded: bool) -> None:
    """If an interrupt comes at any point of `run`, later calls of threads and coroutines still complete."""

    def count(unit: UnitOfWork) -> int:
        return len(unit.agents.list())

    with Database.open(sqlite_path, busy_timeout=timedelta(seconds=10), durability="normal") as database:
        for turn in itertools.count():
            group_commit_of(database)._is_contended = crowded
            came = interrupt_at(
                turn, {"homeagent.group_commit", "homeagent.worker_threads"}, lambda: database.run(count)
            )
            other = threading.Thread(target=database.run, args=(count,))
            other.start()
            assert database.run(count) == 0
            other.join(30)
            assert not other.is_alive()
            assert asyncio.run(database.arun(count)) == 0
            if not came:
                break
    assert turn > 4


INTERRUPTED = """
import os, signal, sys, threading, time
from homeagent import AgentCreate, Database
# A shell starts what it runs in the background with this signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
database = Database.open(sys.argv[1])
group_commit = database._runner._group_commit
others, interrupts = [], 0
begun = threading.Event()

def work(unit, name, slow=False):
    unit.agents.create(AgentCreate(id=name, name=name, workspace_path="/srv"))
    if slow:
        begun.set()
        time.sleep(0.002)

def other(number):
    for turn in range(20):
        database.run(lambda unit: work(unit, f"other {number}-{turn}", slow=True))
        others.append(f"other {number}-{turn}")

def interrupt():
    while not over.wait(0.003):
        os.kill(os.getpid(), signal.SIGINT)

threads = [threading.Thread(target=other, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
begun.wait()
over, mine = threading.Event(), []
sender = threading.Thread(target=interrupt)
turn = 0
while any(thread.is_alive() for thread in threads):
    turn += 1
    try:
        if not sender.is_alive() and turn == 1:
            sender.start()
        # An interrupted unit can still begin in the writer thread, so bind the number now.
        database.run(lambda unit, turn=turn: work(unit, f"mine {turn}"))
        mine.append(f"mine {turn}")
    except KeyboardInterrupt:
        interrupts += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
over.set()
sender.join()
for thread in threads:
    thread.join(30)
database.run(lambda unit: work(unit, "last"))
with database.unit_of_work(read_only=True) as unit:
    there, after = set(), None
    page = unit.agents.list(limit=1000)
    there = {agent.id for agent in page}
assert len(others) == 80, others
assert set(others) <= there, set(others) - there
assert set(mine) <= there, set(mine) - there
assert "last" in there
database.close()
print(interrupts)
"""


@pytest.mark.slow
def test_interrupts_of_a_waiting_caller_block_no_other_caller(sqlite_path: Path, children: Children) -> None:
    """If a real Ctrl-C interrupts the main thread every 3 ms, the other callers' units are committed, each once."""
    process = children.start(INTERRUPTED, sqlite_path)
    output = children.finish(process)
    assert int(output) > 0
