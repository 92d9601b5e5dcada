"""The DB-API module over apsw and SQLAlchemy's dialect for it: result codes, cursors, transactions, bad values."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from homeagent import Database, errors
from homeagent.engine.driver_errors import sqlite_code_name, sqlite_error
from homeagent.engine.sqlite import dialect
from homeagent.engine.sqlite.dialect import DRIVER_NAME, Connection, StatementCursor, connect
from tests.conftest import add_agent

SCHEMA = """
    CREATE TABLE room (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, CONSTRAINT ck_name CHECK (name <> 'bad'));
    CREATE TABLE lamp (id TEXT PRIMARY KEY, room REFERENCES room);
    INSERT INTO room VALUES (1, 'hall'), (2, 'attic');
    INSERT INTO lamp VALUES ('a', 1);
"""

COPIES = """
    CREATE TABLE other (id);
    CREATE TRIGGER copies AFTER UPDATE ON room BEGIN INSERT INTO other VALUES (1), (2); END;
"""
"""A trigger whose own changes must not be counted as those of the statement."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database in rollback mode with two tables and a few rows."""
    path = tmp_path / "dialect.db"
    raw = connect(str(path))
    raw.execute(SCHEMA)
    raw.close()
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[sa.Engine]:
    """SQLAlchemy's engine on that database; statements do not wait for a lock."""
    engine = sa.create_engine(f"{DRIVER_NAME}:///{path}", poolclass=NullPool, connect_args={"timeout": 0})
    yield engine
    engine.dispose()


@pytest.fixture
def raw(path: Path) -> Iterator[Connection]:
    raw = connect(str(path), timeout=0)
    yield raw
    raw.close()


def driver_connection(connection: sa.Connection) -> Connection:
    found: Any = connection.connection.driver_connection
    return found  # type: ignore[no-any-return]


ERRORS: list[tuple[type[exc.DBAPIError], type[errors.HomeAgentError], str]] = [
    (exc.OperationalError, errors.TransientError, "BUSY BUSY_SNAPSHOT LOCKED PROTOCOL"),
    (exc.OperationalError, errors.DiskFullError, "FULL"),
    (exc.OperationalError, errors.ReadOnlyError, "READONLY READONLY_DIRECTORY PERM"),
    (exc.OperationalError, errors.DatabaseMovedError, "READONLY_DBMOVED"),
    (exc.OperationalError, errors.DatabaseIOError, "IOERR IOERR_READ IOERR_WRITE IOERR_FSYNC IOERR_SHMSIZE"),
    (exc.OperationalError, errors.CorruptDatabaseError, "IOERR_SHORT_READ IOERR_CORRUPTFS"),
    (exc.DatabaseError, errors.CorruptDatabaseError, "CORRUPT CORRUPT_INDEX NOTADB"),
    (exc.OperationalError, errors.InsecureFileError, "CANTOPEN_SYMLINK"),
    (exc.DataError, errors.InvalidArgumentError, "TOOBIG"),
    (exc.OperationalError, errors.DatabaseError, "ERROR CANTOPEN IOERR_NOMEM NOMEM INTERRUPT AUTH ABORT_ROLLBACK"),
    (exc.IntegrityError, errors.DatabaseError, "MISMATCH"),
    (exc.ProgrammingError, errors.DatabaseError, "MISUSE"),
    (exc.IntegrityError, errors.ConflictError, "CONSTRAINT_UNIQUE CONSTRAINT_CHECK CONSTRAINT_FOREIGNKEY"),
    (exc.IntegrityError, errors.ConflictError, "CONSTRAINT_ROWID CONSTRAINT_DATATYPE CONSTRAINT_TRIGGER"),
]


