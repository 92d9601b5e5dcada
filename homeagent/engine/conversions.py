"""Convert the values of SQLAlchemy's statements. An error of a column type does not show the value."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.engine.default import DefaultExecutionContext
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

from homeagent.engine.driver_errors import unconvertible
from homeagent.errors import HomeAgentError
from homeagent.models.types import StoredColumn, unreadable

Convert = Callable[[Any], Any]


# A type raises these errors for a value that the type can't read. Do not replace other exceptions, because a signal
# handler can raise them (`test_signal_handler_during_a_conversion`).
_UNREADABLE = (ArithmeticError, LookupError, RecursionError, TypeError, ValueError)


def hiding_value(
    convert: Convert, failure: Callable[[type[Exception]], HomeAgentError], *replaced: type[Exception]
) -> Convert:
    """Return a function that converts a value. In place of an exception, the function raises the given error, whose
    traceback does not show the value.
    """

    def convert_value(value: Any) -> Any:
        try:
            return convert(value)
        except HomeAgentError:
            raise
        except replaced as error:
            kind = type(error)
        del value
        # Do not raise inside the `except` block. The error's `__context__` would show the value.
        raise failure(kind)

    return convert_value


def hiding_parameter(convert: Convert, name: str) -> Convert:
    """Return a function that converts a value of a parameter. An error of the function does not show the value."""
    return hiding_value(convert, partial(unconvertible, what=f"the value of the parameter {name!r}"), Exception)


def hiding_stored(convert: Convert | None, kind: TypeEngine[Any]) -> Convert | None:
    """Return a function that converts a stored value. For an unreadable value, the function raises
    CorruptDatabaseError. homeagent's column types already do so.
    """
    if convert is None or isinstance(kind, StoredColumn):
        return convert
    return hiding_value(convert, lambda _: unreadable(), *_UNREADABLE)


class _Compiler(SQLCompiler):
    @cached_property
    def _bind_processors(self) -> Any:
        # SQLAlchemy has no public method for the conversion of parameters. Each exception of a conversion becomes the
        # cause of SQLAlchemy's error, and Pydantic's ValidationError contains the value.
        processors: dict[str, Any] = super()._bind_processors  # type: ignore[assignment]  # a property
        return {
            name: tuple(each and hiding_parameter(each, name) for each in convert)
            if isinstance(convert, tuple)
            else hiding_parameter(convert, name)
            for name, convert in processors.items()
        }


class _Execution(DefaultExecutionContext):
    def get_result_processor(self, type_: Any, colname: str, coltype: Any) -> Any:
        return hiding_stored(super().get_result_processor(type_, colname, coltype), type_)


def hide_values(dialect: Dialect) -> None:
    """Make the errors of column types in SQLAlchemy's statements hide the values."""
    dialect.statement_compiler = _combined((_Compiler, dialect.statement_compiler))
    dialect.execution_ctx_cls = _combined((_Execution, dialect.execution_ctx_cls))


@cache
def _combined(bases: tuple[Any, ...]) -> Any:
    """Return a class with the given base classes."""
    return type("Combined", bases, {})
