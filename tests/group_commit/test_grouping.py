"""Group commit: units that share a commit are as good as units of their own, whatever the others do.

SQLite only, but for the test that says so: PostgreSQL groups commits by itself.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homeagent import Agent, AgentCreate, Database, UnitOfWork
from homeagent.engine.link import Link
from homeagent.errors import (
    AgentExistsError,
    AgentNotFoundError,
    DatabaseBusyError,
    DatabaseClosedError,
    DatabaseError,
    DiskFullError,
    UnitStateError,
)
from homeagent.group_commit.calls import Call
from homeagent.group_commit.grouping import Grouping
from tests.conftest import START, FakeClock, add_agent, dump
from tests.interrupts import interrupt_at

Work = Callable[[UnitOfWork], Any]


@pytest.fixture(autouse=True)
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group takes in all that wait, however slow the machine is."""
    monkeypatch.setattr("homeagent.group_commit.grouping._LONGEST", 60)


def create(unit: UnitOfWork, agent_id: str) -> str:
    """Create an agent in this unit."""
    return unit.agents.create(AgentCreate(id=agent_id, name=agent_id, workspace_path="/srv")).id


def agents_of(database: Database) -> list[str]:
    """Return the ids of the agents that others can see."""
    with database.unit_of_work(read_only=True) as unit:
        return [agent.id for agent in unit.agents.list()]


def grouping_of(database: Database) -> Grouping:
    """Return what groups the units of this database."""
    grouping = database._runner._grouping
    assert grouping is not None
    return grouping


class Desk:
    """A mailbox without an event loop: leads in this thread, one call after the other, until nobody waits."""

    def __init__(self, grouping: Grouping) -> None:
        self.grouping = grouping
        self.leading: list[Call[Any]] = []
        self.delivered: list[Call[Any]] = []

    def lead(self, call: Call[Any]) -> None:
        """Remember who is next."""
        self.leading.append(call)

    def deliver(self, calls: Sequence[Call[Any]]) -> None:
        """Remember who was told."""
        self.delivered.extend(calls)

    def serve(self, works: Sequence[Work]) -> list[Call[Any]]:
        """Do these as if all had come while the lane was taken."""
        calls = [Call(work, self) for work in works]
        for call in calls:
            self.grouping.submit(call)
        while self.leading:
            self.grouping.lead(self.leading.pop())
        assert sorted(map(id, self.delivered)) == sorted(map(id, calls))
        self.delivered.clear()
        return calls


def serve(database: Database, *works: Work) -> list[Any]:
    """Do these in one group, and return what each returned or raised."""
    return [outcome_of(call) for call in Desk(grouping_of(database)).serve(works)]


def outcome_of(call: Call[Any]) -> Any:
    """Return what a call's work returned, or raised."""
    try:
        return call.outcome()
    except BaseException as error:  # noqa: BLE001  it is compared
        return error


@contextmanager
def counted_commits(monkeypatch: pytest.MonkeyPatch, *faults: BaseException | None) -> Iterator[list[int]]:
    """Count the commits of write units; the first ones fail with these faults, None for one that does not."""
    count = [0]
    coming = iter(faults)
    commit = Link.commit

    def counting(link: Link) -> None:
        if not link.read_only:
            count[0] += 1
            fault = next(coming, None)
            if fault is not None:
                raise fault
        commit(link)

    with monkeypatch.context() as patch:
        patch.setattr(Link, "commit", counting)
        yield count


class Odd(BaseException):
    """Neither an Exception nor one that Python itself raises."""


# What a group is