@pytest.mark.parametrize(("theirs", "ours", "names"), ERRORS)
def test_result_code_decides_both_errors(
    theirs: type[exc.DBAPIError], ours: type[errors.HomeAgentError], names: str
) -> None:
    """SQLite's result code decides the class that SQLAlchemy raises and the class that homeagent raises.

    Homeagent's error names the code, and does not contain the message of the driver.
    """
    for name in names.split():
        error = apsw.exception_for(getattr(apsw, f"SQLITE_{name}"))
        error.args = ("the-bound-parameter",)
        assert type(as_sqlalchemy_raises(error)) is theirs, name
        assert sqlite_code_name(error) == f"SQLITE_{name}"
        assert type(sqlite_error(error)) is ours, name
        assert f"[SQLITE_{name}]" in str(sqlite_error(error))
        assert "the-bound-parameter" not in repr(sqlite_error(error))


def codes() -> list[int]:
    """Return all result codes that are errors, extended codes included."""
    found = {**apsw.mapping_result_codes, **apsw.mapping_extended_result_codes}
    # The other codes report a row or the end, or are for the error log only.
    states = (apsw.SQLITE_OK, apsw.SQLITE_ROW, apsw.SQLITE_DONE, apsw.SQLITE_NOTICE, apsw.SQLITE_WARNING)
    return sorted(code for code in found if isinstance(code, int) and code & 0xFF not in states)


def as_sqlalchemy_raises(error: Exception) -> BaseException:
    return exc.DBAPIError.instance("SELECT 1", None, error, apsw.Error, dialect=dialect.Dialect())


