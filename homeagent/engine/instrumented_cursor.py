"""Call the listeners of SQLAlchemy's events for statements that bypass SQLAlchemy. The listeners do not get the
parameters or the driver's exception (https://docs.sqlalchemy.org/en/21/core/events.html).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import ExecutionContext

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine

    from homeagent.engine.driver_errors import Translate


def has_listeners(connection: Connection) -> bool:
    """Return whether listeners are registered for the connection's statements."""
    dispatch: Any = connection.dispatch
    return bool(dispatch.before_cursor_execute or dispatch.after_cursor_execute)


class _Execution(ExecutionContext):
    """Context of one statement. A listener can set attributes of the context."""

    def __init__(self, connection: Connection, cursor: Any, statement: str, *, many: bool) -> None:
        self.engine: Engine = connection.engine
        self.connection: Connection = connection
        self.root_connection = connection
        self.dialect: Dialect = connection.dialect
        self.cursor: Any = cursor
        self.compiled: Any = None
        self.statement: str = statement
        self.parameters: Any = []
        self.executemany = many
        self.execution_options: Any = connection.get_execution_options()


class FailureContext(ExceptionContext):
    """Context of a failed statement for SQLAlchemy's listeners. The error in the context contains no stored values."""

    def __init__(self, execution: _Execution, error: BaseException) -> None:
        vars(self).update(vars(execution), parameters=None)  # such as the connection, the cursor and the statement
        self.original_exception = error
        self.sqlalchemy_exception: Any = None
        self.chained_exception: Any = None
        self.execution_context: Any = execution
        self.is_disconnect = self.invalidate_pool_on_disconnect = self.is_pre_ping = False


@dataclass(eq=False)
class InstrumentedCursor:
    """A driver's cursor that calls the connection's listeners."""

    _connection: Connection
    _cursor: Any
    _driver_errors: tuple[type[BaseException], ...]
    _translate: Translate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, statement: str, *parameters: Any) -> Any:
        """Run a statement, and return the driver's cursor."""
        with self._announced(statement, many=False) as statement:
            return self._cursor.execute(statement, *parameters)

    def executemany(self, statement: str, parameters: Any) -> Any:
        """Run a statement once for each set of parameters."""
        with self._announced(statement, many=True) as statement:
            return self._cursor.executemany(statement, parameters)

    @contextmanager
    def copy(self, statement: str) -> Iterator[Any]:
        """Copy rows into a PostgreSQL table. The listeners see COPY as one statement."""
        with self._announced(statement, many=True) as statement, self._cursor.copy(statement) as copy:
            yield copy

    @contextmanager
    def _announced(self, statement: str, *, many: bool) -> Iterator[str]:
        """Call the listeners before and after the block. Yield the statement to run."""
        execution = _Execution(self._connection, self._cursor, statement, many=many)
        dispatch: Any = self._connection.dispatch
        for listener in dispatch.before_cursor_execute:
            # A listener can change the statement, for example to add a comment. A listener can't change the parameters.
            statement, _ = listener(self._connection, self._cursor, statement, (), execution, many)
        try:
            yield statement
        except BaseException as error:
            if isinstance(error, self._driver_errors):
                reported: BaseException = self._translate(error)
            else:
                reported = RuntimeError(f"the statement was interrupted ({type(error).__name__})")
            failure = FailureContext(execution, reported)
            for listener in self._connection.dialect.dispatch.handle_error:
                listener(failure)
            raise
        for listener in dispatch.after_cursor_execute:
            listener(self._connection, self._cursor, statement, (), execution, many)
