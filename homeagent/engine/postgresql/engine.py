"""The PostgreSQL engine: a bounded set of pinned connections, explicit transactions, text compared by bytes.

Behind a pooler nothing relies on the state of a session, so that each transaction may be given another one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import URL, event
from sqlalchemy.pool import NullPool

from homeagent.engine.driver_errors import named, postgresql_error, refused_by, translated
from homeagent.engine.engine import Engine
from homeagent.engine.postgresql.connection import POOLED, PostgreSQLConnection
from homeagent.errors import ConnectionLostError, DatabaseError, HomeAgentError, InvalidArgumentError
from homeagent.frame_locals import clear_locals

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

__all__ = ["POOL_SIZE", "PostgreSQLEngine"]

POOL_SIZE = 10

# So that nobody waits forever for a host that is gone: libpq's own defaults are no limit to connect, two hours until
# the first keepalive, and what the kernel makes of data that nobody acknowledges (some 15 minutes on Linux).
# https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS
_CONNECTING: dict[str, str] = {
    "connect_timeout": "10",  # seconds, for each host
    "keepalives_idle": "30",  # seconds
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",  # milliseconds
    "fallback_application_name": "homeagent",
}
# psycopg writes text in the client's encoding, and reads bytes where that is SQL_ASCII: whatever the URL, a role or a
# database says, it is the one that has every character.
_ENCODING = {"client_encoding": "utf8"}
_VARIABLES = {"connect_timeout": "PGCONNECT_TIMEOUT", "target_session_attrs": "PGTARGETSESSIONATTRS"}


_READS = "homeagent_reads"
"""In the `info` of a connection: whether its transactions are read-only."""

# The schemas that the URL, the role or the database asks for. Another client of a pooler may have set another path in
# the same session, so that the default of the session is read, in one message, in a transaction that is rolled back.
_SEARCH_PATH = "BEGIN; SET LOCAL search_path TO DEFAULT; SELECT pg_catalog.current_schemas(false); ROLLBACK"


class PostgreSQLEngine(Engine):
    """One PostgreSQL database, several writers, row locks where a unit decides on what it read.

    The first connection finds the schemas of the `search_path`, and every transaction of the engine keeps to them: a
    schema that another role creates later, such as one with the name of this role, is never searched.

    Args:
        url: `postgresql+psycopg://…`; its query is libpq's.
        busy_timeout: how long a statement waits for a lock (`lock_timeout`).
        pool_size: how many units may write at once, and how many may read.
    """

    write_connection_type = PostgreSQLConnection
    read_connection_type = PostgreSQLConnection

    def __init__(self, url: URL, *, busy_timeout: timedelta, pool_size: int = POOL_SIZE) -> None:
        try:
            import psycopg
        except ImportError:
            raise DatabaseError("PostgreSQL needs psycopg: install homeagent[postgresql]") from None
        self.url = url
        busy_ms = max(1, min(int(busy_timeout.total_seconds() * 1000), 2**31 - 1))
        # The server warns of a commit that a standby may lack, and a role may have it keep that to itself.
        self._settings = [f"lock_timeout = {busy_ms}", "client_min_messages = warning"]
        self.search_schema: str | None = None
        """The setting under which only the schema of homeagent's tables is searched; None if no schema was found."""
        sa_engine = sqlalchemy.create_engine(
            url,
            poolclass=NullPool,
            hide_parameters=True,
            connect_args=_connect_args(url),
            # psycopg in autocommit mode sends no BEGIN of its own; ours says which kind it wants.
            isolation_level="AUTOCOMMIT",
            paramstyle="format",
        )
        event.listen(sa_engine, "connect", self._on_connect)
        event.listen(sa_engine, "begin", self._on_begin)
        # Others may listen to errors too, such as instrumentation, and may have been first: what they see is withheld
        # before. Returned and not raised, so that those who come after are called at all.
        event.listen(sa_engine, "do_execute", _execute)
        event.listen(sa_engine, "do_executemany", _execute_many)
        event.listen(sa_engine, "handle_error", _on_error)
        super().__init__(
            sa_engine,
            driver_errors=(psycopg.Error, OverflowError),
            translate=postgresql_error,
            writers=pool_size,
            readers=pool_size,
            begin_write=("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",),
            # The snapshot is taken by the first query, not by BEGIN.
            begin_read=("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "SELECT 1"),
        )

    def _on_connect(self, connection: Any, record: ConnectionPoolEntry) -> None:
        pooled = connection.execute("SELECT pg_backend_pid()").fetchone()[0] != connection.info.backend_pid
        record.info[POOLED] = pooled
        if self.search_schema is None:
            self._find_schema(connection)
        if pooled:
            # A pooler in between has told us a process of its own: the next transaction may be given another session.
            # What was prepared in this one may be missing there, and what was set in this one would reach others.
            connection.prepare_threshold = None
        else:
            connection.execute("; ".join(f"SET {setting}" for setting in self._settings))

    def _find_schema(self, connection: Any) -> None:
        """Have every transaction search the schemas that the `search_path` names now, and temporary tables last."""
        cursor = connection.execute(_SEARCH_PATH)
        while cursor.description is None:
            cursor.nextset()
        schemas = ['"{}"'.format(name.replace('"', '""')) for name in cursor.fetchone()[0]]
        if schemas:
            # A later schema may hold tables, types and functions of the application.
            self._settings.append(f"search_path = {', '.join(schemas)}, pg_temp")
            self.search_schema = f"search_path = {schemas[0]}, pg_temp"

    def _on_begin(self, connection: Connection) -> None:
        raw: Any = connection.connection.driver_connection
        # A link has begun by itself before it lends its connection to an ORM session.
        if raw.info.transaction_status == 0:
            # Who waits for a lock must see afterwards what its holder did, also where a role asks for more isolation.
            kind = "REPEATABLE READ READ ONLY" if connection.info.get(_READS) else "READ COMMITTED"
            raw.execute("; ".join((f"BEGIN ISOLATION LEVEL {kind}", *self._local_settings())))

    def connect(self) -> Connection:
        """Return a connection of its own; the caller closes it."""
        try:
            return self.sa_engine.connect()
        except HomeAgentError as error:
            fault = error  # from `_on_error`
        except self.driver_errors as error:
            fault = postgresql_error(error)
        except ValueError:
            # The URL was checked; psycopg takes a host and a port from the environment too.
            fault = InvalidArgumentError("PGHOST or PGPORT has a value that psycopg can't read: correct the variable")
        # Without a cause and the frames of SQLAlchemy and psycopg: all of these hold the password.
        fault.__cause__ = fault.__context__ = None
        raise fault.with_traceback(None)

    def open_read_connection(self) -> Connection:
        """Return a connection whose transactions are read-only and have one snapshot each."""
        connection = self.connect()
        connection.info[_READS] = True
        try:
            with self.translated():
                connection.exec_driver_sql("SELECT 1")  # the snapshot is taken by the first query, not by BEGIN
        except BaseException:
            connection.close()
            raise
        return connection

    def begin_of(self, connection: Connection, *, read_only: bool) -> Sequence[str]:
        """Return what begins a unit: behind a pooler, each brings the settings of its session along."""
        begin = super().begin_of(connection, read_only=read_only)
        return (begin[0], *self._local_settings(), *begin[1:]) if connection.info[POOLED] else begin

    def _local_settings(self) -> list[str]:
        return [f"SET LOCAL {setting}" for setting in self._settings]

    def prepare_connection(self, connection: Connection, *, read_only: bool) -> None:
        """Nothing more: the BEGIN of a unit says whether it can write."""

    def empty_log(self, timeout: float, *, truncate: bool = False) -> bool:
        """Do nothing: a server has its checkpointer."""
        return True

    def before_fork(self) -> None:
        """Nothing is closed: a child never touches its parent's connections."""

    def after_close(self) -> None:
        """Nothing is left behind on this side."""

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise ours instead of the driver's exceptions."""
        with translated(self.driver_errors, postgresql_error):
            yield


def _connect_args(url: URL) -> dict[str, str]:
    """Return libpq's options where neither the URL nor the environment says otherwise."""
    options = dict(_CONNECTING)
    hosts = url.query.get("host", ())
    if len(hosts.split(",") if isinstance(hosts, str) else hosts) > 1 or "," in (url.host or ""):
        # Of several hosts only the primary will do: also to read, since a standby may lag behind.
        options["target_session_attrs"] = "read-write"
    wanted = {
        name: value
        for name, value in options.items()
        if name not in url.query and not (name in _VARIABLES and _VARIABLES[name] in os.environ)
    }
    return wanted | _ENCODING


def _execute(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    with _withheld():
        cursor.execute(statement, parameters)
    return True


def _execute_many(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
    with _withheld():
        cursor.executemany(statement, parameters)
    return True


@contextmanager
def _withheld() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _withhold(error)
        raise


def _withhold(error: BaseException) -> None:
    """Take from an error of psycopg what the server says, whose DETAIL shows a row, and the connection's password."""
    if hasattr(error, "sqlstate"):
        error.constraint = refused_by(error)  # type: ignore[attr-defined]
        error.args = (named(error)[2:] or "the server's message is withheld",)
        # psycopg keeps the server's message in the one, and the parameters of a failed attempt in the other.
        error._info = error._pgconn = None  # type: ignore[attr-defined]


def _on_error(context: ExceptionContext) -> BaseException | None:
    original: Any = context.original_exception
    if isinstance(original, HomeAgentError):
        raise original  # from what a forked child has in the place of a connection
    if isinstance(original, HomeAgentError):
        return None  # announced by a link, which translated it
    clear_locals(original)  # homeagent's frames hold the parameters of the statement
    fault = postgresql_error(original)
    if context.connection is None:
        if isinstance(fault, ConnectionLostError):
            fault = _not_connected(original)
        elif type(original).__name__ == "ProgrammingError":
            fault = InvalidArgumentError("the database URL has an option that libpq does not know: correct the query")
    # SQLAlchemy makes the driver's exception the cause of ours.
    _withhold(original)
    return fault


def _not_connected(error: BaseException) -> ConnectionLostError:
    """Return an error that says why no host let us in: a wrong password is to be told from a server that is away.

    libpq puts the reason after the host, in the server's words; what stands before may show the URL's options.
    """
    reasons = dict.fromkeys(re.findall(r"^.*connection to server .* failed: (.*)$", str(error), re.MULTILINE))
    told = f" ({'; '.join(reasons)})" if reasons else ""
    return ConnectionLostError(f"no connection to the PostgreSQL server{told}: check that it runs, and the URL")
