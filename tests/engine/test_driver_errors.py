"""Engine errors: public classes that name a statement or a table. Programming errors pass through unchanged."""

from __future__ import annotations

import pkgutil
import traceback
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
from pydantic import TypeAdapter
from sqlalchemy import (
    JSON,
    Boolean,
    Date,
    Dialect,
    Enum,
    Float,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Uuid,
    bindparam,
    cast,
    event,
    literal_column,
    select,
    text,
)
from sqlalchemy.types import TypeDecorator, TypeEngine

import homeagent
from homeagent import Agent, AgentCreate, Database, DevicePair, Role, Statement, UnitOfWork, errors
from tests.conftest import write_past_checks

SECRET = "a-value-that-must-not-be-shown"


def add(unit: UnitOfWork) -> None:
    """Create an agent whose name is a secret."""
    unit.agents.create(AgentCreate(id="ada", name=SECRET, workspace_path="/srv"))


def test_failed_statement_is_named(target: str, database: Database) -> None:
    """If the engine refuses homeagent's statement, the error has its SQL text and the missing object, but no value."""
    write_past_checks(target, "ALTER TABLE agents RENAME COLUMN workspace_path TO folder")
    with pytest.raises(errors.DatabaseError, match=r"workspace_path.*the statement was: SELECT agents.id") as caught:
        database.run(lambda unit: unit.agents.list(), read_only=True)
    assert type(caught.value) is errors.DatabaseError
    with pytest.raises(errors.DatabaseError, match="the statement was: INSERT INTO agents") as caught:
        database.run(add)
    assert SECRET not in str(caught.value)


def test_a_lost_table_needs_a_backup(target: str, database: Database) -> None:
    """If a table of homeagent was deleted, the error names the table and the backup, not a revision."""
    write_past_checks(target, "DROP TABLE nonces")
    with pytest.raises(errors.DatabaseError, match=r"nonces.*restore the newest good backup") as caught:
        database.nonces.find("lamp", "n")
    assert "revision" not in str(caught.value)


def test_application_statement_is_not_shown(database: Database) -> None:
    """If an application's statement fails, the error names the missing table and omits the SQL text with its values."""
    with pytest.raises(errors.DatabaseError, match="nowhere") as caught, database.unit_of_work() as unit:
        unit.session.connection().execute(text(f"SELECT '{SECRET}' FROM nowhere"))
    assert SECRET not in str(caught.value)
    with pytest.raises(errors.DatabaseError) as caught, database.unit_of_work() as unit:
        unit.session.connection().execute(text(f"SELECT id FROM agents '{SECRET}' '"))
    assert SECRET not in str(caught.value)


NAMED = {
    "CREATE TABLE devices (a TEXT)": 'devices"? already exists',
    "CREATE INDEX idx_nonces_expires ON devices (role)": 'idx_nonces_expires"? already exists',
    "ALTER TABLE agents ADD COLUMN name TEXT": r'duplicate column name: name|"name" of relation "agents" already',
    'SELECT * FROM "my notes-2"': "my notes-2",
    "SELECT nowhere('{secret}')": "nowhere",
    "DROP TABLE idx": "idx",
    "SELEC '{secret}'": "syntax error",
    "CREATE TYPE color AS ENUM ('red'); SELECT CAST('{secret}' AS color)": "syntax error|value for enum color ",
    "DO $$ BEGIN RAISE undefined_table USING MESSAGE = '{secret}'; END $$": "syntax error|SQLSTATE 42P01",
}

# Statements of PostgreSQL that use a value as a name.
VALUES_AS_NAMES = (
    "CAST(:value AS regtype)", "CAST(:value AS regrole)", "CAST(:value AS regconfig)", "current_setting(:value)",
    "has_schema_privilege(:value, 'USAGE')", "own_call(:value)",
)  # fmt: skip


@pytest.mark.parametrize("statement", NAMED)
def test_object_in_an_application_statement_is_named(database: Database, statement: str) -> None:
    """If the engine refuses an application's statement, the error names the object, and shows no value."""
    filled = statement.replace("{secret}", SECRET)
    with pytest.raises(errors.DatabaseError, match=NAMED[statement]) as caught, database.unit_of_work() as unit:
        unit.session.connection().execute(text(filled))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("engine_name", ["postgresql"])
