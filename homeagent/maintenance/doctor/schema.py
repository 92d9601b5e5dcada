"""Schema drift: how the tables of a database differ from the models, without writing to it.

On SQLite the models' tables are made in a scratch database in memory, and both are read in the same way: a CHECK is
compared word for word, which no pragma tells. On PostgreSQL nothing can be made without writing, so that what the
models say is compared with the server's catalogue.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sqlalchemy import CheckConstraint, ForeignKeyConstraint, text
from sqlalchemy.schema import CreateIndex

from homeagent.engine.sqlite.inspection import scratch_sqlite
from homeagent.maintenance.doctor.chart import Chart
from homeagent.models import metadata

if TYPE_CHECKING:
    from sqlalchemy import Connection, Table

__all__ = ["check_schema", "columns_found"]


@dataclass
class _Structure:
    """One table as it is.

    Attributes:
        columns: by name, how each is defined.
        required: the columns without which no row can be inserted.
        constraints: by name, the text of each.
        indexes: by name, whether each is unique, and its text.
        triggers: their names.
        options: how the rows are stored.
    """

    columns: dict[str, str] = field(default_factory=dict)
    required: set[str] = field(default_factory=set)
    constraints: dict[str, str] = field(default_factory=dict)
    indexes: dict[str, tuple[bool, str]] = field(default_factory=dict)
    triggers: set[str] = field(default_factory=set)
    options: str = ""


@dataclass(frozen=True)
class _Difference:
    text: str
    grave: bool
    command: str | None = None


def columns_found(connection: Connection) -> dict[str, set[str]]:
    """Return the columns that each of our tables has; a table that is missing is left out."""
    read = _sqlite_columns if connection.dialect.name == "sqlite" else _postgresql_columns
    return {table: columns for table in metadata.tables if (columns := read(connection, table))}


def check_schema(chart: Chart, connection: Connection) -> None:
    """Compare the tables of a database at this version's revision with the models."""
    with chart.attempt("schema", on=connection):
        if connection.dialect.name == "sqlite":
            with scratch_sqlite() as scratch:
                metadata.create_all(scratch)
                wanted = _sqlite_structures(scratch)
            found = _sqlite_structures(connection)
            leftovers = _sqlite_leftovers(connection)
        else:
            wanted = {name: _modelled(connection, table) for name, table in metadata.tables.items()}
            found = _postgresql_structures(connection)
            leftovers = []
        differences = [*_compare(wanted, found, connection), *leftovers]
        if not differences:
            chart.ok("schema", f"The {len(wanted)} tables are as the models say.", differences=0)
            return
        grave = [difference for difference in differences if difference.grave]
        first = (grave or differences)[0]
        remedy = "undo the change" if first.command is None else f"undo the change; the first step is: {first.command}"
        shown = "; ".join(difference.text for difference in differences[:10])
        summary = f"The schema was changed by hand: {shown}{'; …' if len(differences) > 10 else ''}."
        if grave:
            chart.alarm(
                "schema",
                summary,
                meaning="what the package relies on is not there: it may fail, or accept what it must refuse",
                remedy=remedy,
                differences=len(differences),
            )
        else:
            chart.warn(
                "schema",
                summary,
                meaning="it works, perhaps slowly; the next upgrade may fail or lose what was added",
                remedy=remedy,
                differences=len(differences),
            )


def _compare(
    wanted: dict[str, _Structure], found: dict[str, _Structure], connection: Connection
) -> Iterator[_Difference]:
    for name, table in wanted.items():
        if name not in found:
            yield _Difference(f"table {name} is missing", grave=True)
        else:
            yield from _compare_table(name, table, found[name], connection)


