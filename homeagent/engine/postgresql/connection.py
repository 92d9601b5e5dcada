"""A long-lived connection to a PostgreSQL server."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from homeagent.engine.connection import StoreConnection
from homeagent.engine.driver_errors import SESSION_ENDED, commit_unknown, connection_lost, unconvertible
from homeagent.engine.instrumented_cursor import InstrumentedCursor
from homeagent.errors import ConnectionLostError, DatabaseError, HomeAgentError, StandbyError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.engine import Engine
    from homeagent.engine.statements import Parameters, Row, Statement

R = TypeVar("R")

POOLED = "homeagent_pooled"
"""Key in the `info` of a connection. The value is True if a pooler serves the connection."""

# libpq's PGTransactionStatusType: https://www.postgresql.org/docs/current/libpq-status.html
_IDLE = 0
ACTIVE = 1
_FAILED = 3
_FATAL_ERROR = 7  # libpq's ExecStatusType for an error

# Error codes (SQLSTATE) with which a standby refuses BEGIN … READ WRITE.
_STANDBY = frozenset({"0A000", "25006"})


class PostgreSQLConnection(StoreConnection):
    """A connection to a server. The server can become a standby or end the connection."""

    def __init__(self, connection: Connection, engine: Engine, *, read_only: bool) -> None:
        super().__init__(connection, engine, read_only=read_only)
        self._begun = False
        self._lost = False
        self._pooled = bool(connection.info[POOLED])
        self._warned = False
        self._raw.add_notice_handler(self._notice)
        # Send commands such as BEGIN by libpq. The cursor of psycopg is slower.
        self._send: Callable[[bytes], Any] = self._raw.pgconn.exec_
        self._has_listeners = isinstance(self._cursor, InstrumentedCursor)

    def _translate(self, error: BaseException) -> HomeAgentError:
        """Return homeagent's error for psycopg's exception. After a connection loss, mark this connection as lost."""
        failure = super()._translate(error)
        if isinstance(failure, ConnectionLostError):
            # The server sends an error, then closes the connection. After the error, psycopg still treats the
            # connection as open.
            self._lost = True
        return failure

    def _notice(self, notice: Any) -> None:
        if notice.severity_nonlocalized in SESSION_ENDED:
            # An error between two statements arrives as a notice.
            self._lost = True
        elif notice.severity_nonlocalized == "WARNING":
            self._warned = True

    def begin(self) -> None:
        """Begin a transaction. If the unit writes but the server accepts no writes, raise StandbyError."""
        failure: BaseException
        if self._pooled:
            # Forget the last session's state, because the pooler can use another session.
            self.memory.clear()
        try:
            self._command(self._begin)
        except self._driver_errors as error:
            demoted = not self.read_only and getattr(error, "sqlstate", None) in _STANDBY
            failure = StandbyError() if demoted else self._translate(error)
        else:
            self._begun = True
            return
        raise failure

    def read_alone(self, statement: Statement[R], parameters: Parameters) -> list[R]:
        """Run one statement that only reads."""
        if not self._pooled:
            return self.rows(statement, parameters)
        self.begin()  # behind a pooler, the engine's settings apply only inside a transaction
        found = self.rows(statement, parameters)
        self.commit()
        return found

    def _rows_of_text(self, cursor: Any) -> Sequence[Row]:
        return () if cursor.description is None else super()._rows_of_text(cursor)

    def _command(self, sql: str) -> None:
        """Run an SQL command without parameters and result, or raise psycopg's error."""
        if self._has_listeners:
            self._execute(sql)
            return
        result = self._send(sql.encode())
        if result.status == _FATAL_ERROR:
            from psycopg.errors import error_from_result

            raise error_from_result(result)

    def commit(self) -> None:
        """Commit the transaction. If the outcome of COMMIT is unknown, raise CommitUnknownError."""
        if self._raw.pgconn.transaction_status == _FAILED:
            # After a failed statement, PostgreSQL rolls back at COMMIT, without an error.
            raise DatabaseError(
                "a statement of this unit failed and its error was caught, after which PostgreSQL commits nothing: "
                "let the error leave the block, or run the statement in a savepoint()"
            )
        reads_alone = self.read_only and self._root is None
        failure: HomeAgentError | None = None
        try:
            if reads_alone:
                self._command("COMMIT")
            else:
                self._refuse_lost_connection()
        except self._driver_errors as error:
            failure = self._translate(error)
        if failure is not None:
            raise failure
        if reads_alone:
            return
        self._warned = False
        super().commit()
        if self._warned and not self.read_only:
            # The server warns if a wait for a synchronous standby was cancelled. The standby can then lack the commit
            # (https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION).
            raise commit_unknown()

    def _refuse_lost_connection(self) -> None:
        """Raise `ConnectionLostError` if the server has ended the session. Do not wait for data from the server."""
        pgconn = self._raw.pgconn
        pgconn.consume_input()
        pgconn.is_busy()  # is_busy() parses the received data, and calls `_notice()` for each notice
        if self.is_lost:
            raise connection_lost()

    def _insert(self, into: str, width: int, rows: Iterable[Row]) -> None:
        """Insert rows by COPY."""
        # COPY takes a third of the time of executemany (https://www.postgresql.org/docs/current/sql-copy.html).
        with self._cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    @property
    def in_transaction(self) -> bool:
        """True if the session is in a transaction or an unknown state."""
        return not self._connection.closed and bool(self._raw.pgconn.transaction_status != _IDLE)

    @property
    def is_lost(self) -> bool:
        """True if the driver or the server has reported a lost connection."""
        return bool(self._lost or self._raw.closed)

    def close_interrupted(self) -> None:
        """Close the connection if an exception, such as a signal handler's, has interrupted a statement. Otherwise
        SQLAlchemy's next ROLLBACK would fail and replace the exception.
        """
        if self._raw.pgconn.transaction_status == ACTIVE:
            (self._view or self._connection).invalidate()

    def is_stale(self, failure: BaseException) -> bool:
        """Return True if BEGIN failed on a used connection. The server ended the session or became a standby."""
        return self._begun and isinstance(failure, (ConnectionLostError, StandbyError))


@cache
def cursor_class() -> Any:
    """Return the class of psycopg's cursor whose errors of a conversion do not show the value."""
    import psycopg

    class Cursor(psycopg.Cursor[Any]):
        def execute(self, query: Any, params: Any = None, **options: Any) -> Any:
            return _hiding_parameters(self, super().execute, query, params, options)

        def executemany(self, query: Any, params_seq: Any, **options: Any) -> None:
            try:
                if isinstance(params_seq, list):
                    _hiding_parameters(self, super().executemany, query, params_seq, options)
                else:  # an exception of the application's iterator must pass
                    super().executemany(query, params_seq, **options)
                return
            except psycopg.OperationalError as error:
                # At the end of a pipeline, psycopg can replace the exception of a signal handler.
                interruption = error.__context__
                if interruption is None or isinstance(interruption, psycopg.Error):
                    raise
            raise interruption

    return Cursor


def _hiding_parameters(
    cursor: Any, execute: Callable[..., Any], query: Any, parameters: Any, options: dict[str, Any]
) -> Any:
    """Run a statement. If psycopg can't convert a parameter, raise InvalidArgumentError."""
    try:
        return execute(query, parameters, **options)
    except (TypeError, ValueError, RecursionError) as error:
        # A signal handler's exception can interrupt the statement.
        if isinstance(error, UnicodeError) or cursor.connection.pgconn.transaction_status == ACTIVE:
            raise
        kind = type(error)
    # Do not raise inside the `except` block. The error's `__context__` would show the parameters.
    raise unconvertible(kind)
