"""The PostgreSQL engine. Behind a pooler, each transaction can use another server session."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Sequence
from copy import copy
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import URL, event
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.pool import NullPool

from homeagent.engine.conversions import hide_values
from homeagent.engine.driver_errors import conversion_error, naming_table, postgresql_error, remove_private
from homeagent.engine.engine import Engine
from homeagent.engine.instrumented_cursor import FailureContext
from homeagent.engine.postgresql.connection import ACTIVE, POOLED, PostgreSQLConnection, cursor_class
from homeagent.errors import ConnectionLostError, DatabaseError, HomeAgentError, InvalidArgumentError
from homeagent.frame_locals import clear_locals

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ExceptionContext
    from sqlalchemy.pool import ConnectionPoolEntry

# Timeouts for a silent host, in seconds (tcp_user_timeout: in milliseconds). By default, libpq sets no time limit for a
# new connection (https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-PARAMKEYWORDS). Linux waits about 15
# minutes for the acknowledgement of sent data (tcp(7), `tcp_retries2`).
_CONNECT_OPTIONS: dict[str, str] = {
    "connect_timeout": "10",  # for each host
    "keepalives_idle": "30",
    "keepalives_interval": "10",
    "keepalives_count": "3",
    "tcp_user_timeout": "30000",
    "fallback_application_name": "homeagent",
}
# Override the encoding of the URL, the role or the database. With SQL_ASCII, psycopg would return bytes.
_ENCODING = {"client_encoding": "utf8"}
_VARIABLES = {"connect_timeout": "PGCONNECT_TIMEOUT", "target_session_attrs": "PGTARGETSESSIONATTRS"}


_READ_ONLY = "homeagent_reads"
"""Key in the `info` of a connection. The value is True if the connection's transactions are read-only."""

# Reset the search_path, which another client of the pooler can have changed.
_SEARCH_PATH = "BEGIN; SET LOCAL search_path TO DEFAULT; SELECT pg_catalog.current_schemas(false); ROLLBACK"