def _compare_table(name: str, wanted: _Structure, found: _Structure, connection: Connection) -> Iterator[_Difference]:
    if wanted.options != found.options:
        yield _Difference(f"table {name} stores its rows otherwise ({found.options or 'with a rowid'})", grave=False)
    for column, definition in wanted.columns.items():
        if column not in found.columns:
            yield _Difference(f"column {name}.{column} is missing", grave=True)
        elif found.columns[column] != definition:
            yield _Difference(
                f"column {name}.{column} is {found.columns[column]!r} instead of {definition!r}", grave=True
            )
    for column in sorted(found.columns.keys() - wanted.columns.keys()):
        yield _Difference(f"column {name}.{column} is not ours", grave=column in found.required)
    for constraint, definition in wanted.constraints.items():
        if constraint not in found.constraints:
            yield _Difference(f"constraint {constraint} of {name} is missing", grave=True)
        elif found.constraints[constraint] != definition:
            yield _Difference(f"constraint {constraint} of {name} says something else", grave=True)
    for constraint in sorted(found.constraints.keys() - wanted.constraints.keys()):
        yield _Difference(f"constraint {constraint} of {name} is not ours", grave=False)
    for index, (unique, definition) in wanted.indexes.items():
        make = _making(name, index, connection)
        if index not in found.indexes:
            yield _Difference(f"index {index} of {name} is missing", grave=unique, command=make)
        elif found.indexes[index] != (unique, definition):
            yield _Difference(
                f"index {index} of {name} is another one",
                grave=unique or found.indexes[index][0],
                command=f"DROP INDEX {index}; {make}",
            )
    for index in sorted(found.indexes.keys() - wanted.indexes.keys()):
        yield _Difference(
            f"index {index} of {name} is not ours", grave=found.indexes[index][0], command=f"DROP INDEX {index}"
        )
    for trigger in sorted(found.triggers):
        yield _Difference(f"trigger {trigger} of {name} is not ours", grave=True, command=f"DROP TRIGGER {trigger}")


def _making(table: str, name: str, connection: Connection) -> str:
    (index,) = (index for index in metadata.tables[table].indexes if index.name == name)
    return " ".join(str(CreateIndex(index).compile(dialect=connection.dialect)).split())


# SQLite


def _sqlite_columns(connection: Connection, table: str) -> set[str]:
    return {row[1] for row in connection.exec_driver_sql(f"PRAGMA table_xinfo({table})")}


def _sqlite_structures(connection: Connection) -> dict[str, _Structure]:
    return {
        table: _sqlite_structure(connection, table, sql)
        for table, sql in connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
        if table in metadata.tables
    }


def _sqlite_structure(connection: Connection, table: str, sql: str) -> _Structure:
    structure = _Structure()
    body, _, options = _plain(sql).partition("(")[2].rpartition(")")
    structure.options = options.strip()
    for clause in _clauses(body):
        first, _, rest = clause.partition(" ")
        if first == "CONSTRAINT":
            name, _, definition = rest.partition(" ")
            structure.constraints[name] = definition
        elif first in {"CHECK", "FOREIGN", "PRIMARY", "UNIQUE"}:
            structure.constraints[clause] = clause
        else:
            structure.columns[first] = rest
    for _, name, _, not_null, default, key, _ in connection.exec_driver_sql(f"PRAGMA table_xinfo({table})"):
        if not_null and default is None and not key:
            structure.required.add(name)
    indexes = connection.exec_driver_sql(
        "SELECT name, sql FROM sqlite_master WHERE type = 'index' AND tbl_name = ? AND sql IS NOT NULL", (table,)
    )
    for name, written in indexes:
        plain = _plain(written)
        structure.indexes[name] = (plain.startswith("CREATE UNIQUE "), plain.partition(" ON ")[2].replace(" (", "("))
    triggers = connection.exec_driver_sql(
        "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = ?", (table,)
    )
    structure.triggers = {row[0] for row in triggers}
    return structure


def _sqlite_leftovers(connection: Connection) -> list[_Difference]:
    # What Alembic's batch mode rebuilds a table into, before it is renamed.
    found = connection.exec_driver_sql(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE '~_alembic~_tmp~_%' ESCAPE '~'"
    )
    return [
        _Difference(
            f"table {name} was left behind by an upgrade that another tool ran",
            grave=False,
            command=f"DROP TABLE {name}",
        )
        for (name,) in found
    ]


def _plain(sql: str) -> str:
    return re.sub(r"\s+", " ", sql.replace('"', "")).strip()


def _clauses(body: str) -> Iterator[str]:
    """Split the definition of a table at the commas that are in no parenthesis and in no text."""
    depth, start, quoted = 0, 0, False
    for place, character in enumerate(body):
        if character == "'":
            quoted = not quoted
        elif quoted:
            continue
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
        elif character == "," and not depth:
            yield body[start:place].strip()
            start = place + 1
    yield body[start:].strip()


# PostgreSQL

