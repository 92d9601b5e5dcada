"""During a SQLite upgrade, protect the application's indexes, triggers and views. Refuse an upgrade that would break a
view or trigger.

When a revision renames a table, SQLite checks views and triggers (https://sqlite.org/lang_altertable.html). Therefore
the revisions first run on an in-memory copy of the schema.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from homeagent.engine.sqlite.dialect import decoded_row, undecoded_columns
from homeagent.engine.sqlite.inspection import scratch_sqlite
from homeagent.errors import MigrationError, SchemaChangedError
from homeagent.migrations.revisions import revision_of, upgrade
from homeagent.migrations.schema_drift import homeagents_objects
from homeagent.models import VERSION_TABLE

if TYPE_CHECKING:
    from sqlalchemy import Connection

_CULPRIT = re.compile(
    r"error in (?P<broken>view|trigger) (?P<name>.+?)(?: after \w+)?:"
    r"|into (?P<column>generated column) \"(?P<column_name>.+)\""
    r"|(?P<taken>table|index|view|trigger) (?P<taken_name>.+) already exists"
)


def refuse_broken_objects(connection: Connection, act: str, run: Callable[[Connection], None] = upgrade) -> None:
    """Raise MigrationError if an object of the application prevents the upgrade."""
    # Skip shadow tables: SQLite creates them together with the virtual table.
    query = (
        "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite~_%' ESCAPE '~'"
        " AND name NOT IN (SELECT name FROM pragma_table_list WHERE type = 'shadow') ORDER BY "
    )
    # Create triggers last, because their tables and views must exist. A view can refer to a view that does not exist
    # yet.
    order = "CASE type WHEN 'table' THEN 1 WHEN 'view' THEN 2 ELSE 3 END, rowid"
    statements = [str(row[0]) for row in connection.exec_driver_sql(query + order)]
    found = None
    with scratch_sqlite() as scratch:
        try:
            with scratch.begin():
                for sql in statements:
                    scratch.exec_driver_sql(sql)
                revision = revision_of(connection)
                if revision is not None:
                    scratch.exec_driver_sql(f"INSERT INTO {VERSION_TABLE} VALUES (?)", (revision,))  # noqa: S608  a constant
                run(scratch)
        except SchemaChangedError:
            raise
        except Exception as error:  # noqa: BLE001  the upgrade of the file raises any other error
            found = _CULPRIT.search(str(getattr(error, "orig", error)))
    if found is not None:
        kind, name = (part for part in found.groups() if part is not None)
        problem = f"would break the application's {kind} {name}, which uses homeagent's tables"
        remedy = f"drop the {kind}, open the database again, and then create the {kind} again"
        if found["taken"]:
            problem = f"needs the name of the application's {kind} {name}"
            remedy = f"give the {kind} another name, and open the database again"
        raise MigrationError(f"{act} {problem}: {remedy}. Nothing was changed")


# Text columns that a revision converts in Python, by revision and table. The first column is the key of the table.
_CONVERTED = (
    ("0003", "sessions", ("session_id", "agent_id", "sender_id", "channel_id")),
    ("0006", "devices", ("id",)),
)


def refuse_unconvertible_rows(connection: Connection, revision: str) -> None:
    """Raise MigrationError if a missing revision can't convert a stored value."""
    for later, table, columns in _CONVERTED:
        if later <= revision:
            continue
        for row in connection.exec_driver_sql(f"SELECT {undecoded_columns(columns)} FROM {table}"):  # noqa: S608  constants
            texts = decoded_row(row)
            bad = [name for name, value in zip(columns, texts, strict=True) if isinstance(value, bytes)]
            if bad:
                raise MigrationError(
                    f"upgrading from {revision!r} can't convert {table}.{bad[0]} in the row with {columns[0]} "
                    f"{texts[0]!r}: the value is a BLOB, or text that is not UTF-8. Correct or delete the row with "
                    "another program, then open the database again. The database was not changed"
                )


@contextmanager
def kept_objects(connection: Connection, revision: str) -> Iterator[None]:
    """After the block, restore the application's dropped or changed indexes and triggers."""
    query = "SELECT type, name, sql FROM sqlite_master WHERE type IN ('index', 'trigger') AND sql IS NOT NULL"
    before = {name: (kind, sql) for kind, name, sql in connection.exec_driver_sql(f"{query} ORDER BY rowid")}
    yield
    after = {name: sql for _, name, sql in connection.exec_driver_sql(query)}
    homeagents = homeagents_objects(revision)
    for name, (kind, sql) in before.items():
        if name not in homeagents and after.get(name) != sql:
            quoted = name.replace('"', '""')
            connection.exec_driver_sql(f'DROP {kind.upper()} IF EXISTS "{quoted}"')
            connection.exec_driver_sql(sql)
