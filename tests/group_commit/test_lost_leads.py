"""Whatever fails between a call's queueing and its outcome: nobody waits forever, and nobody leads who has gone."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from homeagent import Database, UnitOfWork
from homeagent.engine.counters import Counters
from homeagent.engine.link import Link
from homeagent.errors import DatabaseBusyError, DatabaseError, DiskFullError
from homeagent.group_commit.calls import Call
from homeagent.group_commit.grouping import Grouping
from tests.conftest import copy_template
from tests.group_commit.test_grouping import Desk, Work, agents_of, create, grouping_of, outcome_of
from tests.interrupts import interrupt_at


def without_threads(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let no thread start from now on."""

    def refuse(thread: threading.Thread) -> None:
        raise error

    patch.setattr("homeagent.group_commit.writer_thread.threading.Thread.start", refuse)


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["thread", "memory"])
def test_a_crowd_of_coroutines_is_refused_where_no_thread_is_left(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """However many wait, each is refused with an error of ours, and the caller in whose way they were is not."""
    grouping = grouping_of(sqlite_database)
    crowd = sys.getrecursionlimit()

    async def coroutines() -> list[Any]:
        calls = [sqlite_database.arun(functools.partial(create, agent_id=f"c{n}")) for n in range(crowd)]
        return await asyncio.gather(*calls, return_exceptions=True)

    outcomes: list[Any] = []
    crowding = threading.Thread(target=lambda: outcomes.extend(asyncio.run(coroutines())))

    def lead(unit: UnitOfWork) -> str:
        crowding.start()
        while len(grouping._queue) < crowd:
            time.sleep(0.001)
        without_threads(monkeypatch, error)
        return create(unit, "ada")

    assert sqlite_database.run(lead) == "ada"
    monkeypatch.undo()
    crowding.join(30)
    assert [type(outcome) for outcome in outcomes] == [DatabaseError] * crowd
    assert sqlite_database.run(functools.partial(create, agent_id="later")) == "later"
    assert agents_of(sqlite_database) == ["ada", "later"]


def test_a_unit_that_can_t_be_undone_takes_nobody_along(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error out of the undoing itself, of a unit that is done alone, is its caller's; the next ones are done."""
    undo = UnitOfWork._roll_back
    left = [MemoryError("undoing"), MemoryError("again")]

    def failing(unit: UnitOfWork, error: BaseException | None) -> None:
        undo(unit, error)
        if left and isinstance(error, LookupError | None):
            raise left.pop(0)

    def ask_for_session(unit: UnitOfWork) -> None:
        unit.session  # noqa: B018  it is done alone then
        monkeypatch.setattr(UnitOfWork, "_roll_back", failing)
        raise LookupError

    async def main() -> list[Any]:
        works: list[Work] = [lambda unit: None, ask_for_session, functools.partial(create, agent_id="behind")]
        calls = [asyncio.ensure_future(sqlite_database.arun(work)) for work in works]
        return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 20)

    outcomes = asyncio.run(main())
    assert [type(outcome) for outcome in outcomes] == [type(None), MemoryError, str]
    assert agents_of(sqlite_database) == ["behind"]


def test_an_error_after_the_commit_has_no_unit_done_twice(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where counting fails, the units of the group took place, once, and their callers are told so."""
    runs: list[str] = []

    def work(unit: UnitOfWork, agent_id: str) -> str:
        runs.append(agent_id)
        return create(unit, agent_id)

    def fail(counters: Counters, units: int) -> None:
        raise MemoryError

    monkeypatch.setattr(Counters, "grouped", fail)
    calls = Desk(grouping_of(sqlite_database)).serve([functools.partial(work, agent_id=name) for name in ("a", "b")])
    assert isinstance(outcome_of(calls[0]), MemoryError)
    assert outcome_of(calls[1]) == "b"
    assert runs == ["a", "b"]
    assert agents_of(sqlite_database) == ["a", "b"]


def test_a_loop_that_can_t_be_woken_is_told_later_and_ends_no_thread(
    sqlite_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its coroutines have their outcome within the timeout; the thread goes on, and that it failed is logged."""

    async def main() -> str:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        failures = [MemoryError()]

        def fail_once(*arguments: Any, **options: Any) -> Any:
            if failures:
                raise failures.pop()
            return wake(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", fail_once)
        first = await asyncio.wait_for(database.arun(functools.partial(create, agent_id="a")), 20)
        assert not failures
        return first + await asyncio.wait_for(database.arun(functools.partial(create, agent_id="b")), 20)

    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=300)) as database:
        assert asyncio.run(main()) == "ab"
        assert database.run(functools.partial(create, agent_id="c")) == "c"
    assert [getattr(record, "event", None) for record in caplog.records] == ["writer_failed"]


def test_a_loop_that_can_t_be_woken_keeps_no_other_waiting(sqlite_database: Database) -> None:
    """Who shares a commit with its coroutines is told all the same."""

    class Deaf(Desk):
        def deliver(self, calls: Any) -> None:
            raise MemoryError

    grouping: Grouping = grouping_of(sqlite_database)
    deaf, desk = Deaf(grouping), Desk(grouping)
    calls: list[Call[Any]] = [
        Call(functools.partial(create, agent_id=box), each) for box, each in (("a", deaf), ("b", desk))
    ]
    for call in calls:
        grouping.submit(call)
    with pytest.raises(MemoryError):
        grouping.lead(deaf.leading.pop())
    assert desk.delivered == calls[1:]
    assert sqlite_database.run(functools.partial(create, agent_id="c")) == "c"


def interrupted_in_the_queue(database: Database, turn: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Interrupt a call that queues behind another one, have all that wait done alone, and see that they are."""
    grouping = grouping_of(database)
    entered, go_on = threading.Event(), threading.Event()
    commit = Link.commit
    failures = [DiskFullError("no room")]
    outcomes: list[Any] = []

    def fail_once(link: Link) -> None:
        if threading.current_thread().name == "homeagent-writer" and failures:
            raise failures.pop()
        commit(link)

    def hold(unit: UnitOfWork) -> None:
        entered.set()
        assert go_on.wait(30)

    def queue_up() -> None:
        with suppress(DatabaseBusyError):
            database.run(functools.partial(create, agent_id="interrupted"))

    def follow(number: int) -> None:
        outcomes.append(database.run(functools.partial(create, agent_id=str(number))))

    holder = threading.Thread(target=database.run, args=(hold,))
    followers = [threading.Thread(target=follow, args=(number,)) for number in range(2)]
    monkeypatch.setattr(Link, "commit", fail_once)
    holder.start()
    assert entered.wait(30)
    came = interrupt_at(turn, {"homeagent.group_commit.grouping", "homeagent.group_commit.calls"}, queue_up)
    queued = len(grouping._queue)
    database._settings.timeout = 5
    for follower in followers:
        follower.start()
    while len(grouping._queue) < queued + len(followers):
        time.sleep(0.0005)
    go_on.set()
    for thread in (holder, *followers):
        thread.join(30)
    monkeypatch.undo()
    assert sorted(outcomes) == ["0", "1"]
    assert agents_of(database) == ["0", "1"]
    return came


def test_an_interrupt_while_a_call_queues_leaves_nobody_in_the_queue(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it comes, the unit is never run, and those behind it are done, alone where they must be."""
    turn = 0
    came = True
    while came:
        path = copy_template(sqlite_template, tmp_path / str(turn))
        with Database.open(path, busy_timeout=timedelta(milliseconds=50), durability="normal") as database:
            came = interrupted_in_the_queue(database, turn, monkeypatch)
        turn += 1
    assert turn > 5
