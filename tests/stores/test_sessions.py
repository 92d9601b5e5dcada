"""The stores of agents and sessions."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle, permutations, product
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import update

from homeagent import (
    Agent,
    AgentCreate,
    AgentSession,
    AgentSessionCreate,
    AgentSessionPublic,
    AgentSessionUpdate,
    AgentUpdate,
    Database,
    errors,
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


def test_create_returns_what_is_stored(database: Database) -> None:
    """`create` stores every field, and the creation time comes from the clock."""
    config = {"z": [1, -0.0, 2**70, "é\0"], "a": None}
    made = database.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=config))
    with database.unit_of_work(read_only=True) as unit:
        found = unit.agents.get("ada")
        assert unit.agents.find_by_id("ada") == found
    assert made == found == Agent(id="ada", name="Ada", workspace_path="/srv/ada", created_at=START, config=config)
    assert isinstance(found.config, dict)
    assert list(found.config) == ["z", "a"]


class Renaming(AgentUpdate):
    """An application's request with a field of its own."""

    reason: str


def test_update_changes_only_what_was_given(database: Database) -> None:
    """`update` keeps fields that are not given, empties a config of None, and ignores fields of a subclass."""
    database.agents.create(AgentCreate(id="ada", name="Ada", workspace_path="/srv/ada", config=[1]))
    for changes, expected in (
        (AgentUpdate(name="Ada II"), ("Ada II", "/srv/ada", [1])),
        (AgentUpdate(workspace_path="/mnt/ada", config=None), ("Ada II", "/mnt/ada", None)),
        (AgentUpdate(), ("Ada II", "/mnt/ada", None)),
        (Renaming(name="Countess", reason="title"), ("Countess", "/mnt/ada", None)),
        (Renaming(reason="none"), ("Countess", "/mnt/ada", None)),
    ):
        updated = database.agents.update("ada", changes)
        assert (updated.name, updated.workspace_path, updated.config) == expected
        assert database.agents.get("ada") == updated


def test_list_is_ordered_by_bytes_and_paged(database: Database) -> None:
    """Pages are sorted by UTF-8 bytes on both engines, and a row added before the cursor does not shift a page."""
    ids = ["a", "B", "é", "Z", "aa", "a-b", "a_b", "ß", "日本", "😀", "\uffee", "0"]
    for agent_id in ids:
        add_agent(database, agent_id)
    page = database.agents.list(limit=5)
    found = [*page]
    add_agent(database, "!")
    while page:
        page = database.agents.list(limit=5, after=page[-1].id)
        found += page
    assert [agent.id for agent in found] == sorted(ids, key=str.encode)


# Sessions


def test_move_gives_the_old_route(database: Database, clock: FakeClock) -> None:
    """A moved session holds the new route, and the last active session that remains takes the old route."""
    add_agent(database)
    for session_id in ("s1", "s2", "s3"):
        database.sessions.create(AgentSessionCreate(session_id=session_id, agent_id="ada", channel_id="group"))
        clock.advance(SECOND)
    database.sessions.touch("s2")
    moved = database.sessions.move("s1", channel_id="supergroup")
    assert (moved.agent_id, moved.sender_id, moved.channel_id) == ("ada", None, "supergroup")
    assert {row.session_id for row in database.sessions.list() if row.route_key is not None} == {"s1", "s2"}
    assert database.sessions.move("s2", sender_id="ann", channel_id=None).sender_id == "ann"
    assert all(row.route_key is not None for row in database.sessions.list())
    assert only_sound(database)


def test_a_new_holder_keeps_the_old_session_equal(database: Database) -> None:
    """If a session loses its route, the session stays equal to its row, and differs from other sessions and types."""
    add_agent(database)
    old = database.sessions.resolve(agent_id="ada")
    new = database.sessions.start(agent_id="ada")
    assert old in database.sessions.list()
    assert database.sessions.get(old.session_id) == old != new
    assert old != old.model_copy(update={"metadata_": 1})
    assert old != AgentSessionPublic.model_validate(old)


