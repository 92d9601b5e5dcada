"""The index of sessions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from itertools import permutations, product
from typing import Any

import apsw
import pytest
from pydantic import ValidationError
from sqlalchemy import update

from homeagent import AgentSession, AgentSessionCreate, AgentSessionPublic, AgentSessionUpdate, Database
from homeagent.errors import (
    AgentNotFoundError,
    InvalidArgumentError,
    ReadOnlyError,
    RouteTakenError,
    SessionExistsError,
    SessionNotFoundError,
    UnitStateError,
)
from homeagent.models.session import route_key
from homeagent.stores import session_statements as statements
from homeagent.stores import sessions as module
from tests.conftest import START, FakeClock, add_agent, dump, plan_of

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


def test_resolve_reads_without_the_write_lock(database: Database) -> None:
    """If a session holds the route, `database.sessions.resolve` begins no write unit."""
    add_agent(database)
    first = database.sessions.start(agent_id="ada", sender_id="s")
    with database.unit_of_work():  # a write in the same thread would raise UnitStateError
        assert database.sessions.resolve(agent_id="ada", sender_id="s") == first
        with pytest.raises(UnitStateError):
            database.sessions.resolve(agent_id="ada", sender_id="another")


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_start_begins_a_new_conversation(database: Database, route: dict[str, Any]) -> None:
    """`start` returns a session that holds the route; the session before stays listed, and `get` returns it."""
    add_agent(database)
    with pytest.raises(AgentNotFoundError):
        database.sessions.start(agent_id="nobody", **route)
    started = [database.sessions.start(agent_id="ada", **route) for _ in range(3)]
    assert database.sessions.resolve(agent_id="ada", **route) == started[2]
    assert {row.session_id for row in database.sessions.list()} == {row.session_id for row in started}
    assert [database.sessions.get(row.session_id).route_key for row in started[:2]] == [None, None]
    assert only_sound(database)


def test_move_takes_the_new_route(database: Database, clock: FakeClock) -> None:
    """A moved session holds the new route, and the last active session that remains takes the old route."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    with database.unit_of_work() as unit:
        for session_id in ("s1", "s2", "s3"):
            unit.sessions.create(AgentSessionCreate(session_id=session_id, agent_id="ada", channel_id="group"))
            clock.advance(SECOND)
        unit.sessions.touch("s2")
        moved = unit.sessions.move("s1", channel_id="supergroup")
        assert moved == unit.sessions.get("s1")
        assert (moved.agent_id, moved.sender_id, moved.channel_id) == ("ada", None, "supergroup")
        assert unit.sessions.resolve(agent_id="ada", channel_id="supergroup") == moved
        with pytest.raises(RouteTakenError, match="'s2' holds this route") as caught:
            unit.sessions.move("s1", channel_id="group")
        assert caught.value.session_id == "s2"
        assert unit.sessions.resolve(agent_id="ada", channel_id="group").session_id == "s2"
        # Another agent, and no channel any more.
        assert unit.sessions.move("s2", agent_id="bob", sender_id="ann", channel_id=None).sender_id == "ann"
        assert unit.sessions.resolve(agent_id="bob", sender_id="ann").session_id == "s2"
        assert unit.sessions.resolve(agent_id="ada", channel_id="group").session_id == "s3"
    assert only_sound(database)


def test_refused_moves_write_nothing(database: Database) -> None:
    """`move` raises an error for an absent session, an absent agent and an invalid label, and changes no row."""
    add_agent(database)
    database.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada"))
    before = dump(database)
    with database.unit_of_work() as unit:
        with pytest.raises(SessionNotFoundError):
            unit.sessions.move("s2", agent_id="nobody")
        with pytest.raises(AgentNotFoundError) as absent:
            unit.sessions.move("s1", agent_id="nobody")
        assert absent.value.agent_id == "nobody"
        for wrong in ("", "nul\0", 7):
            with pytest.raises(InvalidArgumentError):
                unit.sessions.move("s1", sender_id=wrong)  # type: ignore[arg-type]  # on purpose
    assert dump(database) == before


