"""Compile each statement once for each dialect, and run constant SQL. SQLAlchemy's own execution would take several
times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

import sqlalchemy
from pydantic import BaseModel
from sqlalchemy import (
    CompoundSelect,
    Delete,
    Dialect,
    Executable,
    Float,
    Insert,
    Select,
    TextClause,
    Update,
    bindparam,
    inspect,
    literal_column,
)
from sqlalchemy.orm import configure_mappers
from sqlalchemy.sql.expression import ColumnClause
from sqlalchemy.sql.visitors import iterate

from homeagent.engine.conversions import hiding_stored
from homeagent.engine.parameters import binder, column_keys
from homeagent.errors import CorruptDatabaseError, InvalidArgumentError
from homeagent.models import TABLES
from homeagent.models.base import Table, metadata
from homeagent.models.types import UNREADABLE, naming_column, unreadable

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement
    from sqlalchemy.types import TypeEngine
    from sqlmodel.sql.expression import SelectOfScalar

M = TypeVar("M", bound=Table)
R = TypeVar("R")
T = TypeVar("T")

Row = Sequence[Any]
Loader = Callable[[Sequence[Row]], list[Any]]
Parameters = dict[str, Any]
DialectInsert = Callable[[Any], Any]
"""`sqlalchemy.dialects.sqlite.insert` or `sqlalchemy.dialects.postgresql.insert`, which can resolve conflicts."""


class Compiled(Generic[R]):
    """A statement in the SQL of one dialect. The attribute `compiled.target` is the name of the written table, or None.
    The attribute `compiled.cascade` is "ondelete" (DELETE), "onupdate" (UPDATE) or None.
    """

    __slots__ = ("_dialect", "bind", "cascade", "columns", "is_text", "load", "sql", "target", "writes")

    def __init__(
        self,
        expression: Executable,
        dialect: Dialect,
        returning: type[Table] | None = None,
        *,
        ignores_unknown: bool = False,
    ) -> None:
        element: Any = expression
        compiled: Any = element.compile(dialect=dialect, column_keys=column_keys(expression))
        if compiled.post_compile_params or compiled.literal_execute_params:
            raise InvalidArgumentError(
                "the SQL of a Statement can't depend on the values, as with in_([…]): compare by or_() or a subquery, "
                f"or use unit.session.exec(): {' '.join(compiled.string.split())}"
            )
        self.sql: str = compiled.string
        parts: Any = compiled.ctes or ()
        self.writes: bool = not isinstance(expression, _READING) or any(
            isinstance(each.element, _WRITING) for each in parts
        )
        self.bind: Callable[[Parameters], Row] = binder(compiled, dialect, ignores_unknown=ignores_unknown)
        model = returning or _model_of(expression)
        columns = getattr(expression, "exported_columns", ()) if model is None else model.__table__.columns
        self.columns: list[Any] = list(columns)
        """The columns of the statement's rows. The list is empty for a statement without rows."""
        self.load: Callable[[Sequence[Row]], list[R]] = (
            _loader(self.columns, dialect) if model is None else _model_loader(model, dialect)
        )
        self.is_text: bool = isinstance(expression, TextClause)
        """True if only the database knows whether the statement has rows."""
        self.target: str | None = getattr(getattr(expression, "table", None), "fullname", None)
        self.cascade: str | None = {"delete": "ondelete", "update": "onupdate"}.get(expression.__visit_name__)
        self._dialect = dialect

    def unreadable(self, rows: Sequence[Row], parameters: Parameters) -> CorruptDatabaseError:
        """Return an error that names the first unreadable value. Call the method after `load()` raised an error."""
        for row in rows:
            for place, (column, value) in enumerate(zip(self.columns, row, strict=True)):
                if not self._is_readable(column, value):
                    return self.unreadable_at(place, row, parameters)
        return unreadable()

    def _is_readable(self, column: Any, value: object) -> bool:
        convert = _processor(column, self._dialect)
        if value is not None and _is_checked_text(column, self._dialect):
            return isinstance(value, str)
        if convert is None or value is None:
            return convert is None or getattr(column, "nullable", True)
        try:
            convert(value)
        except UNREADABLE:
            return False
        return True

    def unreadable_at(
        self, place: int | None, row: Row, parameters: Parameters, what: str = "holds a value that can't be read"
    ) -> CorruptDatabaseError:
        """Return the error for an unreadable value. Pass `place=None` for an unknown column, and `()` for an unknown
        row.
        """
        column = None if place is None else self.columns[place]
        tables: list[Any] = [getattr(each, "table", None) for each in (column, *self.columns)]
        of = next((table for table in tables if table is not None), None)
        table = of if isinstance(of, sqlalchemy.Table) else metadata.tables.get(getattr(of, "name", ""))
        if table is None:
            return unreadable()
        name = naming_column(table)
        by_name = {each.name: value for each, value in zip(self.columns, row, strict=False)}
        keys = [by_name.get(name), *(parameters.get(each) for each in (name, "id", f"{table.name[:-1]}_id"))]
        key = next((key for key in keys if key is not None), None)
        if table.name not in TABLES and not isinstance(key, int):
            key = None  # the key of a row in an application's table can be a secret
        return unreadable(table, column.name if isinstance(column, ColumnClause) else None, key, what)


