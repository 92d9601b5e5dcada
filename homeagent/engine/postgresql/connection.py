"""A link to a PostgreSQL server: one message begins a unit, and a commit is believed only where it took place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from homeagent.engine.connection import StoreConnection
from homeagent.engine.driver_errors import SESSION_ENDED, commit_unknown, connection_lost
from homeagent.engine.instrumented_cursor import InstrumentedCursor
from homeagent.errors import ConnectionLostError, DatabaseError, HomeAgentError, StandbyError

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.driver_errors import Translate
    from homeagent.engine.statements import Parameters, Row, Statement

__all__ = ["POOLED", "PostgreSQLConnection"]

POOLED = "homeagent_pooled"
"""In the `info` of a connection: whether a pooler is between, and each transaction may be given another session."""

# libpq's PGTransactionStatusType: https://www.postgresql.org/docs/current/libpq-status.html
_IDLE = 0
_FAILED = 3

# What a standby answers to BEGIN … READ WRITE.
_STANDBY = frozenset({"0A000", "25006"})


# libpq's ExecStatusType, of a result that is an error.
_FATAL_ERROR = 7


class PostgreSQLConnection(StoreConnection):
    """A connection to a server, which may go away at any moment, or be demoted to a standby.

    Args:
        connection: SQLAlchemy's, of psycopg.
        translate: from one of the driver's exceptions to one of ours.
        begin: the SQL that begins a transaction; it goes in one message.
        **options: as of every link.
    """

    __slots__ = ("_announces", "_begin_message", "_begun", "_lost", "_pooled", "_send", "_warnings")

    def __init__(self, connection: Connection, *, translate: Translate, begin: Sequence[str], **options: Any) -> None:
        def judge(error: BaseException) -> HomeAgentError:
            fault = translate(error)
            if isinstance(fault, ConnectionLostError):
                # The server says so before it closes the connection, and the driver learns it only then.
                self._lost = True
            return fault

        super().__init__(connection, translate=judge, begin=begin, **options)
        self._begun = False
        self._lost = False
        self._pooled = bool(connection.info[POOLED])
        self._warnings: list[str] = []
        self._raw.add_notice_handler(self._notice)
        self._begin_message = "; ".join(begin)
        # libpq's own call for a message without parameters. psycopg's cursor, which a signal may interrupt while it
        # waits, costs 12 µs more each time: a third of what a read costs this side. Nothing here waits for long.
        self._send: Callable[[bytes], Any] = self._raw.pgconn.exec_
        # What others listen to goes by way of the cursor that calls them.
        self._announces = isinstance(self._cursor, InstrumentedCursor)

    def _notice(self, notice: Any) -> None:
        if notice.severity_nonlocalized in SESSION_ENDED:
            # libpq reports an error as a notice if no statement is under way, for example after a timeout.
            self._lost = True
        elif notice.severity_nonlocalized == "WARNING":
            self._warnings.append(notice.sqlstate or "")

    def begin(self) -> None:
        """Begin a transaction.

        Raises:
            ConnectionLostError: the connection is gone; nothing of the unit was sent yet.
            StandbyError: the server takes no writes.
        """
        fault: BaseException
        if self._pooled:
            # The session of the transaction before may be gone, though the connection to the pooler is not.
            self.memory.clear()
        try:
            self._command(self._begin_message)
        except self._driver_errors as error:
            demoted = not self.read_only and getattr(error, "sqlstate", None) in _STANDBY
            fault = StandbyError() if demoted else self._translate(error)
        else:
            self._begun = True
            return
        raise fault

    def read_alone(self, act: Literal["one", "all"], statement: Statement[Any], parameters: Parameters) -> Any:
        """Run one statement that reads, outside of a unit: behind a pooler in a transaction, which has the settings."""
        if not self._pooled:
            return super().read_alone(act, statement, parameters)
        self.begin()
        found = getattr(self, act)(statement, parameters)
        self.commit()
        return found

    def _command(self, sql: str) -> None:
        if self._announces:
            self._execute(sql)
            return
        result = self._send(sql.encode())
        if result.status == _FATAL_ERROR:
            from psycopg.errors import error_from_result

            raise error_from_result(result)

    def commit(self) -> None:
        """Commit; when this returns, it took place and was as durable as the server was asked to make it.

        Raises:
            ConnectionLostError: if the server ended the session before COMMIT was sent; nothing was committed.
            CommitUnknownError: the connection was lost before the answer came, or the wait for a synchronous standby
                was cancelled.
            DatabaseError: a statement of the unit had failed, so that there was nothing to commit.
        """
        if self._raw.pgconn.transaction_status == _FAILED:
            # The server would answer COMMIT with ROLLBACK, and that is no error to it.
            raise DatabaseError(
                "a statement of this unit failed and its error was caught, after which PostgreSQL commits nothing: "
                "let the error leave the block, or put what may fail into a savepoint()"
            )
        reads_alone = self.read_only and self._root is None
        fault: HomeAgentError | None = None
        try:
            if reads_alone:
                self._command("COMMIT")
            else:
                self._refuse_lost_connection()
        except self._driver_errors as error:
            fault = self._translate(error)
        if fault is not None:
            raise fault
        if reads_alone:
            return
        self._warnings.clear()
        super().commit()
        if self._warnings and not self.read_only:
            # The server says so where somebody cancelled its wait for a synchronous standby: the commit stands here,
            # and a failover may lose it. https://www.postgresql.org/docs/current/warm-standby.html#SYNCHRONOUS-REPLICATION
            raise commit_unknown()

    def _refuse_lost_connection(self) -> None:
        """Raise `ConnectionLostError` if the server has ended the session: COMMIT was not sent, so nothing is unknown.

        It reads what has arrived and does not wait: 1 µs.
        """
        pgconn = self._raw.pgconn
        pgconn.consume_input()
        pgconn.is_busy()  # parses what has arrived, and so calls `_notice`
        if self.is_lost:
            raise connection_lost()

    def _insert(self, into: str, width: int, rows: Iterable[Row]) -> None:
        # A third of executemany's time: https://www.postgresql.org/docs/current/sql-copy.html
        with self._cursor.copy(f"COPY {into} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)

    @property
    def in_transaction(self) -> bool:
        """Whether the server's session is inside a transaction, or nobody can tell any more."""
        return bool(self._raw.pgconn.transaction_status != _IDLE)

    @property
    def is_lost(self) -> bool:
        """Whether the driver knows that the connection is gone."""
        return bool(self._lost or self._raw.closed)

    def is_stale(self, fault: BaseException) -> bool:
        """Tell whether a BEGIN failed since the server went away while nobody used this connection."""
        return self._begun and isinstance(fault, (ConnectionLostError, StandbyError))