def test_metadata(database: Database, clock: FakeClock) -> None:
    """`update` sets the metadata; `touch`, `move` and `index` keep the metadata, and a reply shows the metadata."""
    add_agent(database)
    given = {"title": "Küche", "tokens": [1, -0.0], "none": None}
    made = database.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada", metadata=given))
    assert made.metadata_ == given
    clock.advance(SECOND)
    times = {"created_at": START, "last_active_at": clock.now}
    assert database.sessions.touch("s1", START + SECOND / 2)
    rows = [AgentSession(session_id=name, agent_id="ada", metadata=["new"], **times) for name in ("s1", "s2")]
    database.sessions.index(rows)
    assert database.sessions.move("s1", sender_id="ann").metadata_ == given
    assert database.sessions.get("s2").metadata_ == ["new"]
    # A change of the metadata is not an activity.
    clock.advance(SECOND)
    changed = database.sessions.update("s1", AgentSessionUpdate(metadata={"title": "Bad"}))
    assert (changed.metadata_, changed.last_active_at) == ({"title": "Bad"}, START + SECOND)
    assert changed == database.sessions.update("s1", AgentSessionUpdate()) == database.sessions.get("s1")
    assert AgentSessionPublic.model_validate(changed).model_dump()["metadata"] == {"title": "Bad"}
    assert database.sessions.update("s1", AgentSessionUpdate(metadata=None)).metadata_ is None
    for changes in (AgentSessionUpdate(), AgentSessionUpdate(metadata=1)):
        with pytest.raises(SessionNotFoundError):
            database.sessions.update("s3", changes)
    with pytest.raises(InvalidArgumentError, match="AgentSessionUpdate"):
        database.sessions.update("s1", {"metadata": 1})  # type: ignore[arg-type]  # on purpose
    for model in (AgentSessionUpdate, lambda **data: AgentSessionCreate(agent_id="ada", **data)):
        with pytest.raises(ValidationError, match="262,144 bytes"):
            model(metadata="x" * (256 * 1024))


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


def test_sessions_that_are_no_iterable_are_not_indexed(database: Database) -> None:
    """If `index` gets no iterable, InvalidArgumentError names the type."""
    nothing: Any = None
    with pytest.raises(InvalidArgumentError, match="not NoneType"):
        database.sessions.index(nothing)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("filters", ["", "agent_id", "sender_id", "channel_id"])
def test_pages_come_from_an_index(database: Database, filters: str, after: bool) -> None:
    """Each page is read along an index, without a sort and without a full table scan."""
    statement = statements.page_of(frozenset(filters.split()), after=after)
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


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_the_last_active_session_gets_the_route(
    database: Database, monkeypatch: pytest.MonkeyPatch, route: dict[str, Any]
) -> None:
    """Whatever the order of the sessions and of the batches, `index` gives the route to the last active session."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    monkeypatch.setattr(module, "_INDEX_BATCH", 2)
    # An earlier line of a transcript comes after a later line for "b". The session "e" was begun later than "b".
    activity = [("a", 1, 1), ("b", 2, 7), ("b", 2, 3), ("c", 3, 3), ("d", 4, 6), ("e", 5, 7)]
    for number, order in enumerate(permutations(activity, 6)):
        if number % 40:
            continue
        with database.unit_of_work() as unit:
            before = unit.sessions.create(AgentSessionCreate(agent_id="ada", **route))
            unit.session.execute(update(AgentSession).values(created_at=START - 60 * SECOND))
            unit.session.execute(update(AgentSession).values(last_active_at=START - 55 * SECOND))
            unit.sessions.index(
                AgentSession(
                    session_id=name,
                    agent_id="ada",
                    created_at=START - 60 * SECOND + born * SECOND,
                    last_active_at=START - 60 * SECOND + active * SECOND,
                    **route,
                )
                for name, born, active in order
            )
            assert unit.sessions.resolve(agent_id="ada", **route).session_id == "e", order
            # The route of another agent is not concerned.
            assert unit.sessions.resolve(agent_id="bob", **route).agent_id == "bob"
            assert unit.sessions.get(before.session_id).route_key is None
            unit.rollback()


def test_a_page_is_planned_once(sqlite_database: Database) -> None:
    """SQLite does not plan the statement of a page again for another value of a parameter. SQLite only."""
    actions: list[int] = []

    def note(operation: int, *names: str | None) -> int:
        actions.append(operation)
        return int(apsw.SQLITE_OK)

    with sqlite_database.unit_of_work() as unit:
        raw: Any = unit._require_connection().driver_connection
        raw.authorizer = note  # SQLite calls the authorizer while it plans a statement.
        planned = []
        for limit in (5, 6):
            unit.sessions.list(limit=limit)
            planned.append(len(actions))
        raw.authorizer = None
    assert planned[0] > 0
    assert planned[1] == planned[0]


def test_a_route_is_searched_by_its_index(sqlite_database: Database) -> None:
    """The last active session of a route is found by the three columns of the route. SQLite only: it has hints."""
    values = {"agent_id": "a", "sender_id": "s", "channel_id": "c", "route": "r"}
    for make in (statements.last_active, statements.give, statements.release_earlier):
        for has_sender, has_channel in product((True, False), repeat=2):
            plan = plan_of(sqlite_database, make(has_sender=has_sender, has_channel=has_channel), **values)
            assert any("(agent_id=? AND sender_id=? AND channel_id=?)" in step for step in plan), plan
            assert not any("active" in step for step in plan), plan


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
