"""The index of sessions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import update

from homeagent import AgentSession, AgentSessionCreate, Database
from homeagent.errors import (
    AgentNotFoundError,
    InvalidArgumentError,
    ReadOnlyError,
    SessionExistsError,
    SessionNotFoundError,
)
from homeagent.models.session import route_key
from homeagent.stores import sessions as module
from tests.conftest import START, FakeClock, add_agent, dump

SECOND = timedelta(seconds=1)
_column: Any = AgentSession.__table__.c
ROUTES: list[dict[str, Any]] = [
    {},
    {"sender_id": "s"},
    {"channel_id": "s"},
    {"sender_id": "s", "channel_id": "c"},
    {"sender_id": 's","c'},
]


def test_create_and_find(database: Database) -> None:
    """A created session is found with every field; without an id it gets a UUIDv7."""
    add_agent(database)
    with database.unit_of_work() as unit:
        given = AgentSessionCreate(session_id="s1", agent_id="ada", sender_id="Ann ☎", channel_id="sms/1")
        made = unit.sessions.create(given)
        named = unit.sessions.create(AgentSessionCreate(agent_id="ada"))
    with database.unit_of_work(read_only=True) as unit:
        assert made == unit.sessions.get("s1") == unit.sessions.find_by_id("s1")
    assert (made.agent_id, made.sender_id, made.channel_id) == ("ada", "Ann ☎", "sms/1")
    assert made.created_at == made.last_active_at == START
    assert named.session_id[14] == "7"


def test_wrong_argument_types_write_nothing(database: Database) -> None:
    """If the argument is a dict or a row, the method raises an error and writes no row."""
    add_agent(database)
    before = dump(database)
    row = AgentSession(session_id="row", agent_id="ada", created_at=START, last_active_at=START)
    for wrong in ({"agent_id": "ada"}, row, None):
        with pytest.raises(InvalidArgumentError, match="AgentSessionCreate"), database.unit_of_work() as unit:
            unit.sessions.create(wrong)  # type: ignore[arg-type]  # on purpose
    assert dump(database) == before


def test_refused_creates_write_nothing(database: Database) -> None:
    """If the id is taken or the agent does not exist, `create` raises an error."""
    add_agent(database)
    with database.unit_of_work() as unit:
        unit.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada"))
    before = dump(database)
    with database.unit_of_work() as unit:
        for sender in (None, "another"):
            with pytest.raises(SessionExistsError) as taken:
                unit.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada", sender_id=sender))
            assert taken.value.session_id == "s1"
        with pytest.raises(AgentNotFoundError) as absent:
            unit.sessions.create(AgentSessionCreate(session_id="s2", agent_id="nobody"))
        assert absent.value.agent_id == "nobody"
        with pytest.raises(AgentNotFoundError):
            unit.sessions.resolve(agent_id="nobody")
        with pytest.raises(SessionNotFoundError):
            unit.sessions.get("s2")
        assert unit.sessions.find_by_id("s2") is None
        assert unit.sessions.delete("s2") is False
        assert unit.sessions.touch("s2") is False
    assert dump(database) == before


def test_bad_arguments_are_refused(database: Database) -> None:
    """Invalid ids, labels, limits, cursors and timestamps raise an error, and no row is written."""
    add_agent(database)
    with database.unit_of_work() as unit:
        sessions = unit.sessions
        for bad in ("", "x" * 1025, "nul\0", "\ud800"):
            with pytest.raises(InvalidArgumentError):
                sessions.resolve(agent_id="ada", sender_id=bad)
            with pytest.raises(InvalidArgumentError):
                sessions.resolve(agent_id="ada", channel_id=bad)
        for limit in (0, -1, True):
            with pytest.raises(InvalidArgumentError):
                sessions.list(limit=limit)
        with pytest.raises(InvalidArgumentError):
            sessions.list(after="s1")  # type: ignore[arg-type]
        with pytest.raises(InvalidArgumentError, match="aware"):
            sessions.touch("s1", START.replace(tzinfo=None))
        assert sessions.list() == []


def test_resolve_is_one_session_per_route(database: Database) -> None:
    """Each combination of agent, sender and channel has one session, and two absent values count as equal."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    with database.unit_of_work() as unit:
        first = [
            unit.sessions.resolve(agent_id=agent, **route).session_id for agent in ("ada", "bob") for route in ROUTES
        ]
    with database.unit_of_work() as unit:
        again = [
            unit.sessions.resolve(agent_id=agent, **route).session_id for agent in ("ada", "bob") for route in ROUTES
        ]
    assert first == again
    assert len(set(first)) == len(first)


def test_created_sessions_take_a_free_route(database: Database) -> None:
    """`resolve` returns the first session of a route; if that session is deleted, `resolve` creates a new one."""
    add_agent(database)
    with database.unit_of_work() as unit:
        for session_id in ("s1", "s2"):
            unit.sessions.create(AgentSessionCreate(session_id=session_id, agent_id="ada", sender_id="s"))
        assert unit.sessions.resolve(agent_id="ada", sender_id="s").session_id == "s1"
        assert unit.sessions.delete("s1") is True
        assert unit.sessions.resolve(agent_id="ada", sender_id="s").session_id not in {"s1", "s2"}