def test_every_error_is_translated() -> None:
    """Each result code and each exception class of apsw becomes an error of SQLAlchemy and of homeagent."""
    found = [apsw.exception_for(code) for code in codes()]
    for error in found:
        assert f"[{sqlite_code_name(error)}]" in str(sqlite_error(error))
        assert sqlite_code_name(error) != "SQLITE_ERROR" or error.extendedresult == apsw.SQLITE_ERROR
    found += [kind("x") for kind in vars(apsw).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(found) > 120
    for error in found:
        assert isinstance(error, dialect.DRIVER_ERRORS)
        assert isinstance(as_sqlalchemy_raises(error), exc.DatabaseError)
        assert isinstance(sqlite_error(error), errors.HomeAgentError)


@pytest.mark.parametrize(
    ("statement", "values", "kind", "ours"),
    [
        ("SELECT CAST(x'ff' AS TEXT)", (), UnicodeDecodeError, errors.CorruptDatabaseError),
        ("SELECT ?", ("key \ud800",), UnicodeEncodeError, errors.InvalidArgumentError),
        ("SELECT 'key \ud800'", (), UnicodeEncodeError, errors.InvalidArgumentError),
        ("SELECT ?", (2**63,), OverflowError, errors.InvalidArgumentError),
        ("SELECT ?", (-(2**63) - 1,), OverflowError, errors.InvalidArgumentError),
        ("SELECT ?", (object(),), apsw.BindingsError, errors.DatabaseError),
        ("SELECT ?", (), apsw.BindingsError, errors.DatabaseError),
        ("SELECT ?", (1, 2), apsw.BindingsError, errors.DatabaseError),
    ],
    ids=["undecodable", "surrogate", "surrogate in SQL", "too great", "too small", "type", "too few", "too many"],
)
def test_bad_value(
    raw: Connection, sqlite_database: Database, statement: str, values: Any, kind: type[Exception], ours: type
) -> None:
    """If SQLite cannot store a value or Python cannot read one, the driver and a unit raise their own errors."""
    for cursor in (raw.cursor(), raw.statement_cursor()):
        with pytest.raises(dialect.DRIVER_ERRORS) as raised:
            cursor.execute(statement, values).fetchall()
        assert type(raised.value) is kind
        assert type(sqlite_error(raised.value)) is ours
    with sqlite_database.unit_of_work(read_only=True) as unit, pytest.raises(ours) as told:
        unit.session.connection().exec_driver_sql(statement, values).all()
    assert type(told.value) is ours
    assert "key" not in str(told.value)
    # The error left no state behind.
    assert raw.cursor().execute("SELECT count(*) FROM room").fetchall() == [(2,)]


@pytest.mark.parametrize("statement", ["SELECT ?", "SELECT name FROM room", "SELECT 1; SELECT 2"])
def test_close_ends_unfinished_statements(path: Path, statement: str) -> None:
    """A close ends the statements of all cursors: statements with a refused value, unread rows or unread statements."""
    raw = connect(str(path))
    for cursor in (raw.cursor(), raw.statement_cursor()):
        with contextlib.suppress(UnicodeEncodeError):
            cursor.execute(statement, ["\ud800"] if "?" in statement else None)
    raw.close()
    with pytest.raises(apsw.CursorClosedError):
        cursor.fetchall()


def test_closed_connection_or_cursor(path: Path) -> None:
    """A closed connection or cursor raises ProgrammingError in SQLAlchemy and DatabaseClosedError in homeagent."""
    raw = connect(str(path))
    cursor, unused = raw.cursor(), raw.cursor()
    cursor.close()
    with pytest.raises(apsw.CursorClosedError) as closed_cursor:
        cursor.execute("SELECT 1")
    raw.close()
    raw.close()
    with pytest.raises(apsw.ConnectionClosedError) as closed_connection:
        raw.execute("SELECT 1")
    with pytest.raises(apsw.Error) as cursor_of_closed:
        unused.execute("SELECT 1")
    for raised in (closed_cursor, closed_connection, cursor_of_closed):
        assert type(as_sqlalchemy_raises(raised.value)) is exc.ProgrammingError
        assert type(sqlite_error(raised.value)) is errors.DatabaseClosedError


def test_rows_are_fetched_in_parts(raw: Connection) -> None:
    """`fetchone`, `fetchmany` and `fetchall` continue after the previous row; `fetchmany` obeys `arraysize`."""
    cursor = raw.cursor()
    cursor.execute("SELECT value FROM json_each('[1,2,3,4,5,6]')")
    assert cursor.fetchone() == (1,)
    assert cursor.fetchmany() == [(2,)]
    cursor.arraysize = 2
    assert cursor.fetchmany() == [(3,), (4,)]
    assert cursor.fetchmany(0) == []
    assert cursor.fetchmany(1) == [(5,)]
    assert cursor.fetchmany(9) == [(6,)]
    assert (cursor.fetchone(), cursor.fetchmany(), cursor.fetchall()) == (None, [], [])


def test_changed_rows_are_counted(raw: Connection) -> None:
    """`rowcount` counts the rows that the statement changed, not rows of triggers or of the previous statement."""
    cursor = raw.cursor()
    cursor.execute("UPDATE room SET name = name || '!'")
    assert cursor.rowcount == 2
    cursor.execute("CREATE TABLE other (id)")
    assert cursor.rowcount == 0
    cursor.execute("SELECT * FROM room").fetchall()
    assert cursor.rowcount == -1
    cursor.execute("DROP TABLE other")
    cursor.execute(COPIES)
    cursor.execute("UPDATE room SET name = 'x' WHERE id = 1")
    assert cursor.rowcount == 1
    cursor.execute("UPDATE room SET name = 'x' WHERE id = 9")
    assert cursor.rowcount == 0
    cursor.execute("DELETE FROM lamp RETURNING id").fetchall()
    assert cursor.rowcount == 1


@pytest.mark.parametrize("kind", [dialect.Cursor, StatementCursor])
def test_many_statements_count_together(raw: Connection, kind: type[Any]) -> None:
    """After `executemany`, `rowcount` is the sum over all sets of bindings, without the rows of triggers."""
    raw.execute(COPIES)
    cursor = kind(raw)
    cursor.executemany("UPDATE room SET name = ? WHERE id = ?", [("a", 1), ("b", 2), ("c", 9)])
    assert cursor.rowcount == 2
    cursor.executemany("UPDATE room SET name = ? WHERE id = ?", [])
    assert cursor.rowcount == 0
    cursor.execute("DELETE FROM room WHERE id = 1")
    assert cursor.rowcount == 1


def test_orm_updates_many_rows_with_a_trigger(engine: sa.Engine, raw: Connection) -> None:
    """If a trigger changes rows too, the ORM's comparison with `rowcount` raises no StaleDataError."""

    class Base(DeclarativeBase):
        pass

    class Room(Base):
        __tablename__ = "room"
        id: Mapped[int] = mapped_column(primary_key=True)
        name: Mapped[str]

    raw.execute(COPIES)
    with Session(engine) as session:
        for room in session.scalars(sa.select(Room)):
            room.name += "!"
        session.commit()
    assert raw.execute("SELECT name FROM room ORDER BY id").fetchall() == [("hall!",), ("attic!",)]


def test_regexp_match(engine: sa.Engine) -> None:
    """SQLAlchemy's `regexp_match` searches, NULL stays NULL, and a bad pattern raises OperationalError."""
    name: sa.ColumnClause[str] = sa.column("name", sa.String)
    with engine.connect() as connection:
        matching = sa.select(name).select_from(sa.table("room", name)).where(name.regexp_match("^ha.l$"))
        assert connection.scalars(matching).all() == ["hall"]
        assert connection.scalar(sa.select(sa.literal("hall").regexp_match("al"))) == 1
        assert connection.scalar(sa.select(sa.null().regexp_match("al"))) is None
        with pytest.raises(exc.OperationalError, match="regexp"):
            connection.scalar(sa.select(sa.literal("hall").regexp_match("(")))
        with pytest.raises(exc.OperationalError, match="regexp"):
            connection.exec_driver_sql("SELECT 5 REGEXP '5'").all()


def test_rollback_undoes_the_whole_transaction(engine: sa.Engine, raw: Connection) -> None:
    """SQLAlchemy's first statement begins a transaction, and a rollback undoes schema changes too."""
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE other (id)")
        connection.exec_driver_sql("INSERT INTO other VALUES (1)")
        assert driver_connection(connection).in_transaction
        connection.rollback()
        assert not driver_connection(connection).in_transaction
    assert raw.execute("SELECT name FROM sqlite_master WHERE name = 'other'").fetchall() == []
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE other (id)")
        with connection.begin_nested() as savepoint:
            connection.exec_driver_sql("INSERT INTO other VALUES (1)")
            savepoint.rollback()
    assert raw.execute("SELECT count(*) FROM other").fetchall() == [(0,)]


def test_unfinished_statement_does_not_block_close(sqlite_database: Database, tmp_path: Path) -> None:
    """An unfinished statement that is still referenced blocks neither a backup nor `close`, which leaves no lock."""
    add_agent(sqlite_database)
    path = sqlite_database.status().location
    kept = []
    for _ in range(3):
        with sqlite_database.unit_of_work(read_only=True) as unit:
            result = unit.session.connection().exec_driver_sql("SELECT value FROM json_each('[1,2,3]')")
            assert result.fetchone() == (1,)
            kept.append(result)
    del result
    kept.pop()
    gc.collect()
    add_agent(sqlite_database, "later")
    sqlite_database.backup(tmp_path / "backup.db")
    closing = threading.Thread(target=sqlite_database.close)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    with contextlib.closing(connect(path, timeout=0)) as other:  # no lock is left
        other.execute("PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; COMMIT")
    with Database.open(tmp_path / "backup.db") as copy:
        assert {agent.id for agent in copy.agents.list()} == {"ada", "later"}


def test_default_pool(path: Path) -> None:
    """An in-memory database stays the same for a thread, and a URI does not create a file."""
    memory = sa.create_engine(f"{DRIVER_NAME}://")
    with memory.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE here (id)")
    with memory.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM here").scalar_one() == 0
    memory.dispose()
    absent = path.with_name("absent.db")
    with pytest.raises(exc.OperationalError):
        sa.create_engine(f"{DRIVER_NAME}:///file:{absent}?uri=true").connect()
    assert not absent.exists()
    by_uri = sa.create_engine(f"{DRIVER_NAME}:///file:{path}?uri=true", poolclass=NullPool)
    with by_uri.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM room").scalar_one() == 2
        assert connection.dialect.server_version_info == dialect.sqlite_version_info
