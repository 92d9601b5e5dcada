"""Statements that run past SQLAlchemy are announced to those who listen to its engine's events.

A link runs its statements on the driver's cursor, which SQLAlchemy doesn't see. Instrumentation such as
OpenTelemetry's listens to `before_cursor_execute`, `after_cursor_execute` and `handle_error`, and would see the ORM
session's statements alone. So where somebody listens when a link is made, its cursor is wrapped in one that calls them
in the same order and with the same arguments (https://docs.sqlalchemy.org/en/21/core/events.html), except that no
parameter is shown to anybody, and that an error is shown as ours. Where nobody listens, nothing is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import ExceptionContext
from sqlalchemy.engine.interfaces import ExecutionContext

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from homeagent.engine.driver_errors import Translate

__all__ = ["InstrumentedCursor", "has_listeners"]


def has_listeners(connection: Connection) -> bool:
    """Tell whether anybody wants to know of this connection's statements."""
    dispatch: Any = connection.dispatch
    return bool(dispatch.before_cursor_execute or dispatch.after_cursor_execute)


class _Execution(ExecutionContext):
    """What the listeners of one statement share; they may hang on it what they like, such as a span."""

    def __init__(self, connection: Connection, cursor: Any, statement: str, *, many: bool) -> None:
        self.engine = connection.engine
        self.connection = connection
        self.root_connection = connection
        self.dialect = connection.dialect
        self.cursor = cursor
        self.compiled = None
        self.statement = statement
        self.parameters = []
        self.executemany = many
        self.execution_options = connection.get_execution_options()


class _Failure(ExceptionContext):
    """What the listeners are told of a statement that failed: our error, which shows no value."""

    def __init__(self, execution: _Execution, fault: BaseException) -> None:
        self.connection = execution.root_connection
        self.engine = execution.engine
        self.dialect = execution.dialect
        self.cursor = execution.cursor
        self.statement = execution.statement
        self.parameters = None
        self.original_exception = fault
        self.sqlalchemy_exception = None
        self.chained_exception = None
        self.execution_context = execution
        self.is_disconnect = False
        self.invalidate_pool_on_disconnect = False
        self.is_pre_ping = False


class InstrumentedCursor:
    """A driver's cursor that tells the listeners of SQLAlchemy's events what it runs.

    Args:
        connection: SQLAlchemy's, whose listeners are called.
        cursor: the driver's.
        driver_errors: what that raises.
        translate: from one of these to one of ours.
    """

    def __init__(
        self,
        connection: Connection,
        cursor: Any,
        *,
        driver_errors: tuple[type[BaseException], ...],
        translate: Translate,
    ) -> None:
        self._connection = connection
        self._cursor = cursor
        self._driver_errors = driver_errors
        self._translate = translate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cursor, name)

    def execute(self, statement: str, *parameters: Any) -> Any:
        """Run a statement, and return the driver's cursor."""
        return self._announced(statement, lambda statement: self._cursor.execute(statement, *parameters))

    def executemany(self, statement: str, parameters: Any) -> Any:
        """Run a statement once for each set of parameters."""
        return self._announced(statement, lambda statement: self._cursor.executemany(statement, parameters), many=True)

    @contextmanager
    def copy(self, statement: str) -> Iterator[Any]:
        """Copy rows into a table of PostgreSQL's: one statement, from its beginning to its end."""
        execution, statement = self._before(statement, many=True)
        try:
            with self._cursor.copy(statement) as copy:
                yield copy
        except BaseException as error:
            self._failed(execution, error)
            raise
        self._after(execution, statement)

    def _announced(self, statement: str, run: Callable[[str], Any], *, many: bool = False) -> Any:
        execution, statement = self._before(statement, many=many)
        try:
            result = run(statement)
        except BaseException as error:
            self._failed(execution, error)
            raise
        self._after(execution, statement)
        return result

    def _before(self, statement: str, *, many: bool) -> tuple[_Execution, str]:
        execution = _Execution(self._connection, self._cursor, statement, many=many)
        dispatch: Any = self._connection.dispatch
        for listener in dispatch.before_cursor_execute:
            # A listener may change the statement, as one that adds a comment does; not what it is run with.
            statement, _ = listener(self._connection, self._cursor, statement, (), execution, many)
        return execution, statement

    def _after(self, execution: _Execution, statement: str) -> None:
        dispatch: Any = self._connection.dispatch
        for listener in dispatch.after_cursor_execute:
            listener(self._connection, self._cursor, statement, (), execution, execution.executemany)

    def _failed(self, execution: _Execution, error: BaseException) -> None:
        if isinstance(error, self._driver_errors):
            fault: BaseException = self._translate(error)
        else:
            fault = RuntimeError(f"the statement was cut off ({type(error).__name__})")
        failure = _Failure(execution, fault)
        dispatch: Any = self._connection.dialect.dispatch
        for listener in dispatch.handle_error:
            listener(failure)