def test_resolve_after_the_orm_moved_sessions(database: Database) -> None:
    """If a flush moves a session, the session takes its new route when the route is free or becomes free."""
    add_agent(database)

    def resolve(sender: str | None) -> AgentSession:
        return database.sessions.resolve(agent_id="ada", sender_id=sender)

    ann, bob, eve = (resolve(sender).session_id for sender in ("ann", "bob", "eve"))
    with database.unit_of_work() as unit:
        for session_id, sender in ((ann, "bob"), (bob, None), (eve, "bob")):
            moved = unit.session.get(AgentSession, session_id)
            assert moved is not None
            moved.sender_id = sender
        unit.session.flush()
        assert unit.sessions.resolve(agent_id="ada").session_id == bob
        row = AgentSession(
            session_id="new", agent_id="ada", sender_id="eve", created_at=START, last_active_at=START, route_key="odd"
        )
        unit.session.add(row)
    assert resolve(None).session_id == bob
    assert resolve("bob").session_id in (ann, eve)
    assert resolve("eve").session_id == "new"
    assert (resolve("ann").sender_id, resolve("ann").session_id in (ann, bob, eve)) == ("ann", False)
    assert only_sound(database)


def only_sound(database: Database) -> bool:
    """Return whether each route key belongs to its session."""
    rows = database.sessions.list()
    return all(row.route_key in (None, route_key(row.agent_id, row.sender_id, row.channel_id)) for row in rows)


def test_resolve_after_an_update_statement(database: Database) -> None:
    """If an UPDATE statement leaves an old route key, `resolve` and `create` never return the moved session for it."""
    add_agent(database)
    moved = database.sessions.resolve(agent_id="ada", sender_id="ann").session_id
    with database.unit_of_work() as unit:
        unit.session.execute(update(AgentSession).values(sender_id="bob"))
    with pytest.raises(ReadOnlyError), database.unit_of_work(read_only=True) as unit:
        unit.sessions.resolve(agent_id="ada", sender_id="ann")
    with database.unit_of_work() as unit:
        created = unit.sessions.create(AgentSessionCreate(agent_id="ada", sender_id="ann"))
        assert unit.sessions.resolve(agent_id="ada", sender_id="ann") == created
    assert created.session_id != moved
    with database.unit_of_work() as unit:
        unit.session.execute(update(AgentSession).where(_column.sender_id == "ann").values(channel_id="sms"))
    again = database.sessions.resolve(agent_id="ada", sender_id="ann")
    assert (again.channel_id, again.session_id in (moved, created.session_id)) == (None, False)
    assert only_sound(database)


def test_touch_moves_forward_only(database: Database, clock: FakeClock) -> None:
    """`touch` records an activity if it is later than the stored one by a millisecond or more."""
    add_agent(database)
    with database.unit_of_work() as unit:
        unit.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada"))
        assert unit.sessions.touch("s1") is False
        now = clock.advance(milliseconds=1)
        assert unit.sessions.touch("s1") is True
        assert unit.sessions.touch("s1", now - SECOND) is False
        assert unit.sessions.get("s1").last_active_at == now
        assert unit.sessions.get("s1").created_at == START


def test_pages_are_stable(database: Database, clock: FakeClock) -> None:
    """With equal timestamps and rows added meanwhile, pages neither repeat nor skip an earlier row."""
    add_agent(database)
    chance = random.Random(7)
    with database.unit_of_work() as unit:
        clock.advance(seconds=3)
        rows = [
            AgentSession(
                session_id=f"s{number:03}",
                agent_id="ada",
                sender_id=chance.choice([None, "x", "y"]),
                created_at=START,
                last_active_at=START + SECOND * chance.randrange(4),
            )
            for number in range(60)
        ]
        assert unit.sessions.index(rows) == 60
    expected = sorted(rows, key=lambda row: (row.last_active_at, row.session_id), reverse=True)
    for sender in (None, "x"):
        found: list[str] = []
        after = None
        while True:
            with database.unit_of_work() as unit:
                page = unit.sessions.list(agent_id="ada", sender_id=sender, limit=7, after=after)
                found += [row.session_id for row in page]
                if len(page) < 7:
                    break
                after = page[-1]
                clock.advance(SECOND * 10)
                unit.sessions.create(AgentSessionCreate(agent_id="ada", sender_id="x"))
        old = {row.session_id for row in rows}
        assert [row for row in found if row in old] == [
            row.session_id for row in expected if sender in (None, row.sender_id)
        ]
        assert len(found) == len(set(found))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("filters", [{}, {"agent": True}, {"sender": True}, {"channel": True}], ids=str)
