"""Compare the tables of the models with a database. Import this module only for commands that need Alembic. The import
of Alembic takes 80 ms.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from alembic.autogenerate.api import AutogenContext, produce_migrations, render_python_code
from alembic.ddl.postgresql import PostgresqlImpl
from alembic.runtime.migration import MigrationContext
from alembic.runtime.plugins import Plugin
from alembic.util import PriorityDispatchResult
from sqlalchemy import NUMERIC, UUID, Connection, MetaData, String, TypeDecorator
from sqlalchemy.sql.elements import False_, True_
from sqlmodel import AutoString

from homeagent.engine.sqlite.inspection import scratch_sqlite
from homeagent.errors import InvalidArgumentError, MigrationError
from homeagent.migrations.application import Application
from homeagent.migrations.revisions import RevisionFailedError, upgrade
from homeagent.models import APPLICATION_VERSION_TABLE, SCHEMA, metadata
from homeagent.models.base import Table
from homeagent.models.types import EnumColumn, FlagColumn, HashColumn, JsonColumn, TimestampColumn

# PostgreSQL adds the type to a default, such as 'x'::character varying. For SQLite, Alembic puts '' into parentheses.
_TEXT_LITERAL = re.compile(r"""\(?'((?:[^']|'')*)'\)?(?:::[\w ."()]+)?""")


def render_item(type_: str, object: Any, autogen_context: AutogenContext) -> str | Literal[False]:
    """Write SQLAlchemy's types into a new revision instead of homeagent's column types. Pass the function
    `render_item()` to Alembic's `context.configure()`.

    A revision with homeagent's column types could change with a newer homeagent version.

    Args:
        type_: kind of the object, such as `type` or `server_default`.
        object: SQLAlchemy object, such as a column type.
        autogen_context: Alembic's context with the imports of the new revision.

    Returns:
        The Python code for the object. False if Alembic must write the code.
    """
    if type_ == "server_default" and isinstance(getattr(object, "arg", None), (False_, True_)):
        return f"sa.{object.arg}()"  # by default, Alembic writes the number 0 or 1, which PostgreSQL refuses
    if type_ != "type":
        return False
    if isinstance(object, TimestampColumn):
        return 'sa.BigInteger().with_variant(sa.Integer(), "sqlite")'
    if isinstance(object, FlagColumn):
        return "sa.Integer()"
    if isinstance(object, (JsonColumn, EnumColumn)):
        return "sa.Text()"
    if isinstance(object, HashColumn):
        return 'sa.Text().with_variant(sa.Text(collation="C"), "postgresql")'
    if isinstance(object, AutoString):
        return "sa.String()" if object.length is None else f"sa.String(length={object.length})"
    if isinstance(object, TypeDecorator) and not type(object).__module__.startswith("sqlalchemy."):
        autogen_context.imports.add(f"import {type(object).__module__}")
    return False


def options(
    dialect_name: str, tables: Collection[str], *, version_table: str, more: Sequence[MetaData] = ()
) -> dict[str, Any]:
    """Return Alembic's options for a comparison. Alembic compares only the given tables."""

    def include_name(name: str | None, kind: str, parents: dict[str, Any]) -> bool:
        return kind != "table" or (name in tables and parents.get("schema_name") is None)

    def include_object(item: Any, name: str | None, kind: str, reflected: bool, other: Any) -> bool:
        return kind != "table" or name in tables

    return {
        # Pass one MetaData without a list. Otherwise Alembic ignores the naming convention.
        "target_metadata": [metadata, *more] if more else metadata,
        "version_table": version_table,
        "transactional_ddl": True,
        "transaction_per_migration": False,
        "render_as_batch": dialect_name == "sqlite",
        "render_item": render_item,
        "compare_type": _compare_type,
        "compare_server_default": True,
        "include_name": include_name,
        "include_object": include_object,
        "autogenerate_plugins": ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname", _PLUGIN.name],
    }


def _compare_type(
    context: MigrationContext, _stored: object, _own: object, stored_type: Any, own_type: Any
) -> bool | None:
    """Return False for a UUID column on SQLite, whose dialect reads NUMERIC. For another column, return None."""
    is_uuid = isinstance(own_type, UUID) and isinstance(stored_type, NUMERIC)
    return False if is_uuid and context.dialect.name == "sqlite" else None