@pytest.mark.parametrize("expression", VALUES_AS_NAMES)
def test_value_that_is_used_as_a_name_is_not_shown(database: Database, expression: str) -> None:
    """If a statement uses a bound value as the name of an object, the error does not show the value."""
    with pytest.raises(errors.DatabaseError) as caught, database.unit_of_work() as unit:
        connection = unit.session.connection()
        connection.execute(
            text(
                "CREATE FUNCTION own_call(name text) RETURNS void LANGUAGE plpgsql"
                " AS $$ BEGIN EXECUTE 'SELECT ' || name || '()'; END $$"
            )
        )
        connection.execute(text(f"SELECT {expression}"), {"value": SECRET})
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("engine_name", ["sqlite"])
def test_searched_word_is_not_shown(database: Database) -> None:
    """If FTS5 takes a word of the searched text for a column, the error does not show the word."""
    word = "pass" + "word"  # a traceback shows the lines of this test
    search = text("SELECT words FROM found WHERE found MATCH :words")
    with pytest.raises(errors.DatabaseError) as caught, database.unit_of_work() as unit:
        unit.session.connection().execute(text("CREATE VIRTUAL TABLE found USING fts5 (words)"))
        unit.session.connection().execute(search, {"words": "-".join(["my", word])})
    assert word not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("engine_name", ["postgresql"])
@pytest.mark.parametrize("value", ["a\0b", "\ud800"])
def test_value_refused_by_driver_is_argument_error(database: Database, value: str) -> None:
    """If Psycopg refuses a text with a NUL or a surrogate, the error says so without the value, and is not retried."""
    tries: list[int] = []

    def ask(unit: UnitOfWork) -> None:
        tries.append(1)
        unit.session.connection().execute(text("SELECT :value"), {"value": value})

    with pytest.raises(errors.InvalidArgumentError) as caught:
        database.run(ask)
    cause = caught.value.__cause__
    assert cause is not None
    assert value not in (*cause.args, getattr(cause, "object", None))
    assert tries == [1]


@pytest.mark.parametrize("by", ["session", "read connection"])
def test_a_refused_value_is_not_its_own_cause(database: Database, by: str) -> None:
    """If a column type refuses a value, the chain of causes ends."""
    column: Any = Agent.config
    search = select(Agent).where(column == {"key": object()})
    with pytest.raises(errors.InvalidArgumentError, match="plain JSON") as caught:
        if by == "session":
            database.run(lambda unit: unit.session.execute(search))
        else:
            with database.read_connection() as connection:
                connection.execute(search)
    causes: list[BaseException] = [caught.value]
    while (cause := causes[-1].__cause__) is not None:
        assert cause not in causes
        causes.append(cause)


class Validated(TypeDecorator[str]):
    """A column type of an application, whose exception contains the value."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        """Raise Pydantic's ValidationError for a text that is not a number."""
        return str(TypeAdapter(int).validate_python(value))


@pytest.mark.parametrize("by", ["statement", "session", "read connection"])
@pytest.mark.parametrize(
    "kind",
    [
        Boolean(),
        Float(),
        Numeric(),
        Date(),
        Uuid(),
        LargeBinary(),
        Enum("red", name="color", validate_strings=True),
        Validated(),
    ],
)
def test_a_value_of_a_wrong_type_is_not_shown(database: Database, kind: TypeEngine[Any], by: str) -> None:
    """If a column type can't convert a value, the error and its causes do not show the value."""
    search = select(cast(bindparam("value", type_=kind), kind))
    with pytest.raises(errors.HomeAgentError) as caught:
        if by == "statement":
            database.run(lambda unit: unit.one(Statement(search), value=SECRET))
        elif by == "session":
            database.run(lambda unit: unit.session.execute(search, {"value": SECRET}))
        else:
            with database.read_connection() as connection:
                connection.execute(search, {"value": SECRET})
    waiting: list[BaseException | None] = [caught.value]
    while waiting:
        if (error := waiting.pop()) is not None:
            assert SECRET not in f"{error} {vars(error)} {getattr(error, 'obj', None)}"
            waiting += [error.__cause__, error.__context__]


@pytest.mark.parametrize("by", ["statement", "session", "read connection"])
@pytest.mark.parametrize("kind", [Enum("red", name="color"), Numeric(), Uuid(), JSON(), Date(), Interval()])
def test_a_stored_value_of_a_wrong_type_is_not_shown(sqlite_database: Database, kind: TypeEngine[Any], by: str) -> None:
    """If a type of SQLAlchemy can't read a stored value, the error is CorruptDatabaseError without the value.

    SQLite only: PostgreSQL checks the type of each stored value.
    """
    search = select(literal_column(f"'{SECRET}'", kind))
    with pytest.raises(errors.CorruptDatabaseError, match="can't be read") as caught:
        if by == "statement":
            sqlite_database.run(lambda unit: unit.one(Statement(search)))
        elif by == "session":
            sqlite_database.run(lambda unit: unit.session.execute(search).all())
        else:
            with sqlite_database.read_connection() as connection:
                connection.execute(search).all()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


