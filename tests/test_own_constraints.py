"""If a constraint of an application's own table refuses a change, the error names the constraint and no value."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text

from homeagent import AgentSessionCreate, Database, IdempotencyScope, Statement, UnitOfWork
from homeagent.errors import ConflictError
from tests.conftest import add_agent, add_device, dump

TABLES = (
    "CREATE TABLE own_tags (id INTEGER NOT NULL, name TEXT NOT NULL, size INTEGER, plain TEXT UNIQUE,"
    " CONSTRAINT pk_own_tags PRIMARY KEY (id), CONSTRAINT uq_own_tags_name UNIQUE (name),"
    " CONSTRAINT ck_own_tags_size CHECK (size > 0))",
    "CREATE UNIQUE INDEX idx_own_tags_size ON own_tags (size)",
    # The column of an expression has no name.
    "CREATE UNIQUE INDEX a_first ON own_tags (name, lower(plain))",
    "CREATE TABLE own_uses (tag INTEGER, CONSTRAINT fk_own_uses_tag FOREIGN KEY (tag) REFERENCES own_tags (id))",
    "CREATE TABLE own_plans (agent TEXT, CONSTRAINT fk_own_plans_agent FOREIGN KEY (agent)"
    " REFERENCES agents (id) DEFERRABLE INITIALLY DEFERRED)",
    "CREATE TABLE own_parts (tag INTEGER, plan TEXT, CONSTRAINT fk_own_parts_tag FOREIGN KEY (tag) REFERENCES own_tags"
    " (id) ON DELETE CASCADE, CONSTRAINT fk_own_parts_plan FOREIGN KEY (plan) REFERENCES agents (id) ON DELETE"
    " RESTRICT)",
    # The text "own_tags." is in the name of a column.
    'CREATE TABLE own_odd ("x own_tags.y" INTEGER, "own_odd.b" INTEGER,'
    ' CONSTRAINT uq_own_odd UNIQUE ("x own_tags.y", "own_odd.b"))',
    "INSERT INTO own_odd VALUES (1, 1)",
    "INSERT INTO own_tags VALUES (1, 'geheim', 1, 'geheim')",
    "INSERT INTO own_uses VALUES (1)",
    "INSERT INTO own_parts VALUES (1, NULL)",
)

# Refused statements, and the table, constraint and kind in the error.
REFUSED = {
    "primary key": ("INSERT INTO own_tags (id, name) VALUES (1, 'n')", "own_tags", "pk_own_tags", "unique"),
    "unique": ("INSERT INTO own_tags (id, name) VALUES (2, 'geheim')", "own_tags", "uq_own_tags_name", "unique"),
    "index": ("INSERT INTO own_tags (id, name, size) VALUES (2, 'n', 1)", "own_tags", "idx_own_tags_size", "unique"),
    "odd names": ("INSERT INTO own_odd VALUES (1, 1)", "own_odd", "uq_own_odd", "unique"),
    "check": ("UPDATE own_tags SET size = -7", "own_tags", "ck_own_tags_size", "check"),
    "not null": ("INSERT INTO own_tags (id) VALUES (2)", "own_tags", "name", "not_null"),
    "child": ("INSERT INTO own_uses VALUES (77)", "own_uses", "fk_own_uses_tag", "foreign_key"),
    "parent": ("DELETE FROM own_tags WHERE id = 1", "own_uses", "fk_own_uses_tag", "foreign_key"),
    "two keys": ("UPDATE own_parts SET plan = 'geheim'", "own_parts", "fk_own_parts_plan", "foreign_key"),
    "deferred": ("INSERT INTO own_plans VALUES ('geheim')", "own_plans", "fk_own_plans_agent", "foreign_key"),
}


@pytest.fixture
def own(database: Database) -> Database:
    with database.unit_of_work() as unit:
        for statement in TABLES:
            unit.session.execute(text(statement))
    return database


def execute(statement: str) -> Callable[[UnitOfWork], None]:
    def work(unit: UnitOfWork) -> None:
        unit.session.execute(text(statement))

    return work


def refused_in_batch(own: Database, work: Callable[[UnitOfWork], object]) -> ConflictError:
    """Run a unit in a batch with units that succeed, and return its error."""

    async def together() -> list[Any]:
        works = [own.arun(work), *(own.arun(lambda unit: None) for _ in range(5))]
        return await asyncio.gather(*works, return_exceptions=True)

    refused, *others = asyncio.run(together())
    assert others == [None] * 5
    assert isinstance(refused, ConflictError)
    return refused


@pytest.mark.parametrize("what", REFUSED)
def test_the_error_names_the_constraint(own: Database, what: str) -> None:
    """In a block, in `run` and in a batch, the error has the table, the constraint and the kind."""
    statement, *expected = REFUSED[what]

    def block() -> None:
        with own.unit_of_work() as unit:
            execute(statement)(unit)

    raised = [refused_in_batch(own, execute(statement))]
    for act in (block, lambda: own.run(execute(statement))):
        with pytest.raises(ConflictError) as caught:
            act()
        raised.append(caught.value)
    for error in raised:
        assert [error.table, error.constraint, error.kind] == expected
        assert all(str(name) in str(error) for name in expected)
        for value in ("geheim", "77", "-7"):
            assert value not in str(error)
        assert error.__cause__ is None or "geheim" not in str(error.__cause__)


def test_a_key_to_an_idempotency_key_is_named(own: Database) -> None:
    """If an own key refers to a stored result, the refused deletion of the device names the own table."""
    add_device(own)
    own.idempotency_keys.insert(IdempotencyScope("lamp", "m", "k"), 1, ttl=timedelta(hours=1))
    with own.unit_of_work() as unit:
        for statement in PARTIAL["devices.delete"][0]:
            unit.session.execute(text(statement))
    with pytest.raises(ConflictError) as caught:
        own.devices.delete("lamp")
    assert (caught.value.table, caught.value.kind) == ("own_orders", "foreign_key")


def test_a_subquery_does_not_name_a_wrong_key(own: Database) -> None:
    """If an UPDATE has a subquery, the error never names a key that did not fail."""
    statement = "UPDATE own_parts SET tag = (SELECT max(id) FROM own_tags WHERE id > 0), plan = 'geheim'"
    with pytest.raises(ConflictError) as caught:
        own.run(execute(statement))
    assert (caught.value.table, caught.value.kind) == ("own_parts", "foreign_key")
    assert caught.value.constraint in (None, "fk_own_parts_plan")


_TAGS = Statement[Any](text("SELECT id FROM own_tags"))
_ADD = Statement[Any](text("INSERT INTO own_tags (id, name) VALUES (:id, :name)"))
_TRIGGER = "CREATE TRIGGER own_refusal BEFORE {} ON sessions BEGIN SELECT RAISE(ABORT, 'no'); END"

# Methods whose last change is refused, and the statements that make the database refuse the change.
PARTIAL: dict[str, tuple[tuple[str, ...], Callable[[UnitOfWork], object]]] = {
    "agents.delete": (
        ("CREATE TABLE own_notes (agent TEXT REFERENCES agents (id))", "INSERT INTO own_notes VALUES ('ada')"),
        lambda unit: unit.agents.delete("ada", delete_sessions=True),
    ),
    "devices.delete": (
        (
            "CREATE TABLE own_orders (device TEXT, method TEXT, key TEXT, FOREIGN KEY (device, method, key)"
            " REFERENCES idempotency_keys (device_id, method, key))",
            "INSERT INTO own_orders SELECT device_id, method, key FROM idempotency_keys",
        ),
        lambda unit: unit.devices.delete("lamp"),
    ),
    "write_many": ((), lambda unit: unit.write_many(_ADD, [{"id": 5, "name": "n"}, {"id": 1, "name": "m"}])),
    "sessions.start": ((_TRIGGER.format("INSERT"),), lambda unit: unit.sessions.start(agent_id="ada")),
    "sessions.move": (
        (_TRIGGER.format("UPDATE").replace("BEGIN", "WHEN new.session_id = 's2' BEGIN"),),
        lambda unit: unit.sessions.move("s1", sender_id="ann"),
    ),
}


@pytest.mark.parametrize("method", PARTIAL)
def test_a_refused_method_changes_no_row(own: Database, engine_name: str, method: str) -> None:
    """If the database refuses the last change of a method, the method's earlier changes are undone too."""
    prepare, call = PARTIAL[method]
    if engine_name == "postgresql" and "TRIGGER" in "".join(prepare):
        pytest.skip("the trigger is written for SQLite")
    add_agent(own)
    add_device(own)
    own.idempotency_keys.insert(IdempotencyScope("lamp", "m", "k"), 1, ttl=timedelta(days=1))
    for session_id in ("s1", "s2"):
        own.sessions.create(AgentSessionCreate(session_id=session_id, agent_id="ada"))
    for statement in prepare:
        own.run(execute(statement))
    before = dump(own), own.run(lambda unit: unit.all(_TAGS))
    with own.unit_of_work() as unit, pytest.raises(ConflictError):
        call(unit)
    assert (dump(own), own.run(lambda unit: unit.all(_TAGS))) == before


def test_a_store_s_statement_names_an_own_constraint(own: Database) -> None:
    """If an own row refers to an agent, the error of `agents.delete` names the constraint, also in a batch."""
    add_agent(own)
    own.run(execute("INSERT INTO own_plans VALUES ('ada')"))
    refused = refused_in_batch(own, lambda unit: unit.agents.delete("ada"))
    assert (refused.table, refused.constraint, refused.kind) == ("own_plans", "fk_own_plans_agent", "foreign_key")
    own.run(execute("DELETE FROM own_plans"))
    own.run(execute("INSERT INTO own_parts VALUES (NULL, 'ada')"))
    refused = refused_in_batch(own, lambda unit: unit.agents.delete("ada"))
    assert (refused.table, refused.constraint, refused.kind) == ("own_parts", "fk_own_parts_plan", "foreign_key")