def _compare_text_default(
    _context: object, operation: Any, _schema: object, _table: object, _name: object, stored: Any, own: Any
) -> PriorityDispatchResult:
    """Compare a model's text default with the database. Leave other defaults to Alembic.

    Alembic's comparison differs for '', a text with quotes, parentheses or line breaks.
    """
    default = getattr(own.server_default, "arg", None)
    literal = _TEXT_LITERAL.fullmatch(getattr(getattr(stored.server_default, "arg", None), "text", ""))
    if not isinstance(default, str) or literal is None or not isinstance(stored.type, String):
        return PriorityDispatchResult.CONTINUE
    # Alembic writes the text 'x' without the quotes into a revision.
    if literal[1].replace("''", "'") not in {default, re.sub("^'|'$", "", default)}:
        operation.modify_server_default = own.server_default
    return PriorityDispatchResult.STOP


# Do not pass the function as `compare_server_default`. Alembic can't call such a function for a computed or identity
# column (`test_text_defaults`).
_PLUGIN = Plugin("homeagent.text_defaults")
_PLUGIN.add_autogenerate_comparator(_compare_text_default, "column", "server_default")


def application_tables(package: str, *, more: Sequence[MetaData] = (), scripts: Path | None = None) -> frozenset[str]:
    """Import a package's modules, and return the names of the package's tables."""
    _import_modules(package, scripts)
    homeagents = {table.name for table in SCHEMA}
    named: set[str] = {
        cast("Any", mapper.local_table).name
        for mapper in Table._sa_registry.mappers
        if f"{mapper.class_.__module__}.".startswith(f"{package}.")
    }
    return frozenset((named | {table.name for one in more for table in one.tables.values()}) - homeagents)


def _import_modules(name: str, scripts: Path | None) -> None:
    module = importlib.import_module(name)
    for path in getattr(module, "__path__", ()):
        for found in pkgutil.iter_modules([path]):
            file = Path(path, found.name).resolve()
            if found.name != "__main__" and (scripts is None or file not in (scripts, scripts / "env")):
                _import_modules(f"{name}.{found.name}", scripts)


@contextmanager
def scratch_database(application: Application) -> Iterator[Connection]:
    """Open a SQLite database in memory with homeagent's and the application's tables."""
    with scratch_sqlite() as connection:
        try:
            with connection.begin():
                upgrade(connection)
                application.upgrade(connection)
        except RevisionFailedError as error:
            raise MigrationError(f"a scratch database can't get the application's tables: {error}") from error.__cause__
        yield connection


def render_revision(application: Application, tables: Collection[str]) -> dict[str, str] | None:
    """Return the imports and the function bodies of a new revision. Return None if no revision is necessary."""
    with scratch_database(application) as connection:
        chosen = options("sqlite", tables, version_table=APPLICATION_VERSION_TABLE)
        context = MigrationContext.configure(connection, opts=chosen)
        # Alembic's code for SQLite writes nested types without a prefix, such as JSONB(astext_type=Text()).
        impl: Any = context.impl
        impl.render_type = PostgresqlImpl(context.dialect, None, True, None, None, {}).render_type
        script = produce_migrations(context, metadata)
        if script.upgrade_ops is None or script.downgrade_ops is None or script.upgrade_ops.is_empty():
            return None
        _refuse_missing_default(script.upgrade_ops.as_diffs())
        imports: set[str] = set()

        def render(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
            autogen.imports = imports
            return render_item(kind, item, autogen)

        how: dict[str, Any] = {"render_as_batch": True, "render_item": render, "migration_context": context}
        operations: dict[str, Any] = {"upgrade": script.upgrade_ops, "downgrade": script.downgrade_ops}
        texts = {name: "    " + render_python_code(ops, **how).strip() for name, ops in operations.items()}
        return {**texts, "imports": "\n".join(sorted(imports))}


def _refuse_missing_default(changes: Iterable[Any]) -> None:
    """Raise InvalidArgumentError for an added NOT NULL column without a server default."""
    columns = [change[3] for change in changes if change[0] == "add_column"]
    for column in columns:
        if not column.nullable and column.server_default is None:
            raise InvalidArgumentError(
                f"the new column {column.name!r} of table {column.table.name!r} is NOT NULL without a server default, "
                "so the revision would fail if the table has rows. Add a server default to the model's field, such as "
                'Field(default=0, sa_column_kwargs={"server_default": "0"}), or allow None. '
                "To write the revision by hand, use --empty"
            )