def test_metadata(database: Database) -> None:
    """`update` sets the metadata and no time, a reply shows the metadata, and too long metadata are refused."""
    add_agent(database)
    given = {"title": "Küche", "tokens": [1, -0.0], "none": None}
    made = database.sessions.create(AgentSessionCreate(session_id="s1", agent_id="ada", metadata=given))
    changed = database.sessions.update("s1", AgentSessionUpdate(metadata={"title": "Bad"}))
    assert changed == made.model_copy(update={"metadata_": {"title": "Bad"}})
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
            unit.session.get_one(AgentSession, session_id).sender_id = sender
        unit.session.flush()
        assert unit.sessions.resolve(agent_id="ada").session_id == bob
        times = {"created_at": START, "last_active_at": START}
        unit.session.add(AgentSession(session_id="new", agent_id="ada", sender_id="eve", route_key="odd", **times))
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
    with pytest.raises(errors.ReadOnlyError), database.unit_of_work(read_only=True) as unit:
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
    """If sessions are added between two pages, the pages neither repeat nor skip an earlier session."""
    add_agent(database)
    clock.advance(SECOND)
    assert database.sessions.index(rows(30)) == 30
    page = database.sessions.list(agent_id="ada", limit=7)
    found = [row.session_id for row in page]
    while page:
        clock.advance(SECOND)
        database.sessions.create(AgentSessionCreate(agent_id="ada", sender_id="s"))
        page = database.sessions.list(agent_id="ada", limit=7, after=page[-1])
        found += [row.session_id for row in page]
    assert found == sorted((row.session_id for row in rows(30)), reverse=True)


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
            names = {"limit", *given.split(), *(("after_active", "after_id") if after else ())}
            compiled = statements.page_of(frozenset(names)).compiled(connection.dialect, read_only=True)
            explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
            bound = compiled.bind({name: values[name] for name in names})
            rows = raw.execute(f"{explain} {compiled.sql}", bound).fetchall()
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


def test_index_gives_the_routes_of_existing_sessions(database: Database, clock: FakeClock) -> None:
    """`index` gives an existing session its stored route, if the route is free or the transcript names another."""
    add_agent(database)
    clock.advance(minutes=1)

    def index(name: str, sender: str, active: int) -> None:
        times = {"created_at": START, "last_active_at": START + active * SECOND}
        database.sessions.index([AgentSession(session_id=name, agent_id="ada", sender_id=sender, **times)])

    index("a", "s", 1)
    index("b", "s", 5)
    index("a", "earlier", 9)
    assert database.sessions.resolve(agent_id="ada", sender_id="s").session_id == "a"
    database.sessions.delete("a")
    index("b", "s", 9)
    database.sessions.create(AgentSessionCreate(agent_id="ada", sender_id="s"))  # would take a free route
    assert database.sessions.resolve(agent_id="ada", sender_id="s").session_id == "b"


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
    """A wrong item is named by its number, an absent agent by its number and id, and no row is written."""
    add_agent(database)
    before = dump(database)
    with pytest.raises(errors.InvalidArgumentError, match="number 1003 "):
        database.sessions.index([*rows(1002), "no session"])  # type: ignore[list-item]
    with pytest.raises(errors.AgentNotFoundError, match="number 2: no agent 'nobody'") as caught:
        database.sessions.index([*rows(1), *rows(1, agent_id="nobody")])
    assert caught.value.agent_id == "nobody"
    assert dump(database) == before


def test_delete_deletes_only_sessions_of_the_agent(database: Database) -> None:
    """With `delete_sessions`, `agents.delete` deletes the agent's sessions, but no session of another agent."""
    add_agent(database)
    add_agent(database, "bob")
    for session_id, agent_id in (("s1", "ada"), ("s2", "ada"), ("other", "bob")):
        database.sessions.create(AgentSessionCreate(session_id=session_id, agent_id=agent_id))
    assert database.agents.delete("ada", delete_sessions=True) is True
    assert [session.session_id for session in database.sessions.list()] == ["other"]
    assert [agent.id for agent in database.agents.list()] == ["bob"]
