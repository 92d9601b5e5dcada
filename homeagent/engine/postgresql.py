"""The PostgreSQL engine: a bounded set of pinned connections, explicit transactions, text compared by bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, create_engine, event
from sqlalchemy.pool import NullPool

from homeagent.engine.engine import Engine
from homeagent.engine.faults import postgresql_fault, translated
from homeagent.errors import DatabaseError

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from sqlalchemy.engine.interfaces import ExceptionContext

__all__ = ["PostgreSQLEngine"]

WRITERS = 10
READERS = 10


class PostgreSQLEngine(Engine):
    """One PostgreSQL database, several writers, row locks where a unit decides on what it read.

    Args:
        url: `postgresql+psycopg://…`; several hosts and `target_session_attrs` are libpq's own.
        busy_timeout: how long a statement waits for a lock (`lock_timeout`).
    """

    def __init__(self, url: URL, *, busy_timeout: timedelta) -> None:
        try:
            import psycopg
        except ImportError:
            raise DatabaseError("PostgreSQL needs psycopg: install homeagent[postgresql]") from None
        self.url = url
        self._busy_ms = max(1, min(int(busy_timeout.total_seconds() * 1000), 2**31 - 1))
        sa_engine = create_engine(
            url,
            poolclass=NullPool,
            hide_parameters=True,
            # psycopg in autocommit mode sends no BEGIN of its own; ours says which kind it wants.
            isolation_level="AUTOCOMMIT",
            paramstyle="format",
        )
        event.listen(sa_engine, "connect", self._on_connect)
        event.listen(sa_engine, "begin", _on_begin)
        event.listen(sa_engine, "handle_error", _on_error)
        super().__init__(
            sa_engine,
            driver_errors=(psycopg.Error, OverflowError),
            translate=postgresql_fault,
            writers=WRITERS,
            readers=READERS,
            begin_write=("BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE",),
            # The snapshot is taken by the first query, not by BEGIN; both go in one message.
            begin_read=("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SELECT 1",),
        )

    def _on_connect(self, connection: Any, record: Any) -> None:
        connection.execute(f"SET lock_timeout = {self._busy_ms}")

    def connect(self) -> Connection:
        """Return a connection of its own; the caller closes it."""
        with self.translated():
            return self.sa_engine.connect()

    def prepare_link(self, connection: Connection, *, read_only: bool) -> None:
        """Nothing more: the BEGIN of a unit says whether it can write."""

    def after_close(self) -> None:
        """Nothing is left behind on this side."""

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Raise ours instead of the driver's exceptions."""
        with translated(self.driver_errors, postgresql_fault):
            yield


def _on_begin(connection: Connection) -> None:
    raw: Any = connection.connection.driver_connection
    if raw.info.transaction_status == 0:
        raw.execute("BEGIN")


def _on_error(context: ExceptionContext) -> None:
    original: Any = context.original_exception
    fault = postgresql_fault(original)
    # SQLAlchemy makes the driver's exception the cause of ours; its DETAIL shows the row that was refused.
    original.args = ("the server's message is withheld",)
    original._info = None
    raise fault