def test_pages_come_from_an_index(database: Database, filters: dict[str, bool], after: bool) -> None:
    """Each page is read along an index, without a sort and without a full table scan."""
    wanted = {"agent": False, "sender": False, "channel": False, **filters}
    statement = module._list(**wanted, after=after)
    values = {"agent_id": "a", "sender_id": "s", "channel_id": "c", "limit": 50, "after_active": START, "after_id": "s"}
    with database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        raw: Any = connection.connection.driver_connection
        compiled = statement.compiled(connection.dialect, read_only=True)
        if connection.dialect.name == "sqlite":
            rows = raw.execute(f"EXPLAIN QUERY PLAN {compiled.sql}", compiled.bind(values)).fetchall()
            plan = "\n".join(row[3] for row in rows)
        else:
            # PostgreSQL would scan and sort an empty table. Make both expensive, so that the plan shows whether an
            # index serves.
            for way in ("seqscan", "bitmapscan", "sort", "incremental_sort"):
                raw.execute(f"SET LOCAL enable_{way} = off")
            rows = raw.execute(f"EXPLAIN {compiled.sql}", compiled.bind(values)).fetchall()
            plan = "\n".join(row[0] for row in rows)
    if database.status().engine == "sqlite":
        assert "TEMP B-TREE" not in plan
        assert "USING INDEX" in plan
        if filters or after:
            assert "SCAN" not in plan
    else:
        assert "Sort" not in plan
        assert "Index Scan Backward" in plan
        if filters or after:
            assert "Index Cond" in plan


def rows(count: int, *, agent_id: str = "ada") -> Iterator[AgentSession]:
    """Yield sessions of one route for the index."""
    for number in range(count):
        yield AgentSession(
            session_id=f"i{number:05}", agent_id=agent_id, sender_id="s", created_at=START, last_active_at=START
        )


def test_index_adds_and_updates(database: Database, clock: FakeClock) -> None:
    """`index` adds new sessions, updates only the activity of known sessions, and reports progress for each batch."""
    add_agent(database)
    told: list[int] = []
    with database.unit_of_work() as unit:
        unit.sessions.create(AgentSessionCreate(session_id="i00001", agent_id="ada", channel_id="kept"))
        clock.advance(seconds=2)
        unit.sessions.touch("i00001", START + SECOND)
        assert unit.sessions.index(rows(1500), progress=told.append) == 1500
        assert told == [1000, 1500]
        kept = unit.sessions.get("i00001")
        assert (kept.sender_id, kept.channel_id, kept.last_active_at) == (None, "kept", START + SECOND)
        later = AgentSession(session_id="i00001", agent_id="ada", created_at=START, last_active_at=START + 2 * SECOND)
        assert unit.sessions.index([later]) == 1
        assert unit.sessions.get("i00001").last_active_at == START + 2 * SECOND
        assert unit.sessions.index([]) == 0
    assert len(dump(database)["sessions"]) == 1500


def test_future_time_counts_as_now(database: Database, clock: FakeClock) -> None:
    """If a sender's clock is ahead, the session's time is now, so that later activity is still later."""
    add_agent(database)
    ahead = START + timedelta(days=18_000)
    with database.unit_of_work() as unit:
        known = unit.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada"))
        clock.advance(SECOND)
        assert unit.sessions.touch("s1", ahead) is True
        assert unit.sessions.get("s1").last_active_at == clock.now
        clock.advance(SECOND)
        times = {"created_at": ahead, "last_active_at": ahead}
        unit.sessions.index([AgentSession(session_id=name, agent_id="ada", **times) for name in ("s1", "s2")])
        moved, added = unit.sessions.get("s1"), unit.sessions.get("s2")
        assert (moved.created_at, moved.last_active_at) == (known.created_at, clock.now)
        assert added.created_at == added.last_active_at == clock.now
    findings = {finding.check: finding for finding in database.doctor().findings}
    assert findings["clock"].severity == "ok"


def test_resolve_finds_indexed_sessions(database: Database) -> None:
    """After a rebuild of the index, `resolve` returns the first indexed session of a route and creates none."""
    add_agent(database)
    with database.unit_of_work() as unit:
        unit.sessions.index(rows(3))
        assert unit.sessions.resolve(agent_id="ada", sender_id="s").session_id == "i00000"
    assert len(dump(database)["sessions"]) == 3


def test_index_names_the_wrong_item(database: Database) -> None:
    """An item that is not a session is named by its number, an absent agent by its id, and no row is written."""
    add_agent(database)
    before = dump(database)
    with pytest.raises(InvalidArgumentError, match="number 1003 "), database.unit_of_work() as unit:
        unit.sessions.index([*rows(1002), "no session"])  # type: ignore[list-item]
    with pytest.raises(AgentNotFoundError) as caught, database.unit_of_work() as unit:
        unit.sessions.index([*rows(1), *rows(1, agent_id="nobody")])
    assert caught.value.agent_id == "nobody"
    assert dump(database) == before