_READING = (Select, CompoundSelect)
_WRITING = (Insert, Update, Delete)


class Statement(Generic[R]):
    """One SQL statement, and the type of the statement's results.

    Create a `Statement` once, for example as a constant of a module. Each engine compiles the statement at its first
    use. A SELECT of one model gives instances of the model. The model must derive from `homeagent.Table`. A SELECT of
    one column gives values. A SELECT of several columns gives tuples. A statement of SQLAlchemy's text() gives tuples.
    An INSERT without `values()` has a parameter for each column. A computed column, and a key that the database
    assigns, have no parameter. To choose such a key, list the columns in `values()`. A unit refuses an unknown
    parameter.

    Args:
        make: expression of the statement. For an upsert, pass a function. The function takes the dialect's `insert()`,
            and returns the expression. Use SQLAlchemy's bindparam() for each value that differs between calls.
        lock: True if a SELECT in a write unit locks its rows. The locks end with the unit. SQLite does not lock rows.
            In a read-only unit, the SELECT locks no rows, even with SQLAlchemy's with_for_update().
        returning: model class of the rows from an INSERT, UPDATE or DELETE. With None, the statement returns no rows.

    Raises (at the first use): InvalidArgumentError: if the results mix a model and columns, or the model does not
        derive from `homeagent.Table`. Also if the SQL depends on the values, as with `in_([…])`.
    """

    __slots__ = ("_cache", "_make", "_only_reads", "_returning", "lock")
    _ignores_unknown = False

    if TYPE_CHECKING:

        @overload
        def __init__(self: Statement[T], make: SelectOfScalar[T] | Select[T], *, lock: bool = False) -> None: ...
        @overload
        def __init__(
            self: Statement[M], make: Executable | Callable[[DialectInsert], Executable], *, returning: type[M]
        ) -> None: ...
        @overload
        def __init__(
            self: Statement[R], make: Executable | Callable[[DialectInsert], Executable], *, lock: bool = False
        ) -> None: ...

    def __init__(
        self,
        make: Executable | Callable[[DialectInsert], Executable],
        *,
        lock: bool = False,
        returning: type[Table] | None = None,
    ) -> None:
        if not (callable(make) or isinstance(make, Executable)):
            raise InvalidArgumentError(
                "a Statement takes an expression of SQLAlchemy, or a function that returns one, not "
                f"{type(make).__name__}: wrap SQL in text()"
            )
        if lock and not (callable(make) or isinstance(make, _READING)):
            raise InvalidArgumentError("lock=True needs a SELECT of SQLAlchemy's select(): leave out lock=True")
        self._make = make
        self._returning = returning
        # SQLAlchemy has no public attribute for the clause that `with_for_update()` adds.
        self.lock: bool = lock or getattr(make, "_for_update_arg", None) is not None
        self._cache: dict[tuple[str, bool], Compiled[R]] = {}
        self._only_reads: bool | None = None

    @property
    def only_reads(self) -> bool:
        """True if the statement neither changes nor locks rows."""
        if self._only_reads is None:
            self._only_reads = not self.lock and isinstance(self._make, _READING) and not _writes_or_locks(self._make)
        return self._only_reads

    def compiled(self, dialect: Dialect, *, read_only: bool = False) -> Compiled[R]:
        """Return the compiled statement for a dialect. With `read_only=True`, leave out the clause that locks rows."""
        key = (dialect.name, read_only)
        try:
            return self._cache[key]
        except KeyError:
            expression: Any = self._make
            if callable(expression):
                # Import only the dialect in use, because each import costs start time.
                expression = expression(import_module(f"sqlalchemy.dialects.{dialect.name}").insert)
            if self.lock and (read_only or expression._for_update_arg is None):
                expression = expression.with_for_update()
                if read_only:
                    expression._for_update_arg = None
            if self._returning is not None:
                expression = expression.returning(*self._returning.__table__.columns)
            # Compile without a lock, because two threads get equal results.
            compiled = self._cache[key] = Compiled[R](
                expression, dialect, self._returning, ignores_unknown=self._ignores_unknown
            )
            return compiled