def test_units_that_wait_share_one_commit(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten units that wait for the lane are committed together, each with its own result."""
    with counted_commits(monkeypatch) as count:
        results = serve(sqlite_database, *(functools.partial(create, agent_id=f"a{number}") for number in range(10)))
    assert results == [f"a{number}" for number in range(10)]
    assert count == [1]
    assert agents_of(sqlite_database) == sorted(results)
    snapshot = sqlite_database._engine.counters.snapshot()
    assert (snapshot.groups, snapshot.group_size_p50, snapshot.commits) == (1, 10, 10)


def test_threads_share_commits(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that call `run` while the lane is taken are done in one commit when it is free."""
    grouping = grouping_of(sqlite_database)
    with counted_commits(monkeypatch) as count:
        with sqlite_database.unit_of_work():
            threads = [
                threading.Thread(target=sqlite_database.run, args=(functools.partial(create, agent_id=f"a{number}"),))
                for number in range(8)
            ]
            for thread in threads:
                thread.start()
            # Only the queue itself says who waits.
            while len(grouping._queue) < 7:
                time.sleep(0.001)
        for thread in threads:
            thread.join(30)
    assert count == [2]  # the one that held the lane, and all others
    assert len(agents_of(sqlite_database)) == 8


def test_coroutines_share_commits(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred coroutines are done in a few commits, by one thread, each with its own result or error."""
    threads: set[str] = set()

    def work(unit: UnitOfWork, number: int) -> str:
        threads.add(threading.current_thread().name)
        agent_id = create(unit, f"a{number:03}")
        if number % 10 == 9:
            raise LookupError(agent_id)
        return agent_id

    async def main() -> list[Any]:
        calls = [sqlite_database.arun(functools.partial(work, number=number)) for number in range(200)]
        return await asyncio.gather(*calls, return_exceptions=True)

    with counted_commits(monkeypatch) as count:
        results = asyncio.run(main())
    for number, result in enumerate(results):
        if number % 10 == 9:
            assert isinstance(result, LookupError)
            assert result.args == (f"a{number:03}",)
        else:
            assert result == f"a{number:03}"
    assert len(agents_of(sqlite_database)) == 100  # a page
    assert len(dump(sqlite_database)["agents"]) == 180
    assert count[0] < 20
    assert threads == {"homeagent-writer"}


def test_postgresql_groups_by_itself(empty_postgres_url: str) -> None:
    """A server has many writers and groups their commits: there, each unit has a connection of its own."""
    with Database.open(empty_postgres_url) as database:
        assert database._runner._grouping is None
        assert database.run(functools.partial(create, agent_id="ada")) == "ada"


# Each for itself


def raising(unit: UnitOfWork, error: BaseException) -> None:
    """Write something, and raise."""
    create(unit, "raised")
    raise error


def rolling_back(unit: UnitOfWork) -> str:
    """Write something, give the unit up, and try to go on."""
    create(unit, "given up")
    unit.after_commit(lambda: pytest.fail("never committed"))
    unit.rollback()
    for act in (lambda: create(unit, "too late"), lambda: unit.session, unit.rollback):
        with pytest.raises(UnitStateError, match="rolled back"):
            act()
    return "gave up"


left_open: list[Any] = []


def leave_open(unit: UnitOfWork) -> None:
    """Open a savepoint that nobody ends. It would be ended if nothing referred to it."""
    left_open.append(unit.savepoint())
    left_open[-1].__enter__()


def leaving_savepoints(unit: UnitOfWork) -> str:
    """Open savepoints, and end none of them."""
    for number in range(2):
        leave_open(unit)
        create(unit, f"in savepoint {number}")
    return "left"


def leaving_and_raising(unit: UnitOfWork) -> None:
    """Raise within savepoints that nobody ends."""
    leaving_savepoints(unit)
    create(unit, "raised")
    raise LookupError


def refused(unit: UnitOfWork) -> None:
    """Meet an error of the store, and let it out."""
    create(unit, "raised")
    create(unit, "raised")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (functools.partial(raising, error=LookupError("x")), LookupError),
        (functools.partial(raising, error=SystemExit(3)), SystemExit),
        (functools.partial(raising, error=GeneratorExit()), GeneratorExit),
        (functools.partial(raising, error=Odd()), Odd),
        (refused, AgentExistsError),
        (leaving_and_raising, LookupError),
        (rolling_back, "gave up"),
    ],
)
@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
def test_what_undoes_a_unit_spares_its_neighbours(
    sqlite_database: Database, bad: Work, expected: Any, position: int
) -> None:
    """A unit that raises or gives up is undone alone, wherever it stands; its caller alone learns of it."""
    works: list[Work] = [functools.partial(create, agent_id="ada"), functools.partial(create, agent_id="bob")]
    works.insert(position, bad)
    results = serve(sqlite_database, *works)
    result = results.pop(position)
    assert result == expected or isinstance(result, expected)
    assert results == ["ada", "bob"]
    assert agents_of(sqlite_database) == ["ada", "bob"]


@pytest.mark.parametrize("position", [0, 1, 2], ids=["first", "middle", "last"])
def test_savepoints_that_nobody_ended_end_with_their_unit(sqlite_database: Database, position: int) -> None:
    """What was done in them is kept with the unit, and no other unit is inside of them."""
    works: list[Work] = [functools.partial(create, agent_id="ada"), functools.partial(raising, error=LookupError())]
    works.insert(position, leaving_savepoints)
    results = serve(sqlite_database, *works)
    assert results[position] == "left"
    left_open.clear()  # where the generators behind them end, and may touch nothing
    assert agents_of(sqlite_database) == ["ada", "in savepoint 0", "in savepoint 1"]


def test_a_unit_with_its_orm_session_is_done_alone(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is done again in a transaction of its own, where it may flush, fail and roll back; the others are not."""
    runs: list[str] = []

    def orm(unit: UnitOfWork, *, swallow: bool) -> str:
        runs.append("orm")
        create(unit, f"store {swallow}")
        try:
            session = unit.session
        except BaseException:
            if not swallow:
                raise
            return "swallowed"
        session.add(Agent(id=f"orm {swallow}", name="Orm", workspace_path="/orm", created_at=START))
        return "with session"

    def orm_rollback(unit: UnitOfWork) -> str:
        create(unit, "undone")
        unit.session.rollback()
        return "rolled back"

    def plain(unit: UnitOfWork, agent_id: str) -> str:
        runs.append(agent_id)
        return create(unit, agent_id)

    with counted_commits(monkeypatch) as count:
        results = serve(
            sqlite_database,
            functools.partial(plain, agent_id="ada"),
            functools.partial(orm, swallow=False),
            orm_rollback,
            functools.partial(orm, swallow=True),
            functools.partial(plain, agent_id="bob"),
        )
    assert results == ["ada", "with session", "rolled back", "with session", "bob"]
    assert agents_of(sqlite_database) == ["ada", "bob", "orm False", "orm True", "store False", "store True"]
    assert runs == ["ada", "orm", "orm", "bob", "orm", "orm"]
    assert count == [3]


def test_a_leader_with_its_orm_session_leads_nobody(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that its own session may end is joined by no other unit."""

    def orm(unit: UnitOfWork) -> None:
        unit.session.add(Agent(id="orm", name="Orm", workspace_path="/orm", created_at=START))

    with counted_commits(monkeypatch) as count:
        serve(sqlite_database, orm, functools.partial(create, agent_id="ada"))
    assert count == [2]
    assert agents_of(sqlite_database) == ["ada", "orm"]


def test_units_see_what_those_before_them_did(sqlite_database: Database) -> None:
    """In a group, one unit sees the writes of the units before it, and none of those that were undone."""

    def look(unit: UnitOfWork) -> list[str]:
        return [agent.id for agent in unit.agents.list()]

    results = serve(
        sqlite_database,
        functools.partial(create, agent_id="ada"),
        functools.partial(raising, error=LookupError()),
        look,
        functools.partial(create, agent_id="ada"),
    )
    assert results[2] == ["ada"]
    assert isinstance(results[3], AgentExistsError)


def test_a_unit_is_of_no_use_after_its_end(sqlite_database: Database) -> None:
    """A unit that was kept beyond its turn can't write into its neighbour's."""
    kept: list[UnitOfWork] = []

    def meddle(unit: UnitOfWork) -> None:
        for other in kept:
            with pytest.raises(UnitStateError):
                create(other, "smuggled")
            with pytest.raises(UnitStateError):
                other.rollback()
        kept.append(unit)

    assert serve(sqlite_database, meddle, meddle, meddle, meddle)[1:] == [None] * 3
    assert len(kept) == 4
    assert agents_of(sqlite_database) == []


# When the commit fails


def test_a_commit_that_fails_is_made_for_each_alone(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the group took place: each unit is run again in a transaction of its own, and succeeds."""
    runs: list[str] = []

    def work(unit: UnitOfWork, agent_id: str) -> str:
        runs.append(agent_id)
        return create(unit, agent_id)

    with counted_commits(monkeypatch, DiskFullError("no room")) as count:
        results = serve(sqlite_database, *(functools.partial(work, agent_id=name) for name in ("a", "b", "c")))
    assert results == ["a", "b", "c"]
    assert runs == ["a", "b", "c"] * 2
    assert count == [4]
    assert agents_of(sqlite_database) == ["a", "b", "c"]


def test_a_commit_that_fails_for_one_alone_is_its_own_error(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of units that are run again alone, the one whose commit fails gets the error, and is not there."""
    error = DiskFullError("no room")
    works = [functools.partial(create, agent_id=name) for name in ("a", "b", "c")]
    with counted_commits(monkeypatch, DiskFullError("no room"), None, error):
        results = serve(sqlite_database, *works)
    assert results == ["a", error, "c"]
    assert agents_of(sqlite_database) == ["a", "c"]


def test_a_transaction_that_the_engine_undid_is_done_again(sqlite_database: Database) -> None:
    """SQLite may undo all by itself on a full disk: the others' units are run again, and none is lost."""
    broken: list[int] = []

    def breaking(unit: UnitOfWork) -> str:
        if not broken:
            broken.append(1)
            link: Any = unit._link
            link.execute("ROLLBACK")
            raise DiskFullError("no room")
        return create(unit, "broke before")

    works = [functools.partial(create, agent_id=name) for name in ("a", "b")]
    assert serve(sqlite_database, works[0], breaking, works[1]) == ["a", "broke before", "b"]
    assert agents_of(sqlite_database) == ["a", "b", "broke before"]


def test_a_callers_own_thread_does_no_unit_but_its_own(sqlite_database: Database) -> None:
    """Whatever waits while a caller does its unit, another thread does: nobody's function keeps it, nor its Ctrl-C."""
    grouping = grouping_of(sqlite_database)
    ran_in: list[str] = []

    def follow(unit: UnitOfWork) -> None:
        ran_in.append(threading.current_thread().name)
        create(unit, f"follower {len(ran_in)}")

    followers = [threading.Thread(target=sqlite_database.run, args=(follow,)) for _ in range(3)]

    def lead(unit: UnitOfWork) -> None:
        create(unit, "leader")
        for follower in followers:
            follower.start()
        while len(grouping._queue) < len(followers):
            time.sleep(0.001)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sqlite_database.run(lead)
    for follower in followers:
        follower.join(30)
    assert ran_in == ["homeagent-writer"] * 3
    assert agents_of(sqlite_database) == ["follower 1", "follower 2", "follower 3"]


def test_an_interrupt_right_after_the_commit_loses_nothing(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where COMMIT had returned, the followers' units took place, once, and each is told so."""
    runs: list[str] = []
    commit = Link.commit
    coming = iter([KeyboardInterrupt()])

    def interrupted(link: Link) -> None:
        commit(link)
        if not link.read_only and (error := next(coming, None)):
            raise error

    def work(unit: UnitOfWork, agent_id: str) -> str:
        runs.append(agent_id)
        return create(unit, agent_id)

    monkeypatch.setattr(Link, "commit", interrupted)
    results = serve(sqlite_database, *(functools.partial(work, agent_id=name) for name in ("a", "b")))
    assert isinstance(results[0], KeyboardInterrupt)
    assert results[1] == "b"
    assert runs == ["a", "b"]
    assert agents_of(sqlite_database) == ["a", "b"]


# After the commit


def interrupted_run(database: Database, turn: int, *, crowded: bool) -> bool:
    """Interrupt a call of `run` that has another one behind it, and see that this one and later ones are done."""
    modules = {f"homeagent.group_commit.{name}" for name in ("grouping", "joint_units", "writer_thread")}
    grouping = grouping_of(database)
    grouping._crowded = crowded
    outcomes: list[Any] = []

    go_on = threading.Event()

    def follow() -> None:
        assert go_on.wait(30)
        outcomes.append(database.run(agents_seen))

    def work(unit: UnitOfWork) -> None:
        go_on.set()
        while not grouping._queue and not outcomes:
            time.sleep(0.0001)

    behind = threading.Thread(target=follow)
    behind.start()
    came = interrupt_at(turn, modules, lambda: database.run(work))
    go_on.set()
    behind.join(30)
    assert outcomes == [0]
    assert database.run(agents_seen) == 0
    return came


@pytest.mark.parametrize("crowded", [False, True], ids=["in its own thread", "in the writer's"])
def test_an_interrupt_takes_neither_lead_nor_lane_along(sqlite_path: Path, crowded: bool) -> None:
    """Wherever it comes in a call of `run`, those who wait behind it and those who come later are done."""
    turn = 0
    came = True
    while came:
        with Database.open(sqlite_path, busy_timeout=timedelta(seconds=5), durability="normal") as database:
            came = interrupted_run(database, turn, crowded=crowded)
        turn += 1
    assert turn > 10


def test_no_callback_after_a_commit_that_failed(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone unit whose commit fails calls nothing, and neither does one of a group that then fails alone."""
    called: list[str] = []

    def work(unit: UnitOfWork, name: str) -> None:
        unit.after_commit(functools.partial(called.append, name))
        create(unit, name)

    with counted_commits(monkeypatch, DiskFullError("no room")), pytest.raises(DiskFullError):
        sqlite_database.run(functools.partial(work, name="lone"))
    works = [functools.partial(work, name=name) for name in ("a", "b")]
    with counted_commits(monkeypatch, *(DiskFullError("no room") for _ in range(3))):
        calls = Desk(grouping_of(sqlite_database)).serve(works)
    assert [call.callbacks for call in calls] == [None, None]
    assert called == []
    assert agents_of(sqlite_database) == []


def test_callbacks_run_in_their_callers_thread_once_all_is_durable(sqlite_database: Database) -> None:
    """Each caller's callbacks run in its own thread, see the commit, and may open units themselves."""
    grouping = grouping_of(sqlite_database)
    seen: list[tuple[str, bool, str]] = []

    def call(name: str) -> None:
        def work(unit: UnitOfWork) -> None:
            create(unit, name)
            unit.after_commit(lambda: seen.append((name, name in agents_of(sqlite_database), thread_name())))
            unit.after_commit(lambda: sqlite_database.run(functools.partial(create, agent_id=f"after {name}")))

        sqlite_database.run(work)

    def thread_name() -> str:
        return threading.current_thread().name

    threads = [threading.Thread(target=call, args=(name,), name=name) for name in ("a", "b", "c")]
    with sqlite_database.unit_of_work():
        for thread in threads:
            thread.start()
        while len(grouping._queue) < 2:
            time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert sorted(seen) == [(name, True, name) for name in ("a", "b", "c")]
    assert agents_of(sqlite_database) == ["a", "after a", "after b", "after c", "b", "c"]


def test_callbacks_of_coroutines_run_before_they_go_on_and_block_no_loop(sqlite_database: Database) -> None:
    """They run in a worker thread with the caller's context, and a broken one hides nothing."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    seen: list[tuple[str, bool]] = []

    def work(unit: UnitOfWork) -> str:
        unit.after_commit(lambda: 1 / 0)
        unit.after_commit(lambda: seen.append((name.get(), threading.current_thread() is main_thread)))
        return create(unit, name.get())

    async def caller(mine: str) -> None:
        name.set(mine)
        assert await sqlite_database.arun(work) == mine
        assert (mine, False) in seen

    async def main() -> None:
        await asyncio.gather(*(caller(f"c{number}") for number in range(5)))

    main_thread = threading.current_thread()
    asyncio.run(main())
    assert len(seen) == 5


def test_the_callers_context_is_the_works(sqlite_database: Database) -> None:
    """Whoever's thread does a unit, it finds the context variables of its own caller."""
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    grouping = grouping_of(sqlite_database)
    results: list[bool] = []

    def call(mine: str) -> None:
        name.set(mine)
        results.append(sqlite_database.run(lambda unit: name.get()) == mine)

    threads = [threading.Thread(target=call, args=(f"t{number}",)) for number in range(5)]
    with sqlite_database.unit_of_work():
        for thread in threads:
            thread.start()
        while len(grouping._queue) < 4:
            time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert results == [True] * 5


# Whose turn it is


def test_a_block_that_waits_is_not_passed_by_group_after_group(sqlite_database: Database) -> None:
    """While 8 threads run units without a pause, one that uses blocks gets its turns between their groups."""
    stop = threading.Event()

    def busy(number: int) -> None:
        while not stop.is_set():
            sqlite_database.run(lambda unit: unit.agents.find_by_id(f"x{number}"))

    threads = [threading.Thread(target=busy, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(20):
            add_agent(sqlite_database, f"a{number}")
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert len(agents_of(sqlite_database)) == 20


def test_a_group_is_bounded(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader does so many units and no more, then the next one leads."""
    monkeypatch.setattr("homeagent.group_commit.grouping._MOST", 4)
    with counted_commits(monkeypatch) as count:
        serve(sqlite_database, *(functools.partial(create, agent_id=f"a{number}") for number in range(11)))
    assert count == [3]
    monkeypatch.setattr("homeagent.group_commit.grouping._LONGEST", 0)
    with counted_commits(monkeypatch) as count:
        serve(sqlite_database, *(functools.partial(create, agent_id=f"b{number}") for number in range(4)))
    assert count == [2]


def test_a_thread_with_a_unit_open_is_refused_at_once(sqlite_database: Database) -> None:
    """It would wait for itself, whether somebody leads already or not, and inside a work as well."""
    grouping = grouping_of(sqlite_database)
    waiting = threading.Thread(target=sqlite_database.run, args=(functools.partial(create, agent_id="waits"),))
    with sqlite_database.unit_of_work() as unit:
        with pytest.raises(UnitStateError):
            sqlite_database.run(lambda unit: None)
        waiting.start()
        while not grouping._led or not sqlite_database._engine.writers._waiters:
            time.sleep(0.001)
        with pytest.raises(UnitStateError):
            sqlite_database.run(lambda unit: None)
        create(unit, "ada")
    waiting.join(30)

    def nested(unit: UnitOfWork) -> None:
        sqlite_database.run(lambda unit: None)

    assert [type(result) for result in serve(sqlite_database, nested, nested)] == [UnitStateError] * 2
    assert agents_of(sqlite_database) == ["ada", "waits"]


@pytest.fixture
def impatient(sqlite_path: Path, clock: FakeClock) -> Iterator[Database]:
    """A database that waits for nobody for long."""
    with Database.open(sqlite_path, clock=clock, busy_timeout=timedelta(milliseconds=80)) as database:
        yield database


@contextmanager
def held(database: Database) -> Iterator[None]:
    """Hold the write lane from another thread."""
    entered, done = threading.Event(), threading.Event()

    def hold() -> None:
        with database.unit_of_work():
            entered.set()
            done.wait(30)

    holder = threading.Thread(target=hold, name="the slow one")
    holder.start()
    try:
        assert entered.wait(30)
        yield
    finally:
        done.set()
        holder.join()


def test_nobody_waits_longer_than_the_timeout(impatient: Database) -> None:
    """Leader and followers alike are told who holds the lane; then all goes on as before."""
    errors: list[str] = []

    def call(number: int) -> None:
        try:
            impatient.run(functools.partial(create, agent_id=f"late {number}"))
        except DatabaseBusyError as error:
            errors.append(str(error))

    with held(impatient):
        threads = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(errors) == 4
    assert all("'the slow one' holds it since" in error for error in errors)
    assert impatient.run(functools.partial(create, agent_id="ada")) == "ada"
    assert agents_of(impatient) == ["ada"]


def test_no_coroutine_waits_longer_than_the_timeout(impatient: Database) -> None:
    """The same from an event loop, though one thread does the units of all."""

    async def call(number: int) -> Any:
        return await impatient.arun(functools.partial(create, agent_id=f"late {number}"))

    async def main() -> list[Any]:
        results = await asyncio.gather(*(call(number) for number in range(4)), return_exceptions=True)
        return [*results, threading.active_count()]

    with held(impatient):
        *results, _ = asyncio.run(main())
    assert [type(result) for result in results] == [DatabaseBusyError] * 4
    assert all("'the slow one' holds it since" in str(result) for result in results)
    assert asyncio.run(call(1)) == "late 1"
    assert agents_of(impatient) == ["late 1"]


def test_a_unit_that_is_stuck_lets_those_behind_it_give_up(impatient: Database) -> None:
    """While a coroutine's unit hangs in the thread, those queued behind it get their error in time."""
    go_on, stuck = threading.Event(), threading.Event()

    def hang(unit: UnitOfWork) -> str:
        stuck.set()
        assert go_on.wait(30)
        return create(unit, "slow")

    async def main() -> None:
        slow = asyncio.ensure_future(impatient.arun(hang))
        assert await anyio.to_thread.run_sync(stuck.wait, 30)
        with pytest.raises(DatabaseBusyError, match="homeagent-writer"):
            await impatient.arun(functools.partial(create, agent_id="late"))
        go_on.set()
        assert await slow == "slow"

    asyncio.run(main())
    assert agents_of(impatient) == ["slow"]


def busy_or(act: Callable[[], Any]) -> Any:
    """Return what this returns, or its DatabaseBusyError."""
    try:
        return act()
    except DatabaseBusyError as error:
        return error


def test_a_function_that_hangs_keeps_no_other_caller_waiting(impatient: Database) -> None:
    """Those before it in its group and those behind are told who hangs, and not one of them took place.

    They learn it while it hangs. When it ends after all, it alone is done, in a transaction of its own.
    """
    grouping = grouping_of(impatient)
    serve(impatient, agents_seen, agents_seen)  # several at once: the next ones are not done by their callers
    go_on, hanging = threading.Event(), threading.Event()
    outcomes: dict[str, Any] = {}
    called: list[str] = []

    def caller(name: str, work: Work) -> threading.Thread:
        return threading.Thread(target=lambda: outcomes.update({name: busy_or(lambda: impatient.run(work))}), name=name)

    def hang(unit: UnitOfWork) -> str:
        called.append("hang")
        hanging.set()
        assert go_on.wait(30)
        return create(unit, "hung")

    def begin(unit: UnitOfWork) -> str:
        for number, thread in enumerate((second, hangs)):
            thread.start()
            while len(grouping._queue) <= number:
                time.sleep(0.001)
        unit.after_commit(lambda: called.append("never"))
        return create(unit, "first")

    hangs = caller("the hanging one", hang)
    second = caller("second", functools.partial(create, agent_id="second"))
    threads = [caller("first", begin), second, caller("third", functools.partial(create, agent_id="third"))]
    threads[0].start()
    assert hanging.wait(30)
    threads[2].start()
    for thread in threads:
        thread.join(30)
    outcomes["block"] = busy_or(lambda: add_agent(impatient))
    assert "the hanging one" not in outcomes
    assert sorted(outcomes) == ["block", "first", "second", "third"]
    for outcome in outcomes.values():
        assert isinstance(outcome, DatabaseBusyError)
        assert "'homeagent-writer' holds it since" in str(outcome)
        assert "hang for thread 'the hanging one' since" in str(outcome)
    go_on.set()
    hangs.join(30)
    assert outcomes["the hanging one"] == "hung"
    assert agents_of(impatient) == ["hung"]
    assert called == ["hang", "hang"]
    assert impatient.run(functools.partial(create, agent_id="ada")) == "ada"


@pytest.mark.parametrize("cancelled", [False, True], ids=["waiting", "cancelled"])
def test_a_function_that_hangs_keeps_no_coroutine_waiting(impatient: Database, cancelled: bool) -> None:
    """A coroutine whose unit was done gives its group up in time, also one that was cancelled meanwhile."""
    go_on, hanging = threading.Event(), threading.Event()

    def hang(unit: UnitOfWork) -> str:
        hanging.set()
        assert go_on.wait(30)
        return create(unit, "hung")

    def begin(unit: UnitOfWork) -> str:
        while not grouping_of(impatient)._queue:
            time.sleep(0.001)
        unit.after_commit(lambda: pytest.fail("it was given up"))
        return create(unit, "first")

    async def main() -> None:
        first = asyncio.ensure_future(impatient.arun(begin))
        hangs = asyncio.ensure_future(impatient.arun(hang))
        assert await anyio.to_thread.run_sync(hanging.wait, 30)
        if cancelled:
            first.cancel()
        with pytest.raises(asyncio.CancelledError if cancelled else DatabaseBusyError) as caught:
            await first
        if not cancelled:
            assert caught.match("hang for a coroutine since")
        assert not hangs.done()
        go_on.set()
        assert await hangs == "hung"

    asyncio.run(main())
    assert agents_of(impatient) == ["hung"]


def agents_seen(unit: UnitOfWork) -> int:
    """Return how many agents a unit sees."""
    return len(unit.agents.list())


class Stopwatch:
    """A monotonic clock that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("homeagent.group_commit.grouping.monotonic", lambda: self.now)
        monkeypatch.setattr("homeagent.group_commit.calls.monotonic", lambda: self.now)


def test_who_stays_with_a_group_that_another_left_is_done_again(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is done without what the other one did, whose unit took no place; its own wait begins anew."""
    watch = Stopwatch(monkeypatch)
    grouping = grouping_of(sqlite_database)
    desk = Desk(grouping)
    late: list[tuple[Call[Any], Any]] = []
    runs: list[tuple[str, int]] = []

    def work(unit: UnitOfWork, agent_id: str, seconds: float) -> str:
        runs.append((agent_id, agents_seen(unit)))
        watch.now += seconds
        found, again = grouping.overdue(desk)
        late.extend(found)
        for call, error in found:
            call.error = error
        assert 0 < again <= 20
        return create(unit, agent_id)

    # The timeout is 20 s. When the third ends, the first has waited for 22, and the second for 18.
    calls = [
        Call(functools.partial(work, agent_id=name, seconds=seconds), desk)
        for name, seconds in (("first", 1), ("second", 4), ("third", 18))
    ]
    for call in calls:
        grouping.submit(call)
    while desk.leading:
        grouping.lead(desk.leading.pop())
    assert [call for call, _ in late] == calls[:1]
    # Also where it looks at its outcome only after the group was undone.
    assert isinstance(outcome_of(calls[0]), DatabaseBusyError)
    assert desk.delivered == calls[1:]
    assert [outcome_of(call) for call in calls[1:]] == ["second", "third"]
    assert runs == [("first", 0), ("second", 1), ("third", 2), ("second", 0), ("third", 1)]
    assert agents_of(sqlite_database) == ["second", "third"]


def test_nobody_gives_up_a_group_that_commits(sqlite_database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the decision to commit on, no wait is too long: who was told `busy` would find the unit in the file."""
    watch = Stopwatch(monkeypatch)
    grouping = grouping_of(sqlite_database)
    desk = Desk(grouping)
    commit = Link.commit
    late: list[Any] = []

    def slow(link: Link) -> None:
        watch.now += 1000
        late.extend(grouping.overdue(desk)[0])
        commit(link)

    calls = [Call(functools.partial(create, agent_id=name), desk) for name in ("a", "b")]
    for call in calls:
        grouping.submit(call)
    monkeypatch.setattr(Link, "commit", slow)
    while desk.leading:
        grouping.lead(desk.leading.pop())
    assert late == []
    assert [outcome_of(call) for call in calls] == ["a", "b"]


def test_who_is_told_that_it_was_busy_is_not_in_the_file(sqlite_path: Path) -> None:
    """Functions that hang for about as long as anybody waits: what returned is there, what was given up is not."""
    gave_up: list[str] = []
    returned: list[str] = []

    with Database.open(sqlite_path, busy_timeout=timedelta(milliseconds=8), durability="normal") as database:

        def call(caller: int) -> None:
            for number in range(25):
                name = f"{caller}-{number}"

                def work(unit: UnitOfWork, name: str = name, number: int = number) -> None:
                    create(unit, name)
                    time.sleep(0.001 * ((caller * 7 + number * 3) % 10))

                (returned if busy_or(functools.partial(database.run, work)) is None else gave_up).append(name)

        threads = [threading.Thread(target=call, args=(caller,)) for caller in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(gave_up) + len(returned) == 200
        assert gave_up
        assert returned
        assert {row[0] for row in dump(database)["agents"]} == set(returned)


def test_a_system_without_threads_left_still_does_the_units_of_threads(
    sqlite_database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each caller does its own then. A coroutine's is refused, and nobody waits behind it."""
    serve(sqlite_database, agents_seen, agents_seen)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr("homeagent.group_commit.writer_thread.threading.Thread.start", refuse)
        with pytest.raises(DatabaseError, match="can't start new thread"):
            asyncio.run(sqlite_database.arun(functools.partial(create, agent_id="coroutine")))
        assert sqlite_database.run(functools.partial(create, agent_id="thread")) == "thread"
    assert asyncio.run(sqlite_database.arun(functools.partial(create, agent_id="later"))) == "later"
    assert agents_of(sqlite_database) == ["later", "thread"]


def test_closing_waits_for_a_function_that_hangs_no_longer_than_the_timeout(
    impatient: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said that one hangs. Like a block that is open meanwhile, it commits when it ends."""
    go_on, hanging = threading.Event(), threading.Event()
    results: list[str] = []

    def hang(unit: UnitOfWork) -> str:
        hanging.set()
        assert go_on.wait(30)
        return create(unit, "hung")

    async def main() -> None:
        results.append(await impatient.arun(hang))

    path = impatient.status().location
    caller = threading.Thread(target=asyncio.run, args=(main(),))
    caller.start()
    assert hanging.wait(30)
    impatient.close()
    assert [getattr(record, "event", None) for record in caplog.records] == ["unit_hangs"]
    go_on.set()
    caller.join(30)
    assert results == ["hung"]
    with Database.open(path) as again:
        assert agents_of(again) == ["hung"]


def test_closing_refuses_who_waits(sqlite_database: Database) -> None:
    """Threads and coroutines that wait for their turn learn that the database was closed, and nobody hangs."""
    errors: list[type[BaseException]] = []
    grouping = grouping_of(sqlite_database)

    def call(number: int) -> None:
        try:
            sqlite_database.run(functools.partial(create, agent_id=f"late {number}"))
        except DatabaseClosedError as error:
            errors.append(type(error))

    async def coroutines() -> None:
        calls = [sqlite_database.arun(functools.partial(create, agent_id=f"late {n}")) for n in range(10, 13)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        errors.extend(type(result) for result in results if isinstance(result, BaseException))

    with held(sqlite_database):
        threads = [threading.Thread(target=call, args=(number,)) for number in range(3)]
        threads.append(threading.Thread(target=asyncio.run, args=(coroutines(),)))
        for thread in threads:
            thread.start()
        while len(grouping._queue) < 5:
            time.sleep(0.001)
        closing = threading.Thread(target=sqlite_database.close)
        closing.start()
        for thread in threads:
            thread.join(30)
    closing.join(30)
    assert errors == [DatabaseClosedError] * 6
    for thread in threading.enumerate():
        if thread.name == "homeagent-writer":
            thread.join(2)
            assert not thread.is_alive()
    with pytest.raises(DatabaseClosedError):
        sqlite_database.run(lambda unit: None)
    with pytest.raises(DatabaseClosedError):
        asyncio.run(sqlite_database.arun(lambda unit: None))


# Cancelled callers


@pytest.mark.parametrize("scoped", [False, True], ids=["Task.cancel", "scope"])
def test_who_is_cancelled_in_the_queue_leaves_the_others_alone(sqlite_database: Database, scoped: bool) -> None:
    """It leaves at once, its unit is never run, and its neighbours' are."""
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

    async def main() -> list[str]:
        others = [
            asyncio.ensure_future(sqlite_database.arun(functools.partial(work, agent_id=name))) for name in ("a", "b")
        ]
        await asyncio.sleep(0)
        await cancelled()
        done.set()
        return await asyncio.gather(*others)

    done = threading.Event()
    entered = threading.Event()

    def hold() -> None:
        with sqlite_database.unit_of_work():
            entered.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert entered.wait(30)
    assert asyncio.run(main()) == ["a", "b"]
    holder.join()
    assert ran == ["a", "b"]


@pytest.mark.parametrize("scoped", [False, True], ids=["Task.cancel", "scope"])
def test_who_is_cancelled_at_its_turn_waits_for_its_end(sqlite_database: Database, scoped: bool) -> None:
    """Its unit and its callbacks end before the caller does, and the caller is cancelled all the same."""
    began, go_on = threading.Event(), threading.Event()
    seen: list[str] = []

    def work(unit: UnitOfWork) -> None:
        began.set()
        assert go_on.wait(30)
        create(unit, "ada")
        unit.after_commit(lambda: seen.append("durable"))

    async def turned(act: Callable[[], Awaitable[Any]]) -> None:
        assert await anyio.to_thread.run_sync(began.wait, 30)
        await act()
        for _ in range(5):
            await asyncio.sleep(0)
        go_on.set()

    async def main() -> None:
        if scoped:
            with anyio.CancelScope() as scope:

                async def cancel_scope() -> None:
                    scope.cancel()

                other = asyncio.ensure_future(turned(cancel_scope))
                await sqlite_database.arun(work)
            assert scope.cancelled_caught
            await other
            return
        task = asyncio.ensure_future(sqlite_database.arun(work))

        async def cancel_task() -> None:
            task.cancel()

        await turned(cancel_task)
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert seen == ["durable"]
    assert agents_of(sqlite_database) == ["ada"]


def test_a_loop_that_ended_holds_nobody_up(sqlite_database: Database) -> None:
    """A caller whose event loop was closed meanwhile is not told, and the others go on."""
    began, go_on = threading.Event(), threading.Event()

    def work(unit: UnitOfWork) -> None:
        began.set()
        assert go_on.wait(30)
        create(unit, "left behind")

    loop = asyncio.new_event_loop()
    task = loop.create_task(sqlite_database.arun(work))
    while not began.is_set():
        loop.run_until_complete(asyncio.sleep(0.001))
    # It is abandoned on purpose, which asyncio would complain about.
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's switch for that
    loop.close()
    go_on.set()
    assert sqlite_database.run(functools.partial(create, agent_id="ada")) == "ada"
    assert agents_of(sqlite_database) == ["ada", "left behind"]
    with suppress(RuntimeError):
        task.get_coro().close()  # type: ignore[union-attr]  # it is there


# Whatever units do


names = st.sampled_from(["a", "b", "c"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("create"), names),
        st.tuples(st.just("delete"), names),
        st.tuples(st.just("get"), names),
        st.tuples(st.just("nested"), names),
        st.tuples(st.just("left open"), names),
        st.tuples(st.just("session"), names),
        st.tuples(st.just("callback"), names),
    ),
    max_size=4,
)
ends = st.sampled_from(["return", "return", "return", "raise", "rollback"])


def play(unit: UnitOfWork, script: Sequence[tuple[str, str]], end: str, called: list[str]) -> Any:
    """Do the steps of a unit, and return what they showed."""
    shown: list[Any] = []
    for act, name in script:
        if act == "create":
            shown.append(create(unit, name))
        elif act == "delete":
            shown.append(unit.agents.delete(name))
        elif act == "get":
            shown.append(unit.agents.get(name).name)
        elif act == "nested":
            with suppress(LookupError), unit.savepoint():
                unit.agents.delete(name)
                raise LookupError
        elif act == "left open":
            leave_open(unit)
            shown.append(unit.agents.delete(name))
        elif act == "session":
            found = unit.session.get(Agent, name)
            shown.append(found is not None)
            if found is not None:
                found.name = "by the ORM"
        else:
            unit.after_commit(functools.partial(called.append, name))
    if end == "raise":
        raise LookupError(str(shown))
    if end == "rollback":
        unit.rollback()
    return shown


def comparable(outcome: Any) -> Any:
    """Return what two outcomes are alike by."""
    return (type(outcome), str(outcome)) if isinstance(outcome, BaseException) else outcome


# The fixture that all tests have is the same for every example.
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    scripts=st.lists(st.tuples(steps, ends), min_size=2, max_size=6),
    faults=st.lists(st.booleans(), max_size=3),
)
def test_grouped_units_are_as_good_as_units_alone(
    pair: tuple[Database, Database], scripts: list[tuple[list[tuple[str, str]], str]], faults: list[bool]
) -> None:
    """Whatever they do and whichever commits fail, each ends as it would alone, one after the other."""
    grouped, alone = pair
    order: list[int] = []
    called: dict[int, list[str]] = {number: [] for number in range(len(scripts))}
    failing = [DiskFullError("no room") if fault else None for fault in faults]

    def work(unit: UnitOfWork, number: int) -> Any:
        if number in order:
            order.remove(number)
        order.append(number)
        return play(unit, *scripts[number], called[number])

    for database in pair:
        with database.unit_of_work() as unit:
            for agent in unit.agents.list():
                unit.agents.delete(agent.id)
            create(unit, "a")
    with pytest.MonkeyPatch.context() as patch, counted_commits(patch, *failing):
        calls = Desk(grouping_of(grouped)).serve(
            [functools.partial(work, number=number) for number in range(len(scripts))]
        )
    for call in calls:
        for callback in call.callbacks or ():
            callback()
    outcomes = [outcome_of(call) for call in calls]
    left_open.clear()
    for number in order:
        expected: list[str] = []
        if isinstance(outcomes[number], DiskFullError):
            # Its own commit failed: nothing of it took place.
            assert called[number] == []
            continue
        try:
            with alone.unit_of_work() as unit:
                result: Any = play(unit, *scripts[number], expected)
        except (LookupError, AgentExistsError, AgentNotFoundError) as error:
            result = error
        assert comparable(outcomes[number]) == comparable(result)
        assert called[number] == expected
    left_open.clear()
    assert dump(grouped) == dump(alone)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Database, Database]]:
    """Two databases, kept open for all examples, which takes most of the time."""
    clock = FakeClock()
    with (
        Database.open(":memory:", clock=clock, durability="normal") as grouped,
        Database.open(":memory:", clock=clock, durability="normal") as alone,
    ):
        yield grouped, alone