class PostgreSQLEngine(Engine):
    """One PostgreSQL database. Every transaction searches the schemas of the first connection's `search_path`. A schema
    that another role creates later has no effect.
    """

    connection_type: type[PostgreSQLConnection] = PostgreSQLConnection
    begin_write: Sequence[str] = ("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",)
    # PostgreSQL takes the snapshot at the first query, not at BEGIN.
    begin_read: Sequence[str] = ("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "SELECT 1")

    def __init__(self, url: URL, *, busy_timeout: timedelta, pool_size: int = 10) -> None:
        try:
            import psycopg
        except ImportError:
            raise DatabaseError("PostgreSQL needs psycopg: install homeagent[postgresql]") from None
        self.url = url
        busy_ms = max(1, min(int(busy_timeout.total_seconds() * 1000), 2**31 - 1))
        # Override a role's setting that hides warnings. The server warns if a standby can lack a commit.
        self._settings = [f"lock_timeout = {busy_ms}", "client_min_messages = warning"]
        self.search_schema: str | None = None
        """SQL setting that limits the search to homeagent's schema, or None."""
        sa_engine = sqlalchemy.create_engine(
            url,
            poolclass=NullPool,
            hide_parameters=True,
            connect_args=_connect_args(url),
            # In autocommit mode psycopg sends no BEGIN. The engine sends BEGIN with the isolation level.
            isolation_level="AUTOCOMMIT",
            paramstyle="format",
        )
        hide_values(sa_engine.dialect)
        event.listen(sa_engine, "connect", self._on_connect)
        event.listen(sa_engine, "begin", self._on_begin)
        # A tracing library's error listener can run before `_on_error()`. So `_run_by()` removes stored values from the
        # exception first. Do not raise the translated error in `_on_error()`. SQLAlchemy would skip later listeners.
        event.listen(sa_engine, "do_execute", _run_by("execute"))
        event.listen(sa_engine, "do_executemany", _run_by("executemany"))
        event.listen(sa_engine, "handle_error", _on_error)
        self.driver_errors: tuple[type[BaseException], ...] = (psycopg.Error, OverflowError, UnicodeError)
        super().__init__(sa_engine, writers=pool_size, readers=pool_size)

    def translate(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for an exception of psycopg."""
        return postgresql_error(error)

    def _on_connect(self, connection: Any, record: ConnectionPoolEntry) -> None:
        """Record whether a pooler serves the new connection. Without a pooler, set the engine's settings by SET."""
        pooled = connection.execute("SELECT pg_backend_pid()").fetchone()[0] != connection.info.backend_pid
        record.info[POOLED] = pooled
        connection.cursor_factory = cursor_class()
        if self.search_schema is None:
            self._fix_search_path(connection)
        if pooled:
            # A pooler reports its own process id, not the session's id. Do not prepare statements, because the next
            # transaction can get another session. Do not use SET, which would change the settings of other clients.
            connection.prepare_threshold = None
        else:
            connection.execute("; ".join(f"SET {setting}" for setting in self._settings))

    def _fix_search_path(self, connection: Any) -> None:
        """Set the `search_path` to the existing schemas. Put temporary tables last."""
        cursor = connection.execute(_SEARCH_PATH)
        while cursor.description is None:
            cursor.nextset()
        schemas = ['"{}"'.format(name.replace('"', '""')) for name in cursor.fetchone()[0]]
        if schemas:
            # Keep all schemas, because any schema can contain the application's tables.
            self._settings.append(f"search_path = {', '.join(schemas)}, pg_temp")
            self.search_schema = f"search_path = {schemas[0]}, pg_temp"

    def _on_begin(self, connection: Connection) -> None:
        """Outside a transaction, send BEGIN and the engine's settings."""
        if connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
            return  # the caller wants no transaction, such as Alembic in an autocommit_block
        raw: Any = connection.connection.driver_connection
        # The class `StoreConnection` can have sent BEGIN already.
        if raw.info.transaction_status == 0:
            # Override the role's default isolation level. After a wait for a lock, a unit must see the newest row.
            kind = "REPEATABLE READ READ ONLY" if connection.info.get(_READ_ONLY) else "READ COMMITTED"
            raw.execute("; ".join((f"BEGIN ISOLATION LEVEL {kind}", *self._local_settings())))

    def connect(self) -> Connection:
        """Return a new connection. The caller must close the connection."""
        try:
            return self.sa_engine.connect()
        except HomeAgentError as error:
            # The function `_on_error()` has already translated the error.
            failure = error
        except ValueError:
            # A UnicodeError is also a ValueError. The function `resolve_target()` has already checked the URL. So the
            # ValueError comes from an environment variable.
            failure = InvalidArgumentError("PGHOST or PGPORT has a value that psycopg can't read: correct the variable")
        except self.driver_errors as error:
            failure = postgresql_error(error)
        # The driver's exception and the frames of SQLAlchemy contain the password.
        failure.__cause__ = failure.__context__ = None
        raise failure.with_traceback(None)

    def open_read_connection(self) -> Connection:
        """Return a new connection. Each transaction of the connection is read-only and reads one snapshot."""
        connection = self.connect()
        connection.info[_READ_ONLY] = True
        try:
            with self.translated():
                if not connection.info[POOLED]:
                    # An application's COMMIT ends the read-only transaction.
                    raw: Any = connection.connection.driver_connection
                    raw.execute("SET default_transaction_read_only = on")
                connection.exec_driver_sql("SELECT 1")  # PostgreSQL takes the snapshot at the first read, not at BEGIN
        except BaseException:
            connection.close()
            raise
        return connection

    def begin_of(self, connection: Connection, *, read_only: bool) -> Sequence[str]:
        """Return the SQL statements that begin a unit. Behind a pooler, also set the engine's settings by SET LOCAL."""
        begin = super().begin_of(connection, read_only=read_only)
        return (begin[0], *self._local_settings(), *begin[1:]) if connection.info[POOLED] else begin

    def _local_settings(self) -> list[str]:
        """Return the SQL statements that apply the settings to one transaction."""
        return [f"SET LOCAL {setting}" for setting in self._settings]

    def fork_locks(self) -> Sequence[threading.RLock]:
        """Return the mutexes of the pools."""
        # Leave out `feed_mutex`, which a lost connection can block for long.
        return super().fork_locks()[1:]


def _connect_args(url: URL) -> dict[str, str]:
    """Return homeagent's options for libpq. Leave out an option that the URL or an environment variable sets."""
    options = dict(_CONNECT_OPTIONS)
    hosts = url.query.get("host", ())
    if len(hosts.split(",") if isinstance(hosts, str) else hosts) > 1 or "," in (url.host or ""):
        # With several hosts, use only the primary. A standby can lag behind.
        options["target_session_attrs"] = "read-write"
    wanted = {
        name: value
        for name, value in options.items()
        if name not in url.query and not (name in _VARIABLES and _VARIABLES[name] in os.environ)
    }
    return wanted | _ENCODING


def _run_by(method: str) -> Callable[..., bool]:
    """Return a listener that passes a statement to a cursor's method. The listener removes private data from the
    method's exception.
    """

    def run(cursor: Any, statement: str, parameters: Any, context: Any) -> bool:
        try:
            getattr(cursor, method)(statement, parameters)
        except Exception as error:
            remove_private(error)
            raise
        return True

    return run


def _on_error(context: ExceptionContext) -> BaseException | None:
    if isinstance(context, FailureContext):
        return None  # `StoreConnection` translates the exception of the instrumented cursor
    original: Any = context.original_exception
    clear_locals(original)  # A traceback could show stored values in local variables of homeagent.
    cursor: Any = getattr(context.execution_context, "cursor", None)
    if cursor is not None and cursor.connection.pgconn.transaction_status == ACTIVE:
        # An exception such as a signal handler's has interrupted the statement. Make SQLAlchemy close the connection.
        # Otherwise SQLAlchemy would send a ROLLBACK, which fails and replaces the exception.
        context.is_disconnect = True
    if isinstance(original, HomeAgentError):
        raise copy(original)  # SQLAlchemy makes `original` the cause, and no error may be its own cause.
    if type(context.sqlalchemy_exception) is StatementError:
        return conversion_error(original)
    by_driver = isinstance(context.sqlalchemy_exception, DBAPIError)
    if not by_driver and not isinstance(original, (OverflowError, UnicodeError)):
        return None
    failure = postgresql_error(original)
    if context.connection is None:
        if isinstance(failure, ConnectionLostError):
            failure = _connect_error(original)
        elif type(original).__name__ == "ProgrammingError":
            failure = InvalidArgumentError("the database URL has an option that libpq does not know: correct the query")
    # Remove private data from the driver's exception. A traceback of the returned error also shows the driver's
    # exception.
    remove_private(original)
    return naming_table(failure, context.statement)


def _connect_error(error: BaseException) -> ConnectionLostError:
    """Return the error for a failed connection, with the reason for each host. Do not show libpq's whole message, which
    can contain the URL's options.
    """
    reasons = dict.fromkeys(re.findall(r"^.*connection to server .* failed: (.*)$", str(error), re.MULTILINE))
    shown = f" ({'; '.join(reasons)})" if reasons else ""
    return ConnectionLostError(f"no connection to the PostgreSQL server{shown}: check that it runs, and check the URL")
