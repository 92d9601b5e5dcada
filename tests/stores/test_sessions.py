"""The index of sessions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle, permutations, product
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from homeagent import AgentSession, AgentSessionCreate, AgentSessionPublic, AgentSessionUpdate, Database, errors
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


def test_resolve_reads_without_the_write_lock(database: Database) -> None:
    """If a session holds the route, `database.sessions.resolve` begins no write unit."""
    add_agent(database)
    first = database.sessions.start(agent_id="ada", sender_id="s")
    with database.unit_of_work():  # a write in the same thread would raise UnitStateError
        assert database.sessions.resolve(agent_id="ada", sender_id="s") == first
        with pytest.raises(errors.UnitStateError):
            database.sessions.resolve(agent_id="ada", sender_id="another")


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
    assert changed == database.sessions.update("s1", AgentSessionUpdate()) == database.sessions.find_by_id("s1")
    assert AgentSessionPublic.model_validate(changed).model_dump()["metadata"] == {"title": "Bad"}
    assert database.sessions.update("s1", AgentSessionUpdate(metadata=None)).metadata_ is None
    for changes in (AgentSessionUpdate(), AgentSessionUpdate(metadata=1)):
        with pytest.raises(errors.SessionNotFoundError):
            database.sessions.update("s3", changes)
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


def test_pages_are_stable(database: Database, clock: FakeClock) -> None:
    """With equal timestamps and rows added meanwhile, pages neither repeat nor skip an earlier row."""
    add_agent(database)
    chance = random.Random(7)
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
    assert database.sessions.index(rows) == 60
    expected = sorted(rows, key=lambda row: (row.last_active_at, row.session_id), reverse=True)
    for sender in (None, "x"):
        page = database.sessions.list(agent_id="ada", sender_id=sender, limit=7)
        found = [*page]
        while page:
            clock.advance(SECOND * 10)
            database.sessions.create(AgentSessionCreate(agent_id="ada", sender_id="x"))
            page = database.sessions.list(agent_id="ada", sender_id=sender, limit=7, after=page[-1])
            found += page
        ids = [row.session_id for row in found]
        assert [name for name in ids if name in {row.session_id for row in rows}] == [
            row.session_id for row in expected if sender in (None, row.sender_id)
        ]
        assert len(ids) == len(set(ids))


def test_pages_come_from_an_index(database: Database, engine_name: str) -> None:
    """Each page is read along an index, without a sort and without a full table scan."""
    is_sqlite = engine_name == "sqlite"
    values = {"agent_id": "a", "sender_id": "s", "channel_id": "c", "limit": 50, "after_active": START, "after_id": "s"}
    with database.unit_of_work(read_only=True) as unit:
        connection = unit.session.connection()
        raw: Any = connection.connection.driver_connection
        if not is_sqlite:
            # PostgreSQL would scan and sort an empty table. Make both expensive, so that the plan shows whether an
            # index serves.
            for way in ("seqscan", "bitmapscan", "sort", "incremental_sort"):
                raw.execute(f"SET LOCAL enable_{way} = off")
        for given, after in product(("", "agent_id", "sender_id", "channel_id"), (False, True)):
            names = {*given.split(), *(("after_active", "after_id") if after else ())}
            compiled = statements.page_of(frozenset(names)).compiled(connection.dialect, read_only=True)
            explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
            rows = raw.execute(f"{explain} {compiled.sql}", compiled.bind(values)).fetchall()
            plan = "\n".join(str(row[-1]) for row in rows)
            assert ("TEMP B-TREE" if is_sqlite else "Sort") not in plan
            assert ("USING INDEX" if is_sqlite else "Index Scan Backward") in plan
            if given or after:
                assert ("SCAN" not in plan) if is_sqlite else ("Index Cond" in plan)


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


def test_the_last_active_session_gets_the_route(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the order of the sessions and of the batches, `index` gives the route to the last active session."""
    for agent_id in ("ada", "bob"):
        add_agent(database, agent_id)
    monkeypatch.setattr(module, "_INDEX_BATCH", 2)
    # An earlier line of a transcript comes after a later line for "b". The session "e" was begun later than "b".
    activity = [("a", 1, 1), ("b", 2, 7), ("b", 2, 3), ("c", 3, 3), ("d", 4, 6), ("e", 5, 7)]
    for order, route in zip(list(permutations(activity))[::40], cycle(ROUTES), strict=False):
        with database.unit_of_work() as unit:
            before = unit.sessions.create(AgentSessionCreate(agent_id="ada", **route))
            unit.session.execute(
                update(AgentSession).values(created_at=START - 60 * SECOND, last_active_at=START - 55 * SECOND)
            )
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


def test_a_route_is_searched_by_its_index(sqlite_database: Database) -> None:
    """The last active session of a route is found by the three columns of the route. SQLite only: it has hints."""
    values = {"agent_id": "a", "sender_id": "s", "channel_id": "c", "route": "r"}
    for make in (statements.last_active, statements.give, statements.release_earlier):
        for given in (
            {"agent_id", *more} for more in ((), ("sender_id",), ("channel_id",), ("sender_id", "channel_id"))
        ):
            plan = plan_of(sqlite_database, make(frozenset(given)), **values)
            assert any("(agent_id=? AND sender_id=? AND channel_id=?)" in step for step in plan), plan
            assert not any("active" in step for step in plan), plan


def test_index_names_the_wrong_item(database: Database) -> None:
    """An item that is not a session is named by its number, an absent agent by its id, and no row is written."""
    add_agent(database)
    before = dump(database)
    with pytest.raises(errors.InvalidArgumentError, match="number 1003 "):
        database.sessions.index([*rows(1002), "no session"])  # type: ignore[list-item]
    with pytest.raises(errors.AgentNotFoundError) as caught:
        database.sessions.index([*rows(1), *rows(1, agent_id="nobody")])
    assert caught.value.agent_id == "nobody"
    assert dump(database) == before
