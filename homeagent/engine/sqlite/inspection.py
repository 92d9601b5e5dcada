"""Read a SQLite file without changing the file, its WAL or their modes. The last ordinary connection removes the WAL at
its close. A damaged database could then lose data.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import apsw
from sqlalchemy import create_engine, event
from sqlalchemy.pool import NullPool

from homeagent.clock import monotonic
from homeagent.engine.driver_errors import sqlite_error, translated
from homeagent.engine.files.database_file import look_at, sidecars
from homeagent.engine.sqlite.dialect import DRIVER_ERRORS, DRIVER_NAME
from homeagent.engine.sqlite.dialect import Connection as DriverConnection
from homeagent.engine.sqlite.foreign_access import open_guarded
from homeagent.engine.sqlite.write_ahead_log import has_frames
from homeagent.errors import ReadOnlyError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine import ExceptionContext

# SQLite calls a `Stopwatch` object after this number of bytecode instructions.
_INSTRUCTIONS = 10_000


class Stopwatch:
    """Progress handler that ends a SQLite statement after a time limit. A limit of None means no timeout."""

    def __init__(self, limit: timedelta | None) -> None:
        self._seconds = math.inf if limit is None else limit.total_seconds()
        self.start()

    def start(self) -> None:
        """Restart the clock."""
        self._end = monotonic() + self._seconds

    def __call__(self) -> bool:
        """Return True if the statement has reached the limit. SQLite then ends the statement."""
        return monotonic() > self._end


@contextmanager
def inspect_sqlite(path: Path, *, watch: Stopwatch | None = None, is_closed: bool = False) -> Iterator[Connection]:
    """Open an existing file for reading. All statements see one snapshot. SQLite creates no file except a WAL index.

    If the WAL and its index exist, take SQLite's locks. Another process can then use the file at the same time. Pass
    `is_closed=True` only if no homeagent process has the file open. A homeagent process could add frames to the WAL at
    any time.
    """
    log, index, _ = sidecars(path)
    has_both = look_at(log) is not None and look_at(index) is not None
    if (is_closed or not has_both) and not has_frames(path):
        options = ["immutable=1"]
    elif has_both:
        options = ["readonly_shm=1", ""]
    else:
        options = [""]

    def open_file() -> DriverConnection:
        # https://sqlite.org/wal.html#readonly and https://sqlite.org/c3ref/open.html
        raw = open_guarded(path, f"mode=ro&{options.pop(0)}", timeout=1)
        try:
            raw.set_progress_handler(watch, _INSTRUCTIONS)
            raw.execute("PRAGMA query_only=ON; PRAGMA trusted_schema=OFF; PRAGMA cell_size_check=ON")
        except BaseException:
            raw.close()
            raise
        return raw

    engine = create_engine(f"{DRIVER_NAME}://", creator=open_file, poolclass=NullPool, hide_parameters=True)
    event.listen(engine, "handle_error", _on_error)
    connection: Connection | None = None
    while connection is None:
        try:
            with translated(DRIVER_ERRORS, sqlite_error):
                connection = _begin(engine.connect())
        except ReadOnlyError:
            # During another process's write, SQLite can refuse the option `readonly_shm=1`. Try the next option.
            if not options:
                raise
    with connection:
        yield connection


def _begin(connection: Connection) -> Connection:
    # Begin the transaction only after the engine's connect event. The application's listeners can run PRAGMAs that
    # SQLite refuses in a transaction. The first read takes the snapshot.
    raw: Any = connection.connection.driver_connection
    try:
        raw.execute("BEGIN; SELECT count(*) FROM sqlite_master").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def journal_mode(connection: Connection) -> str:
    """Read the journal mode from a file's header. Without locks, SQLite does not report the mode "wal". Pass a
    connection of `inspect_sqlite()`.
    """
    raw: Any = connection.connection.driver_connection
    # https://sqlite.org/fileformat2.html#file_format_version_numbers
    return "wal" if raw.read("main", 0, 0, 20)[1][18:] == b"\x02\x02" else "delete"


def reaches(raw: Any, tables: Container[str], *, kind: str, name: str, on: str) -> bool:
    """Return True if a trigger writes to one of the tables. For a view, return True if the view reads one of the
    tables. Also return True if SQLite can't compile the trigger or the view. SQLite reports a statement's tables at the
    compilation (https://sqlite.org/c3ref/set_authorizer.html). Pass the names of the tables in lower case. As `on=`,
    pass the trigger's table or the view's name.
    """
    writes = (apsw.SQLITE_INSERT, apsw.SQLITE_UPDATE, apsw.SQLITE_DELETE)
    used: list[tuple[int, str | None]] = []

    def note(action: int, table: str | None, _column: object, _schema: object, by: str | None) -> int:
        if kind == "view" or by == name:
            used.append((action, table))
        return apsw.SQLITE_OK

    raw.set_authorizer(note)
    try:
        for statement in _using(raw, kind, '"' + on.replace('"', '""') + '"'):
            failed = True
            with suppress(apsw.Error), closing(raw.execute(f"EXPLAIN {statement}", can_cache=False)):
                failed = False
            if used:  # only one of the statements fires the trigger
                return failed or any(table in tables for action, table in used if kind == "view" or action in writes)
    finally:
        raw.set_authorizer(None)
    return True


def _using(raw: Any, kind: str, place: str) -> list[str]:
    if kind == "view":
        return [f"SELECT * FROM {place}"]  # noqa: S608  a name, escaped
    # Leave out generated columns, which table_xinfo reports as hidden. An UPDATE can't set generated columns.
    names = [row[1].replace('"', '""') for row in raw.execute(f"PRAGMA table_xinfo({place})") if not row[6]]
    settings = ", ".join(f'"{name}" = "{name}"' for name in names)
    return [f"INSERT INTO {place} DEFAULT VALUES", f"UPDATE {place} SET {settings}", f"DELETE FROM {place}"]  # noqa: S608  escaped


def scratch_sqlite() -> Connection:
    """Open an empty in-memory database. The database exists until the connection is closed."""
    return create_engine(f"{DRIVER_NAME}://", poolclass=NullPool).connect()


def _on_error(context: ExceptionContext) -> None:
    # Do not convert a KeyboardInterrupt, because Ctrl-C must end the doctor.
    if isinstance(context.original_exception, Exception):
        raise sqlite_error(context.original_exception)