class Interrupted(TypeDecorator[str]):
    """A type whose conversion a signal handler interrupts."""

    impl = String
    cache_ok = True

    def process_result_value(self, value: str | None, dialect: Dialect) -> str:
        raise TimeoutError("the time limit of the task is over")


@pytest.mark.parametrize("by", ["statement", "session"])
def test_signal_handler_during_a_conversion(database: Database, by: str) -> None:
    """An exception of a signal handler during the conversion of a stored value passes unwrapped."""
    search = select(literal_column("'x'", Interrupted()))
    with pytest.raises(TimeoutError, match="time limit"), database.unit_of_work() as unit:
        unit.one(Statement(search)) if by == "statement" else unit.session.execute(search).all()


def test_an_absent_value_is_named(database: Database) -> None:
    """If a statement of the session lacks a value, the error names the parameter, and shows no other value."""
    search = text("SELECT :shown, :absent")
    with pytest.raises(errors.InvalidArgumentError, match="absent") as caught, database.unit_of_work() as unit:
        unit.session.execute(search, {"shown": SECRET})
    assert SECRET not in f"{caught.value} {vars(caught.value)}"


@pytest.mark.parametrize("raised", [KeyError, KeyboardInterrupt])
def test_exception_of_a_listener_passes(database: Database, raised: type[BaseException]) -> None:
    """An interrupt, or an exception of the application's listener, does not become a lost connection or a retry."""
    tries: list[int] = []

    def ask(unit: UnitOfWork) -> None:
        def listen(*_: object) -> None:
            tries.append(1)
            raise raised

        connection = unit.session.connection()
        event.listen(connection, "before_cursor_execute", listen)
        try:
            connection.execute(text("SELECT 1"))
        finally:
            event.remove(connection, "before_cursor_execute", listen)

    with pytest.raises(raised):
        database.run(ask)
    assert tries == [1]
    database.ping()


def test_programming_error_passes(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A TypeError in homeagent's own code passes unwrapped, for one row and for many."""

    def broken(*_: object, **__: object) -> object:
        raise TypeError("a mistake")

    database.pair(DevicePair(id="lamp", role=Role.NODE, metadata={"room": "hall"}))
    monkeypatch.setattr("homeagent.models.types.json_text.from_json", broken)
    for read in (
        lambda: database.devices.get("lamp"),
        lambda: database.run(lambda unit: unit.devices.list()),
        lambda: database.run(lambda unit: unit.session.get(homeagent.Device, "lamp")),
    ):
        with pytest.raises(TypeError, match="a mistake"):
            read()


@pytest.mark.parametrize("engine_name", ["sqlite"])
@pytest.mark.parametrize(("column", "value"), [("metadata", "x'FF'"), ("paired_at", "'then'"), ("paired_at", "x'00'")])
def test_wrong_type_is_corruption(target: str, database: Database, column: str, value: str) -> None:
    """If another program stored a value of a wrong type in SQLite, reading raises `CorruptDatabaseError`."""
    database.pair(DevicePair(id="lamp", role=Role.NODE))
    write_past_checks(target, f"UPDATE devices SET {column} = CAST({value} AS BLOB)")
    with pytest.raises(errors.CorruptDatabaseError):
        database.devices.get("lamp")
    with pytest.raises(errors.CorruptDatabaseError):
        database.run(lambda unit: unit.session.get(homeagent.Device, "lamp"))


def classes(kind: type[BaseException]) -> Iterator[type[BaseException]]:
    """Yield all direct and indirect subclasses of an error."""
    for each in kind.__subclasses__():
        yield each
        yield from classes(each)


def test_every_error_class_is_public() -> None:
    """Each error class can be imported from `homeagent.errors`, so that a client can look up `type(error).__name__`."""
    for module in pkgutil.walk_packages(homeagent.__path__, "homeagent."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    own = [each for each in classes(errors.HomeAgentError) if each.__module__.startswith("homeagent")]
    assert errors.TransientError in own
    assert [each for each in own if each.__name__ not in errors.__all__] == []