_COLUMNS = text(
    "SELECT a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid),"
    " co.collname, ty.typcollation <> a.attcollation"
    " FROM pg_attribute a JOIN pg_type ty ON ty.oid = a.atttypid"
    " LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum"
    " LEFT JOIN pg_collation co ON co.oid = a.attcollation"
    " WHERE a.attrelid = to_regclass(:name) AND a.attnum > 0 AND NOT a.attisdropped"
)
_CONSTRAINTS = text(
    "SELECT conname, contype, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE conrelid = to_regclass(:name) AND contype <> 'n'"
)
_INDEXES = text(
    "SELECT c.relname, i.indisunique, pg_get_indexdef(i.indexrelid), i.indisvalid FROM pg_index i"
    " JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = to_regclass(:name)"
    " AND NOT EXISTS (SELECT 1 FROM pg_constraint k WHERE k.conindid = i.indexrelid)"
)
_TRIGGERS = text("SELECT tgname FROM pg_trigger WHERE tgrelid = to_regclass(:name) AND NOT tgisinternal")


def _postgresql_columns(connection: Connection, table: str) -> set[str]:
    return {row[0] for row in connection.execute(_COLUMNS, {"name": table})}


def _postgresql_structures(connection: Connection) -> dict[str, _Structure]:
    found = {}
    for table in metadata.tables:
        structure = _Structure()
        for name, kind, not_null, default, collation, is_own in connection.execute(_COLUMNS, {"name": table}):
            structure.columns[name] = _column(kind, collation if is_own else None, default, not_null)
            if not_null and default is None:
                structure.required.add(name)
        for name, kind, definition in connection.execute(_CONSTRAINTS, {"name": table}):
            structure.constraints[name] = _same_words(definition) if kind == "c" else definition
        for name, unique, definition, valid in connection.execute(_INDEXES, {"name": table}):
            written = definition.partition(" USING btree ")[2] if valid else "invalid"
            structure.indexes[name] = (unique, _same_words(written))
        structure.triggers = {row[0] for row in connection.execute(_TRIGGERS, {"name": table})}
        if structure.columns:
            found[table] = structure
    return found


def _modelled(connection: Connection, table: Table) -> _Structure:
    """Describe a table of the models in the words of PostgreSQL's catalogue."""
    dialect = connection.dialect
    structure = _Structure()
    for column in table.columns:
        kind, _, collation = column.type.compile(dialect).partition(" COLLATE ")
        default: Any = column.server_default
        structure.columns[column.name] = _column(
            kind.lower(),
            collation.strip('"') or None,
            None if default is None else str(default.arg),
            not column.nullable,
        )
    for constraint in table.constraints:
        name = str(dialect.identifier_preparer.format_constraint(constraint))
        columns = ", ".join(column.name for column in getattr(constraint, "columns", ()))
        if isinstance(constraint, CheckConstraint):
            structure.constraints[name] = _same_words(f"CHECK ({constraint.sqltext})")
        elif isinstance(constraint, ForeignKeyConstraint):
            (element,) = constraint.elements
            target = element.column
            structure.constraints[name] = f"FOREIGN KEY ({columns}) REFERENCES {target.table.name}({target.name})"
        else:
            structure.constraints[name] = f"PRIMARY KEY ({columns})"
    for index in table.indexes:
        where = index.dialect_options["postgresql"]["where"]
        columns = f"({', '.join(column.name for column in index.columns)})"
        structure.indexes[str(index.name)] = (
            bool(index.unique),
            _same_words(columns if where is None else f"{columns} WHERE {where}"),
        )
    return structure


def _column(kind: str, collation: str | None, default: str | None, not_null: bool) -> str:
    default = None if default is None else re.sub(r"::[\w ]+$", "", default)
    parts = [kind, f"COLLATE {collation}" if collation else "", f"DEFAULT {default}" if default else ""]
    return " ".join([*filter(None, parts), "NOT NULL" if not_null else "NULL"])


def _same_words(written: str) -> str:
    """Return an expression as both write it: the server writes IN as = ANY (ARRAY[…]), adds casts and parentheses."""
    plain = re.sub(r"::[a-z]+(\[\])?", "", written)
    plain = re.sub(r"= ANY \(+ARRAY\[(.*?)\]\)+", r"IN \1", plain)
    return re.sub(r"[\s()]+", " ", plain).strip()
