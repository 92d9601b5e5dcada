"""Complete descriptions of a schema."""

from __future__ import annotations

import re
from typing import Any

from sqlalchemy import Connection, text

from homeagent.migrations import VERSION_TABLE


def normal(sql: str) -> str:
    """Return a statement in one spelling: single blanks, no quotes."""
    return re.sub(r"\s+", " ", sql.replace('"', "")).strip()


def sqlite_structure(raw: Any) -> dict[str, Any]:
    """Describe a SQLite schema completely enough to compare two files, the texts of CHECK constraints included."""
    structure: dict[str, Any] = {}
    names = [
        row[0]
        for row in raw.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
        if row[0] != VERSION_TABLE
    ]
    # `create_all` creates no triggers. The tests of the doctor compare the triggers with their texts.
    structure["views"] = raw.execute("SELECT type, name FROM sqlite_master WHERE type = 'view'").fetchall()
    for table in names:
        sql = normal(raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", [table]).fetchone()[0])
        body, options = re.fullmatch(r"CREATE TABLE \w+ \((.*)\)([^)]*)", sql).groups()  # type: ignore[union-attr]  # the statement matches
        indexes = {}
        for _, index, unique, origin, partial in raw.execute(f"PRAGMA index_list({table})").fetchall():
            columns = [tuple(row[2:]) for row in raw.execute(f"PRAGMA index_xinfo({index})").fetchall()]
            written = raw.execute("SELECT sql FROM sqlite_master WHERE name = ?", [index]).fetchone()
            where = normal(written[0]).partition(" WHERE ")[2] if origin == "c" else ""
            indexes[index if origin == "c" else origin] = (unique, partial, columns, where)
        structure[table] = {
            "options": options.strip(),
            # Name, declared type, NOT NULL, default, place in the primary key, hidden or generated.
            "columns": sorted(
                (tuple(row[1:]) for row in raw.execute(f"PRAGMA table_xinfo({table})").fetchall()), key=repr
            ),
            # Parts that no pragma reports: collations, and the exact text of CONSTRAINT … CHECK (…).
            "clauses": sorted(part.strip() for part in re.split(r", (?![^(]*\))", body)),
            "foreign keys": [tuple(row[2:]) for row in raw.execute(f"PRAGMA foreign_key_list({table})").fetchall()],
            "indexes": indexes,
        }
    return structure


def postgresql_structure(connection: Connection) -> dict[str, Any]:
    """Describe a PostgreSQL schema in the words of its catalogue."""
    columns = connection.execute(
        text(
            "SELECT table_name, column_name, data_type, is_nullable, column_default, collation_name"
            " FROM information_schema.columns WHERE table_schema = current_schema()"
        )
    )
    constraints = connection.execute(
        text(
            "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = current_schema()::regnamespace AND contype NOT IN ('n', 't')"
        )
    )
    indexes = connection.execute(
        text("SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()")
    )
    return {
        kind: sorted(tuple(map(str, row)) for row in found if not str(row[0]).endswith(VERSION_TABLE))
        for kind, found in (("columns", columns), ("constraints", constraints), ("indexes", indexes))
    }
