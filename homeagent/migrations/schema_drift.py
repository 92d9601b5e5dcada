"""Compare a database's schema with homeagent's schema, without writing to the database.

On SQLite, the revisions create the expected schema in memory. No pragma shows CHECK constraints, so homeagent compares
SQL texts. On PostgreSQL, homeagent compares the models with the server's catalogue. No revision runs there, because a
revision needs write access.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, MetaData, text
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.schema import CreateIndex
from sqlalchemy.types import NullType

from homeagent.engine.sqlite.inspection import reaches, scratch_sqlite
from homeagent.errors import SchemaChangedError, SchemaTooNewError
from homeagent.migrations.revisions import REVISION, known_revisions, server_triggers, upgrade
from homeagent.models import SCHEMA, TABLES, VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Table


@dataclass(frozen=True)
class Difference:
    """A difference between a database's schema and homeagent's schema.

    Attributes:
        grave: True if homeagent can fail, or can accept wrong values.
        command: SQL that undoes the change. None if homeagent does not know the SQL.
        kind: kind of an object that can belong to the application. None for other objects.
        trigger: name of a trigger that the application can acknowledge. None for other differences.
    """

    text: str
    grave: bool
    command: str | None = None
    kind: Literal["trigger", "view", "index"] | None = None
    trigger: str | None = None


class _Part(NamedTuple):
    """Normalised SQL text of a part of a table. A part with `strict=True` can make homeagent's writes fail."""

    definition: str
    strict: bool = False
    index_name: str | None = None
    sql: str | None = None


_quoted = DefaultDialect().identifier_preparer.quote

# For each table name, a dict from part name to part. The parts are columns, constraints, indexes and options.
_Tables = dict[str, dict[str, _Part]]


def refuse_changed_schema(
    connection: Connection, revision: str, location: str, acknowledged: Container[str] = ()
) -> None:
    """Raise SchemaChangedError for grave differences that the application has not acknowledged. On PostgreSQL, check
    only triggers and rules. The connection must be in a transaction.
    """
    if revision not in known_revisions():
        raise SchemaTooNewError(revision, known=REVISION)
    if connection.dialect.name == "sqlite":
        found = [difference for difference in _sqlite_differences(connection, revision) if difference.grave]
    else:
        found = list(_postgresql_triggers(connection, revision))
    found = [difference for difference in found if difference.trigger not in acknowledged]
    if found:
        first = next((difference.command for difference in found if difference.command), None)
        triggers = [difference.trigger for difference in found if difference.trigger is not None]
        texts = [difference.text for difference in found]
        raise SchemaChangedError(texts, location=location, command=first, triggers=triggers)


def schema_differences(connection: Connection) -> list[Difference]:
    """Return the differences between the database's schema and homeagent's newest schema."""
    if connection.dialect.name == "sqlite":
        return list(_sqlite_differences(connection, REVISION))
    wanted = {table.name: dict(_parts(table, connection.dialect)) for table in SCHEMA}
    return [
        *_compare(wanted, _postgresql_tables(connection)),
        *_postgresql_triggers(connection, REVISION),
        *views_of_tables(connection),
    ]


def homeagents_objects(revision: str) -> set[str]:
    """Return the names of homeagent's SQLite indexes and triggers at a revision."""
    wanted, triggers = _sqlite_expected(revision)
    return triggers.keys() | {
        part.index_name for parts in wanted.values() for part in parts.values() if part.index_name
    }


def _compare(wanted: _Tables, found: _Tables) -> Iterator[Difference]:
    """Yield the differences between the expected and the found tables. Ignore other found tables."""
    for table, parts in wanted.items():
        if table not in found:
            yield Difference(f"table {table} is missing", grave=True)
            continue
        there = found[table]
        for name, part in parts.items():
            other = there.get(name)
            if other is None:
                what, command = "is missing", part.sql
            elif other.definition != part.definition:
                what = f"is {other.definition!r} instead of {part.definition!r}"
                command = part.sql and f"DROP INDEX {part.index_name}; {part.sql}"
            else:
                continue
            grave = name.startswith(("column", "constraint")) or part.strict or (other is not None and other.strict)
            yield Difference(f"{name} {what}", grave, command)
        for name in sorted(there.keys() - parts.keys()):
            index = there[name].index_name
            command = None if index is None else f"DROP INDEX {_quoted(index)}"
            strict = there[name].strict
            kind: Literal["index"] | None = None if index is None or strict else "index"
            yield Difference(f"{name} is not homeagent's", strict, command, kind)


# SQLite