def _writes_or_locks(expression: Any) -> bool:
    """Return True if a part of the expression writes, such as a CTE, or has the clause FOR UPDATE."""
    # SQLAlchemy has no public attribute for FOR UPDATE.
    return any(
        isinstance(part, _WRITING) or getattr(part, "_for_update_arg", None) is not None for part in iterate(expression)
    )


def no_statement(given: object) -> InvalidArgumentError:
    """Return the error for an object that is not a Statement. The caller must raise the error."""
    return InvalidArgumentError(
        f"a unit runs a Statement(…), not {type(given).__name__}: wrap SQL in Statement(text(…))"
    )


class LenientStatement(Statement[R]):
    """A statement of homeagent that ignores unknown parameters. Several statements can get the same parameters."""

    __slots__ = ()
    _ignores_unknown = True


def constant(value: str | int, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """Return an expression that SQLAlchemy writes into the SQL text. Do not pass a user's value. The function does not
    escape quotes. With SQL parameters for the constants, an INSERT took twice as long.
    """
    return literal_column(f"'{value}'" if isinstance(value, str) else str(int(value)), type_)


def bindparams(*names: str) -> dict[str, Any]:
    """Return a parameter for each name, for example for `values()`."""
    return {name: bindparam(name) for name in names}


def equal(table: Any, *names: str) -> ColumnElement[bool]:
    """Return the conditions `column = :column` for the given columns, joined by AND."""
    return sqlalchemy.and_(*(table.c[name] == bindparam(name) for name in names))


def count(table: Any, *conditions: Any) -> Statement[int]:
    """Return a statement that counts the matching rows."""
    return Statement(sqlalchemy.select(sqlalchemy.func.count()).select_from(table).where(*conditions))


def delete_first(table: Any, order: ColumnElement[Any], *conditions: Any) -> sqlalchemy.Delete:
    """Return a DELETE statement for the first matching rows in the given order. The SQL parameter `:limit` is the
    maximum number of rows. On PostgreSQL, SKIP LOCKED makes simultaneous sweeps delete different rows.
    """
    key = table.primary_key.columns
    first = sqlalchemy.select(*key).where(*conditions).order_by(order).limit(bindparam("limit"))
    return sqlalchemy.delete(table).where(sqlalchemy.tuple_(*key).in_(first.with_for_update(skip_locked=True)))


# PostgreSQL's codes of the types `numeric` and `float8`.
_NUMERIC, _FLOAT8 = 1700, 701


def _processor(column: ColumnElement[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """Return the function that converts a value of the driver, or None."""
    # Before the execution, the driver's type code is unknown. A `Float` column with Decimal values needs the code
    # `_FLOAT8`. For any other column, the code `_NUMERIC` is right.
    code = _FLOAT8 if isinstance(column.type, Float) and column.type.asdecimal else _NUMERIC
    return hiding_stored(column.type.dialect_impl(dialect).result_processor(dialect, code), column.type)


def _is_checked_text(column: Any, dialect: Dialect) -> bool:
    """Return True if the loader must check that a stored value is a text. A column of SQLite accepts any type."""
    if dialect.name != "sqlite" or getattr(getattr(column, "table", None), "name", None) not in TABLES:
        return False
    return _processor(column, dialect) is None and column.type.python_type is str


def _refuse_blob() -> NoReturn:
    raise ValueError("a text is stored as another type")


def _model_of(expression: Any) -> Any:
    """Return the model whose instances a statement selects, or None for columns."""
    selected: list[Any] = getattr(expression, "column_descriptions", None) or []
    # The expression is the entity itself for a model and for `aliased(model)`.
    models = [each["type"] for each in selected if each.get("entity") is not None and each["expr"] is each["entity"]]
    if models and len(selected) > 1:
        raise InvalidArgumentError("a Statement can select one model, or columns: select the columns of each model")
    return models[0] if models else None


def _loader(columns: Sequence[ColumnElement[Any]], dialect: Dialect) -> Loader:
    """Return a function that converts rows to single values or tuples."""
    processors = [_processor(column, dialect) for column in columns]
    if len(columns) == 1:
        (convert,) = processors
        if convert is None:
            return lambda rows: [row[0] for row in rows]
        return lambda rows: [convert(row[0]) for row in rows]
    if any(processors):
        return lambda rows: [
            tuple(value if convert is None else convert(value) for convert, value in zip(processors, row, strict=True))
            for row in rows
        ]
    return lambda rows: [tuple(row) for row in rows]


# This function sets an instance's `__dict__` directly. Pydantic's method `__setattr__` is slower.
_set_dict: Any = BaseModel.__dict__["__dict__"].__set__


def as_loaded(model: type[M], values: dict[str, Any]) -> M:
    """Return a model instance for a written row. The instance uses the given dictionary without a copy."""
    instance: M = object.__new__(model)
    _set_dict(instance, values)
    return instance


@cache
def _model_loader(model: type[Table], dialect: Dialect) -> Loader:
    """Generate a function that converts rows to detached instances. Loading instances with SQLAlchemy's state takes
    four times as long.
    """
    if not issubclass(model, Table):
        raise InvalidArgumentError(
            f"a Statement can't load {model.__name__}, which does not derive from homeagent.Table: derive it from "
            "Table, select its columns, or use the ORM session"
        )
    configure_mappers()
    mapper = inspect(model)
    namespace: dict[str, Any] = {"model": model, "new": object.__new__, "set_dict": _set_dict, "refuse": _refuse_blob}
    items = []
    for index, column in enumerate(model.__table__.columns):
        name = mapper.get_property_by_column(column).key
        convert = getattr(column.type, "convert_loaded", None) or _processor(column, dialect)
        namespace[f"convert{index}"] = convert
        value = f"c{index}" if convert is None else f"convert{index}(c{index})"
        if _is_checked_text(column, dialect):
            value = f"(c{index} if c{index}.__class__ is str else refuse())"
        items.append(f"{name!r}: None if c{index} is None else {value}" if column.nullable else f"{name!r}: {value}")
    row = "".join(f"c{index}, " for index in range(len(items)))
    source = f"""
def load(rows):
    loaded = []
    for {row}in rows:
        each = new(model)
        set_dict(each, {{{", ".join(items)}}})
        loaded.append(each)
    return loaded
"""
    exec(source, namespace)  # noqa: S102  built from the names of columns only
    return namespace["load"]  # type: ignore[no-any-return]