@cache
def _sqlite_expected(revision: str) -> tuple[_Tables, dict[str, str]]:
    """Return homeagent's tables and the SQL of its triggers at a revision."""
    with scratch_sqlite() as scratch:
        with scratch.begin():
            upgrade(scratch, revision)
        return _sqlite_tables(scratch), {name: _plain(sql) for _, name, _, sql in _sqlite_others(scratch)}


def _sqlite_differences(connection: Connection, revision: str) -> Iterator[Difference]:
    """Yield the differences between a SQLite database and homeagent's schema."""
    wanted, triggers = _sqlite_expected(revision)
    yield from _compare(wanted, _sqlite_tables(connection))
    others = _sqlite_others(connection)
    for name in triggers.keys() - {name for _, name, _, _ in others}:
        yield Difference(f"trigger {name} is missing", True, triggers[name])
    raw: Any = connection.connection.driver_connection
    mention = re.compile(rf"\b({'|'.join(wanted)})\b", re.IGNORECASE)
    for kind, name, on, sql in others:
        if triggers.get(name) == _plain(sql):
            continue
        command = f"DROP {kind.upper()} {_quoted(name)}"
        uses = mention.search(sql) is not None and reaches(raw, wanted, kind=kind, name=name, on=on)
        # A trigger can name the table in upper case.
        if kind == "trigger" and on.lower() in wanted:
            what = f"trigger {name} of {on.lower()} is not homeagent's"
            yield Difference(what, True, command, None if uses else "trigger", name)
        elif kind == "trigger" and uses:
            yield Difference(f"trigger {name} of {on} changes homeagent's tables", True, command, None, name)
        elif uses:
            yield Difference(f"view {name} reads homeagent's tables", False, command, "view")


def _sqlite_others(connection: Connection) -> list[tuple[str, str, str, str]]:
    """Return the type, name, table and SQL text of each trigger and view."""
    found = connection.exec_driver_sql(
        "SELECT type, name, tbl_name, sql FROM sqlite_master WHERE type IN ('trigger', 'view') ORDER BY name"
    )
    return [(kind, name, on, sql) for kind, name, on, sql in found]


def _sqlite_tables(connection: Connection) -> _Tables:
    """Return the parts of homeagent's tables, with the application's indexes. Ignore the application's tables."""
    found: _Tables = {}
    rows = connection.exec_driver_sql(
        "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type DESC"
    ).fetchall()
    for kind, name, table, sql in rows:
        if kind == "table" and name in {*TABLES, VERSION_TABLE}:
            found[name] = dict(_sqlite_parts(name, _plain(sql)))
        elif kind == "index" and sql is not None and table in found:
            plain = _plain(sql)
            unique = plain.startswith("CREATE UNIQUE ")
            definition = f"{'UNIQUE ' if unique else ''}{plain.partition(' ON ')[2].replace(' (', '(')}"
            found[table][f"index {name} of {table}"] = _Part(definition, unique, name, plain)
    return found


def _sqlite_parts(table: str, sql: str) -> Iterator[tuple[str, _Part]]:
    body, _, options = sql.partition("(")[2].rpartition(")")
    yield f"storage of {table}", _Part(options.strip())
    for clause in _clauses(body):
        first, _, rest = clause.partition(" ")
        if first == "CONSTRAINT":
            name, _, definition = rest.partition(" ")
            yield f"constraint {name} of {table}", _Part(definition)
        elif first in {"CHECK", "FOREIGN", "PRIMARY", "UNIQUE"}:
            yield f"constraint {clause} of {table}", _Part(clause)
        else:
            yield f"column {table}.{first}", _Part(rest, "NOT NULL" in rest and "DEFAULT" not in rest)


_QUOTED_OR_BLANK = re.compile(
    r"""('(?:[^']|'')*')"""  # The first group is a text literal, which stays unchanged.
    r'''|"((?:[^"]|"")*)"'''  # The second group is a quoted name.
    r"|(?:\s|/\*.*?\*/|--[^\n]*)+",
    re.DOTALL,
)


def _plain(sql: str) -> str:
    """Return a statement without unnecessary spaces, quotes and comments."""
    return _QUOTED_OR_BLANK.sub(lambda match: match[1] or match[2] or " ", sql).strip()


def _clauses(body: str) -> Iterator[str]:
    depth, start = 0, 0
    for found in re.finditer(r"'[^']*'|[(),]", body):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if found[0] == "," and not depth:
            yield body[start : found.start()].strip()
            start = found.end()
    yield body[start:].strip()


# PostgreSQL

# The definition of a disabled trigger is NULL. The definition is also NULL if the trigger's function has changed
# settings. The checked settings are SECURITY DEFINER and search_path.
_TRIGGERS = text(
    "SELECT 'trigger', tgname, tgtype & 2 = 2, CASE WHEN tgenabled IN ('O', 'A') AND p.prosecdef"
    " AND p.proconfig = ARRAY['search_path=pg_catalog, pg_temp'] THEN pg_get_triggerdef(t.oid, true) || p.prosrc END"
    " FROM pg_trigger t JOIN pg_proc p ON p.oid = t.tgfoid WHERE tgrelid = to_regclass(:name) AND NOT tgisinternal"
    " UNION ALL SELECT 'rule', rulename, true, NULL FROM pg_rewrite"
    " WHERE ev_class = to_regclass(:name) AND rulename <> '_RETURN'"
)


_VIEWS = text(
    "SELECT DISTINCT v.relname, v.relkind = 'm' FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid"
    " JOIN pg_class v ON v.oid = r.ev_class WHERE d.classid = 'pg_rewrite'::regclass"
    " AND d.refobjid = to_regclass(:name) AND v.relkind IN ('v', 'm') ORDER BY 1"
)


def views_of_tables(connection: Connection) -> Iterator[Difference]:
    """Yield the views on PostgreSQL that read homeagent's tables."""
    for table in TABLES:
        for name, is_stored in connection.execute(_VIEWS, {"name": table}):
            command = f"DROP {'MATERIALIZED ' if is_stored else ''}VIEW {_quoted(name)}"
            yield Difference(f"view {name} reads homeagent's table {table}", False, command, "view")


def _postgresql_triggers(connection: Connection, revision: str) -> Iterator[Difference]:
    """Yield all rules, and the added, changed and missing triggers."""
    expected = server_triggers(revision)
    for table in (*TABLES, VERSION_TABLE):
        for kind, name, is_before, definition in connection.execute(_TRIGGERS, {"name": table}):
            if kind == "trigger" and definition is not None and expected.get(name) == definition:
                del expected[name]
                continue
            command = f"DROP {kind.upper()} {_quoted(name)} ON {table}"
            # Do not accept a BEFORE trigger or a rule. A BEFORE trigger or a rule can replace homeagent's writes.
            harmless: Literal["trigger"] | None = "trigger" if kind == "trigger" and not is_before else None
            trigger = name if kind == "trigger" else None
            yield Difference(f"{kind} {name} of {table} is not homeagent's", True, command, harmless, trigger)
    for name in expected:
        yield Difference(f"trigger {name} is missing or was changed", True)


def _postgresql_tables(connection: Connection) -> _Tables:
    found = MetaData()
    found.reflect(connection, only=lambda name, _: name in TABLES, resolve_fks=False)
    return {table.name: dict(_parts(table, connection.dialect)) for table in found.tables.values()}


def _parts(table: Table, dialect: Dialect) -> Iterator[tuple[str, _Part]]:
    """Yield the parts of a table. The table comes from the models or from the server's catalogue."""
    for column in table.columns:
        kind = "unknown" if isinstance(column.type, NullType) else column.type.compile(dialect)
        default: Any = column.server_default
        default = default and re.sub(r"::[\w ]+$", "", str(getattr(default, "arg", default)))
        definition = f"{kind}{f' DEFAULT {default}' if default else ''} {'NULL' if column.nullable else 'NOT NULL'}"
        yield f"column {table.name}.{column.name}", _Part(definition, not column.nullable and default is None)
    for constraint in table.constraints:
        columns = ", ".join(column.name for column in getattr(constraint, "columns", ()))
        if isinstance(constraint, CheckConstraint):
            definition = f"CHECK {_normalised(str(constraint.sqltext))}"
        elif isinstance(constraint, ForeignKeyConstraint):
            targets = ", ".join(element.target_fullname for element in constraint.elements)
            actions = (constraint.ondelete, constraint.onupdate, constraint.deferrable, constraint.initially)
            definition = " ".join(map(str, (f"FOREIGN KEY ({columns}) REFERENCES {targets}", *filter(None, actions))))
        elif columns:
            definition = f"{type(constraint).__name__} ({columns})"
        else:
            continue  # SQLAlchemy adds an empty primary key to a table without a primary key
        name = dialect.identifier_preparer.format_constraint(constraint)
        yield f"constraint {name} of {table.name}", _Part(definition)
    for index in table.indexes:
        sql = " ".join(str(CreateIndex(index).compile(dialect=dialect)).split())
        yield f"index {index.name} of {table.name}", _Part(_normalised(sql), bool(index.unique), index.name, sql)


def _normalised(written: str) -> str:
    """Normalise an SQL expression. PostgreSQL replaces the operator `IN`, and adds casts and parentheses."""
    plain = re.sub(r"::[a-z]+(\[\])?", "", written)
    plain = re.sub(r"= ANY \(+ARRAY\[(.*?)\]\)+", r"IN \1", plain)
    return re.sub(r"[\s()]+", " ", plain).strip()
